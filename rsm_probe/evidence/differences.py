"""What intervals allow to be said of semantic RSMs against baselines: they win, they lose, or neither is shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rsm_probe.runs.tables import Row

# Stands for the matching of semantic RSMs, whichever it is; the other rules are what it is compared with.
SEMANTIC_RULE = "semantic"
# Keys of the difference between the semantic RSM and a rule in each row, with the ends of its interval.
DIFFERENCE = ("difference", "difference_low", "difference_high")


@dataclass(frozen=True)
class Verdicts:
    """How many differences lie clear of 0.

    Attributes:
        wins: differences whose interval lies above 0.
        ties: differences whose interval contains 0.
        losses: differences whose interval lies below 0.
    """

    wins: int
    ties: int
    losses: int

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Verdicts:
        """Count the differences of rows; those without an interval are left out."""
        said = [verdict(row) for row in rows]
        return cls(said.count("win"), said.count("tie"), said.count("loss"))

    @property
    def total(self) -> int:
        """The number of differences."""
        return self.wins + self.ties + self.losses

    def __str__(self) -> str:
        return f"{self.wins} / {self.ties} / {self.losses}" if self.total else "-"


def verdict(row: Row) -> str:
    """Say "win", "tie" or "loss" of a difference by its interval; "" without an interval."""
    _, low, high = (row[key] for key in DIFFERENCE)
    if math.isnan(low):
        return ""
    return "win" if low > 0 else "loss" if high < 0 else "tie"


def gains(rows: Sequence[Row], key: str = "difference", better: int = 1) -> list[Row]:
    """Say of each row how much better the semantic RSM is than its rule.

    Args:
        rows: rows of an experiment, with the name of the semantic matching under `semantic`, and the difference
            "semantic - this rule" and its interval under `key`.
        key: key of that difference.
        better: 1 if larger values are better, -1 if smaller ones are.

    Returns:
        The rows with the keys `DIFFERENCE`, positive where the semantic RSM is better, and NaN where there is no
        difference. The matching of the semantic RSM itself is called `SEMANTIC_RULE`.
    """
    added = []
    for row in rows:
        value, low, high = (float(row.get(name, math.nan)) for name in (key, f"{key}_low", f"{key}_high"))
        rule = row["matching"]
        if rule == row.get("semantic", ""):
            rule, value, low, high = SEMANTIC_RULE, math.nan, math.nan, math.nan
        ends = (value, low, high) if better > 0 else (-value, -high, -low)
        added.append({**row, "matching": rule, **dict(zip(DIFFERENCE, ends, strict=True))})
    return added


def baselines(rows: Sequence[Row]) -> list[str]:
    """The rules with which the semantic RSM is compared, in the order of the rows."""
    return list(dict.fromkeys(row["matching"] for row in rows if verdict(row)))


def varies(rows: Sequence[Row], key: str) -> bool:
    """Whether the values of a key differ between the levels of a factor, so that they are what changes."""
    levels = {row["level"] for row in rows}
    return len({frozenset(row[key] for row in rows if row["level"] == level) for level in levels}) > 1


def apart(first: Row, second: Row) -> str:
    """Say "larger" or "smaller" of the second difference, if the intervals do not overlap; else ""."""
    _, low, high = (first[key] for key in DIFFERENCE)
    _, second_low, second_high = (second[key] for key in DIFFERENCE)
    return "larger" if second_low > high else "smaller" if second_high < low else ""
