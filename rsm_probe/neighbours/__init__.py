"""The nearest images of a query, found without solving every pair.

Begin with `nearest_images.py` (`nearest()`), then `bounded_search.py`, which skips pairs whose upper bound
cannot reach the nearest so far. A first bound comes from per-image summaries (`matching/bounds.py`), a second, tighter
one from the affinities (`candidates.py`).
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
