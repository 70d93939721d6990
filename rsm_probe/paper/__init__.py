"""The experiments of the paper, one folder each: study, report and figures.

Begin with `experiment.py` (what all experiments share), `registry.py` (their names) and `translation` (the smallest).
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.paper.approximation.study import ApproximationConfig
    from rsm_probe.paper.experiment import Experiment, ExperimentConfig, Subject
    from rsm_probe.paper.outputs.divergence import jensen_shannon, probabilities
    from rsm_probe.paper.outputs.study import OutputsConfig
    from rsm_probe.paper.registry import EXPERIMENTS, PaperConfig
    from rsm_probe.paper.retrieval.object_counts import class_iou, count_f1
    from rsm_probe.paper.retrieval.study import RetrievalConfig
    from rsm_probe.paper.translation.study import TranslationConfig
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "EXPERIMENTS",
    "ApproximationConfig",
    "Experiment",
    "ExperimentConfig",
    "OutputsConfig",
    "PaperConfig",
    "RetrievalConfig",
    "Subject",
    "TranslationConfig",
    "class_iou",
    "count_f1",
    "jensen_shannon",
    "probabilities",
]
