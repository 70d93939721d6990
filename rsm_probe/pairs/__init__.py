"""All pairs of images: `rsm()` for what fits into memory, `all_pairs()` for tiles on disk.

Begin with `compute.py` (`rsm()`), then `pair_loop.py`: a `Side` is a set of images made ready (`sides.py`), blocks of
affinities of two sides (`affinities.py`) are solved, and reductions fill a matrix (`products.py`) in worker threads
(`matcher.py`) or tile by tile on disk (`on_disk.py`, `tiles.py`), or time a sample (`timing.py`).
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.pairs.compute import rsm
    from rsm_probe.pairs.on_disk import all_pairs, open_pairs
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "all_pairs",
    "open_pairs",
    "rsm",
]
