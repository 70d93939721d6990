"""One colour and marker per rule of comparison, the same in all figures.

Colours are told apart with a colour vision deficiency, and markers in grey print. A matching that is not listed gets
the next spare style.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RuleStyle:
    """How the values of one rule are drawn.

    Attributes:
        colour: as Matplotlib names it.
        marker: as Matplotlib names it.
        hollow: whether the marker is an outline.
    """

    colour: str
    marker: str
    hollow: bool = False

    def options(self) -> dict[str, Any]:
        """Arguments of `Axes.plot` and `Axes.errorbar`."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "markerfacecolor": "white" if self.hollow else self.colour,
            "markeredgecolor": self.colour,
            "markeredgewidth": 0.7,
        }


RULE_STYLES: Mapping[str, RuleStyle] = {
    # Spatio-semantic and semantic RSMs.
    "identity": RuleStyle("#404040", "s"),
    "optimal": RuleStyle("#0072B2", "o"),
    "batch-optimal": RuleStyle("#332288", "h"),
    # One vector per image.
    "pooled": RuleStyle("#D55E00", "^"),
    "max": RuleStyle("#E69F00", "v"),
    "gem": RuleStyle("#CC79A7", "D"),
    "class-token": RuleStyle("#56B4E9", "P"),
    # Other alignments.
    "translation": RuleStyle("#44AA99", "<"),
    "late-interaction": RuleStyle("#009E73", "X"),
    "soft": RuleStyle("#999933", "d"),
    # Approximations of the optimum.
    "rewindowed": RuleStyle("#882255", ">"),
    "topk-greedy": RuleStyle("#CC6677", "p"),
    "greedy": RuleStyle("#AA7744", "*"),
    "batch-optimal-128": RuleStyle("#A6A2DC", "h", hollow=True),
    "batch-optimal-256": RuleStyle("#7F79C8", "H", hollow=True),
    "batch-optimal-512": RuleStyle("#5850AE", "8", hollow=True),
    "batch-optimal-1024": RuleStyle("#332288", "h"),
    # Exact solvers of other libraries.
    "scipy": RuleStyle("#777777", "o", hollow=True),
    "lap": RuleStyle("#777777", "s", hollow=True),
    "ortools": RuleStyle("#777777", "D", hollow=True),
}
_SPARE = (
    RuleStyle("#117733", "o", hollow=True),
    RuleStyle("#AA4499", "s", hollow=True),
    RuleStyle("#88CCEE", "D", hollow=True),
    RuleStyle("#000000", "^", hollow=True),
    RuleStyle("#DDAA33", "v", hollow=True),
    RuleStyle("#004488", "<", hollow=True),
    RuleStyle("#BB5566", ">", hollow=True),
)


def rule_styles(names: Iterable[str]) -> dict[str, RuleStyle]:
    """The style of each rule by its name; spare styles repeat after seven rules that are not listed."""
    styles: dict[str, RuleStyle] = {}
    spare = 0
    for name in names:
        if name not in styles:
            styles[name] = RULE_STYLES.get(name) or _SPARE[spare % len(_SPARE)]
            spare += name not in RULE_STYLES
    return styles
