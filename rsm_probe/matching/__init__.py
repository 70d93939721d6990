"""Matching: which location of one image corresponds to which location of another.

Begin with `matching.py` (the interface of a method and its guarantees), `registry.py` (the methods by name) and
`matches.py` (`match()`). `cpu_or_gpu.py` asks once per workload whether the GPU or the CPU solves it; the rule belongs
to the method (`on_device`; for `optimal`, in `methods/optimal.py`). `methods` holds one method per file; `compiled`
holds the auction for CPU and GPU.
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.matching.matches import Match, match, match_affinity
    from rsm_probe.matching.matching import Locations, Matching, Pairs, Solution
    from rsm_probe.matching.methods.batch_optimal import BatchOptimal
    from rsm_probe.matching.methods.greedy import Greedy, TopKGreedy
    from rsm_probe.matching.methods.identity import Identity
    from rsm_probe.matching.methods.library_solvers import LapAssignment, OrToolsAssignment, ScipyAssignment
    from rsm_probe.matching.methods.optimal import Auction
    from rsm_probe.matching.methods.rewindowed import Rewindowed
    from rsm_probe.matching.methods.scores import LateInteraction, SoftMatching
    from rsm_probe.matching.methods.translation import Translation
    from rsm_probe.matching.registry import METHODS, get_matching, matching_names
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "METHODS",
    "Auction",
    "BatchOptimal",
    "Greedy",
    "Identity",
    "LapAssignment",
    "LateInteraction",
    "Locations",
    "Match",
    "Matching",
    "OrToolsAssignment",
    "Pairs",
    "Rewindowed",
    "ScipyAssignment",
    "SoftMatching",
    "Solution",
    "TopKGreedy",
    "Translation",
    "get_matching",
    "match",
    "match_affinity",
    "matching_names",
]
