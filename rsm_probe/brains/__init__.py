"""RSMs of models against those of brains and behaviour: files of RDMs, noise ceilings, evaluation of models, tests.

Begin with `reading.py` (files, whose formats are in `formats`) and `evaluation.py`.
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.brains.ceilings import NoiseCeiling, noise_ceiling
    from rsm_probe.brains.contrasts import differences
    from rsm_probe.brains.evaluation import best, evaluate
    from rsm_probe.brains.reading import read_rsms
    from rsm_probe.brains.simulation import simulated_subjects, unrelated_subjects
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "NoiseCeiling",
    "best",
    "differences",
    "evaluate",
    "noise_ceiling",
    "read_rsms",
    "simulated_subjects",
    "unrelated_subjects",
]
