"""Compare what vision models consider similar.

The names below suffice for most work. Every subpackage exports the rest, such as `rsm_probe.matching.Rewindowed` or
`rsm_probe.comparison.permutation_test`. Names load on first use.
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

__version__ = "0.2.0"

if TYPE_CHECKING:
    from rsm_probe.captures import Capture, capture
    from rsm_probe.comparison import bootstrap, cka, compare
    from rsm_probe.comparison import hsic as hsic
    from rsm_probe.comparison import permutation_test as permutation_test
    from rsm_probe.errors import RsmProbeError
    from rsm_probe.matching import Match as Match
    from rsm_probe.matching import Matching as Matching
    from rsm_probe.matching import match, match_affinity
    from rsm_probe.neighbours import nearest
    from rsm_probe.pairs import all_pairs, rsm
    from rsm_probe.probe import Probe
    from rsm_probe.probe import Representation as Representation
    from rsm_probe.similarity import RSM, RSMs
    from rsm_probe.sources import ImageSet as ImageSet
    from rsm_probe.sources import LoadedModel as LoadedModel
    from rsm_probe.sources import as_images as as_images
    from rsm_probe.sources import load_model
    from rsm_probe.streaming import Accumulator, RsmStore, sweep
    from rsm_probe.streaming import Means as Means
    from rsm_probe.streaming import SweepResult as SweepResult
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "RSM",
    "Accumulator",
    "Capture",
    "Probe",
    "RSMs",
    "RsmProbeError",
    "RsmStore",
    "all_pairs",
    "bootstrap",
    "capture",
    "cka",
    "compare",
    "load_model",
    "match",
    "match_affinity",
    "nearest",
    "rsm",
    "sweep",
]
