"""The matching methods by name: one line each."""

from __future__ import annotations

from rsm_probe.errors import MatchingError, nearest
from rsm_probe.matching.assignment import LapAssignment, ScipyAssignment
from rsm_probe.matching.identity import Identity
from rsm_probe.matching.protocol import Matching

_METHODS: dict[str, Matching] = {
    "identity": Identity(),
    "optimal": ScipyAssignment(),
    "scipy": ScipyAssignment(),
    "lap": LapAssignment(),
}


def matching_names() -> list[str]:
    """All names that `get_matching` knows."""
    return list(_METHODS)


def get_matching(matching: str | Matching) -> tuple[str, Matching]:
    """A method and the name it goes by, from a name or from a method object with its options.

    Raises:
        MatchingError: unknown name; the message holds the known ones.
    """
    if isinstance(matching, Matching):
        return matching.name, matching
    if not isinstance(matching, str) or matching not in _METHODS:
        hint = nearest(str(matching), _METHODS)
        raise MatchingError(f"unknown matching {matching!r}{hint} (known: {', '.join(_METHODS)})")
    return matching, _METHODS[matching]
