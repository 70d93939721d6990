"""Greedy matching, largest norms first (paper, appendix F)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rsm_probe.checks import require_whole
from rsm_probe.errors import MatchingError
from rsm_probe.matching.certificate import matched_sums
from rsm_probe.matching.matching import Locations, Matching, Pairs, Solution
from rsm_probe.matching.methods.optimal import Auction


@dataclass(frozen=True)
class Greedy(Matching):
    """Greedy matching: in order of descending norm, each location takes the best partner that is still free."""

    name: ClassVar[str] = "greedy"
    growth: ClassVar[float] = 2.2

    def prepare(self, images: Locations) -> np.ndarray:
        """Sort the locations of each image by norm, (N, S)."""
        return images.order

    def solve(self, pairs: Pairs) -> Solution:
        """Match the pairs from the side of x."""
        # Lazy: importing Numba takes seconds.
        from rsm_probe.matching.compiled.loops import choose

        order_x, order_y = pairs.prepared_by(self)
        affinities = pairs.affinities()
        partners = np.full(affinities.shape[:2], -1)
        for affinity, i, j, out in zip(affinities, pairs.rows, pairs.columns, partners, strict=True):
            self._begin(affinity, order_x[i], order_y[j], out)
            choose(affinity, order_x[i], out)
        return Solution.uncertified(matched_sums(affinities, partners), partners, self.name)

    def _begin(self, affinity: np.ndarray, rows: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
        """Match the locations that a subclass excludes from the greedy choice."""


@dataclass(frozen=True)
class TopKGreedy(Greedy):
    """Match the k largest locations of both images optimally, the rest greedily.

    Attributes:
        k: number of locations matched optimally; the paper tries 128 and more.
    """

    k: int = 128

    name: ClassVar[str] = "topk-greedy"

    def __post_init__(self) -> None:
        require_whole(self.k, "k", 1, MatchingError)

    def reaches_identity(self, rows: int, columns: int) -> bool:
        """True if both images have the same number of locations, at most k, because all are then matched exactly."""
        return rows == columns <= self.k

    def _begin(self, affinity: np.ndarray, rows: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
        k = min(self.k, *affinity.shape)
        largest = np.ascontiguousarray(affinity[np.ix_(rows[:k], columns[:k])])[None]
        out[rows[:k]] = columns[:k][Auction().assign(largest)[0]]
