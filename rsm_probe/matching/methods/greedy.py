"""Greedy matching, locations of the largest norms first (paper, appendix F)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rsm_probe.checks import require_whole
from rsm_probe.errors import MatchingError
from rsm_probe.matching.certificate import matched_sum
from rsm_probe.matching.matching import Locations, Matching, Pairs, Solution
from rsm_probe.matching.methods.optimal import Auction


@dataclass(frozen=True)
class Greedy(Matching):
    """Locations choose in order of descending norm; each takes the best partner that is free."""

    name: ClassVar[str] = "greedy"
    exact: ClassVar[bool] = False
    symmetric: ClassVar[bool] = False
    needs_affinity: ClassVar[bool] = True
    growth: ClassVar[float] = 2.0

    def prepare(self, images: Locations) -> None:
        """Sorts the locations of every image by norm."""
        _ = images.order

    def solve(self, pairs: Pairs) -> Solution:
        """Matches the pairs as seen from x."""
        # Numba takes seconds to load, and whoever never matches should not wait for it.
        from rsm_probe.matching.compiled.loops import choose

        x, y = pairs.images()
        affinities = pairs.affinities()
        found = np.full(affinities.shape[:2], -1)
        for k, (i, j) in enumerate(zip(pairs.rows, pairs.columns, strict=True)):
            self._begin(affinities[k], x.order[i], y.order[j], found[k])
            choose(affinities[k], x.order[i], found[k])
        values = np.array([matched_sum(affinity, order) for affinity, order in zip(affinities, found, strict=True)])
        return Solution(values, found, np.full(len(pairs), np.nan), [self.name] * len(pairs))

    def _begin(self, affinity: np.ndarray, rows: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
        """Matches what is not left to the greedy choice: nothing."""


@dataclass(frozen=True)
class TopKGreedy(Greedy):
    """The k largest locations of both images are matched optimally, the rest greedily.

    Attributes:
        k: how many; the paper tries 128 and more.
    """

    k: int = 128

    name: ClassVar[str] = "topk-greedy"

    def __post_init__(self) -> None:
        require_whole(self.k, "k", 1, MatchingError)

    def reaches_identity(self, rows: int, columns: int) -> bool:
        """Where the k largest of both are all there are, which are then matched exactly."""
        return rows == columns <= self.k

    def _begin(self, affinity: np.ndarray, rows: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
        k = min(self.k, *affinity.shape)
        largest = np.ascontiguousarray(affinity[np.ix_(rows[:k], columns[:k])])[None]
        found = Auction().solve(Pairs(np.zeros(1, int), np.zeros(1, int), affinity=largest)).permutations
        assert found is not None
        out[rows[:k]] = columns[:k][found[0]]
