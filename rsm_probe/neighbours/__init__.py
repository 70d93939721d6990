"""The nearest images of a query, found without solving every pair.

Begin with `nearest_images.py` (`nearest()`), then `bounded_search.py`.
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.neighbours.nearest_images import nearest
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "nearest",
]
