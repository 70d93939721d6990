"""Training watched as it runs: callbacks of trainers, and the watch that they share with hand-written loops.

Begin with `training_watch.py` (`TrainingWatch`: what is recorded and compared), then `lightning.py` and
`transformers.py` (when trainers record, and where the numbers go). `undisturbed.py` leaves training as it was.
Importing a callback imports its library, and nothing else does.
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.integrations.lightning import RsmCallback
    from rsm_probe.integrations.training_watch import TrainingWatch
    from rsm_probe.integrations.transformers import RsmTrainerCallback
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "RsmCallback",
    "RsmTrainerCallback",
    "TrainingWatch",
]
