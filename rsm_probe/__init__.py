"""rsm_probe shows what vision models consider similar."""

from rsm_probe.captures.captured_layers import Capture
from rsm_probe.captures.recording import capture
from rsm_probe.comparison.alignment import cka, hsic
from rsm_probe.comparison.grid import compare
from rsm_probe.comparison.statistics import bootstrap, permutation_test
from rsm_probe.errors import RsmProbeError
from rsm_probe.matching.matches import Match, match, match_affinity
from rsm_probe.matching.matching import Matching
from rsm_probe.neighbours.nearest_images import nearest
from rsm_probe.pairs.compute import rsm
from rsm_probe.pairs.on_disk import all_pairs
from rsm_probe.probe.probe import Probe
from rsm_probe.probe.representation import Representation
from rsm_probe.similarity.rsm import RSM
from rsm_probe.sources.images.any_images import as_images
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.loading import load_model
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.streaming.accumulator import Accumulator
from rsm_probe.streaming.layer_sweep import sweep
from rsm_probe.streaming.means import Means
from rsm_probe.streaming.result import SweepResult

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
