"""The layer sweep: images pass through the models once, and only sums are kept.

Begin with `layer_sweep.py` (`sweep()`), then `accumulator.py` (RSMs of mini-batches) and `batch_consumer.py` (where the
layers of a batch come from). `cka_sums.py` sums over batches, and `checkpoint.py` keeps the state on disk.
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.streaming.accumulator import Accumulator
    from rsm_probe.streaming.cost import Cost
    from rsm_probe.streaming.layer_sweep import sweep
    from rsm_probe.streaming.means import Means
    from rsm_probe.streaming.result import SweepResult
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "Accumulator",
    "Cost",
    "Means",
    "SweepResult",
    "sweep",
]
