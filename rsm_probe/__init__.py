"""rsm_probe shows what vision models consider similar."""

from rsm_probe.comparison.cka import cka, hsic
from rsm_probe.comparison.grid import compare
from rsm_probe.comparison.statistics import bootstrap, permutation_test
from rsm_probe.errors import RsmProbeError
from rsm_probe.matching.match import Match, match, match_affinity
from rsm_probe.matching.protocol import Matching
from rsm_probe.probe.capture import capture
from rsm_probe.probe.hooks import Probe
from rsm_probe.probe.tokens import Representation
from rsm_probe.similarity.allpairs import all_pairs
from rsm_probe.similarity.between import rsm
from rsm_probe.similarity.nearest import nearest
from rsm_probe.similarity.rsm import RSM
from rsm_probe.sources.images import ImageSet, as_images
from rsm_probe.sources.models import LoadedModel, load_model
from rsm_probe.storage.captures import Capture
from rsm_probe.studies.accumulator import Accumulator
from rsm_probe.studies.means import Means
from rsm_probe.studies.result import SweepResult
from rsm_probe.studies.sweep import sweep

__version__ = "0.1.0"

__all__ = [
    "RSM",
    "Accumulator",
    "Capture",
    "ImageSet",
    "LoadedModel",
    "Match",
    "Matching",
    "Means",
    "Probe",
    "Representation",
    "RsmProbeError",
    "SweepResult",
    "all_pairs",
    "as_images",
    "bootstrap",
    "capture",
    "cka",
    "compare",
    "hsic",
    "load_model",
    "match",
    "match_affinity",
    "nearest",
    "permutation_test",
    "rsm",
    "sweep",
]
