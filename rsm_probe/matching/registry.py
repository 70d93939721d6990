"""The matching methods by name: one line each."""

from __future__ import annotations

from rsm_probe.errors import MatchingError, look_up
from rsm_probe.matching.matching import Matching
from rsm_probe.matching.methods.batch_optimal import BatchOptimal
from rsm_probe.matching.methods.greedy import Greedy, TopKGreedy
from rsm_probe.matching.methods.identity import Identity
from rsm_probe.matching.methods.library_solvers import LapAssignment, OrToolsAssignment, ScipyAssignment
from rsm_probe.matching.methods.optimal import Auction
from rsm_probe.matching.methods.rewindowed import Rewindowed
from rsm_probe.matching.methods.scores import LateInteraction, SoftMatching
from rsm_probe.matching.methods.translation import Translation
from rsm_probe.matching.options import label_with_options, matching_with_options

METHODS: dict[str, Matching] = {
    method.name: method
    for method in (
        Identity(),
        Auction(),
        ScipyAssignment(),
        LapAssignment(),
        OrToolsAssignment(),
        BatchOptimal(),
        Rewindowed(),
        TopKGreedy(),
        Greedy(),
        Translation(),
        LateInteraction(),
        SoftMatching(),
    )
}


def matching_names() -> list[str]:
    """List all names that `get_matching` accepts."""
    return list(METHODS)


def cheap_matchings() -> list[str]:
    """List the methods that need no full affinity and take time linear in the number of locations."""
    return [name for name, method in METHODS.items() if not method.needs_affinity and method.growth <= 1]


def get_matching(matching: str | Matching) -> tuple[str, Matching]:
    """Return the name and the method, given a name or a method object.

    A name may have options, as in `optimal(gap=0.01)`; it is returned in one spelling, whatever the spelling given.

    Raises:
        MatchingError: unknown name (the message lists the known ones), an unknown option or an unsuitable value, or a
            class instead of an object.
    """
    if isinstance(matching, Matching):
        return matching.name, matching
    if isinstance(matching, type) and issubclass(matching, Matching):
        raise MatchingError(f"the matching is the class {matching.__name__}; give an object, {matching.__name__}()")
    if isinstance(matching, str) and "(" in matching:
        method = matching_with_options(matching, METHODS)
        return matching_label(method), method
    method = look_up(matching, METHODS, "matching", MatchingError)
    return str(matching), method


def matching_label(method: Matching) -> str:
    """Return the name of a method with the options that differ from its defaults, as `get_matching` reads it."""
    return label_with_options(method, METHODS)
