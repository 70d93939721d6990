"""Brains and behaviour: RDMs of several subjects, read from files.

Begin with `reading.py`; `formats` reads one file of each format.
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.brains.reading import read_rsms
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "read_rsms",
]
