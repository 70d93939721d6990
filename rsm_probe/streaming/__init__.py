"""The layer sweep: images pass through the models once, and the RSMs of all layers are compared.

Begin with `layer_sweep.py` (`sweep()`). Without a folder, `accumulator.py` keeps sums over mini-batches alone; with
one, `stored_sweep.py` keeps their RSMs, which `rsm_store.py` reads. `batch_consumer.py` says where the layers of a
batch come from, and `cka_sums.py` sums over batches.
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.streaming.accumulator import Accumulator
    from rsm_probe.streaming.cost import Cost
    from rsm_probe.streaming.layer_sweep import sweep
    from rsm_probe.streaming.means import Means
    from rsm_probe.streaming.result import SweepResult
    from rsm_probe.streaming.rsm_store import RsmStore
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "Accumulator",
    "Cost",
    "Means",
    "RsmStore",
    "SweepResult",
    "sweep",
]
