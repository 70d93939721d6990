"""Studies beyond the experiments of the paper, and the registry of all studies.

Begin with `registry.py`. `sweep.py` and `sweeps.py` run layer sweeps, `pairs.py` matches all pairs of images, and
`brain/` compares their RSMs with those of brains.
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.runs.study import Study
    from rsm_probe.studies.brain.result import BrainResult
    from rsm_probe.studies.brain.study import BrainConfig
    from rsm_probe.studies.pairs import PairsConfig, PairsResult
    from rsm_probe.studies.registry import STUDIES, read_study
    from rsm_probe.studies.sweep import SweepConfig
    from rsm_probe.studies.sweep_figures import Architecture, figure15, figure16, figure17
    from rsm_probe.studies.sweeps import SweepsConfig
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "STUDIES",
    "Architecture",
    "BrainConfig",
    "BrainResult",
    "PairsConfig",
    "PairsResult",
    "Study",
    "SweepConfig",
    "SweepsConfig",
    "figure15",
    "figure16",
    "figure17",
    "read_study",
]
