"""RSMs of models against those of brains and behaviour: noise ceilings, evaluation of models, tests.

Begin with `evaluation.py`.
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.brains.ceilings import NoiseCeiling, noise_ceiling
    from rsm_probe.brains.contrasts import differences
    from rsm_probe.brains.evaluation import best, evaluate
    from rsm_probe.brains.simulation import simulated_subjects, unrelated_subjects
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "NoiseCeiling",
    "best",
    "differences",
    "evaluate",
    "noise_ceiling",
    "simulated_subjects",
    "unrelated_subjects",
]
