"""Exact assignment by established libraries: the permutation of equation 4 of the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.optimize import linear_sum_assignment

from rsm_probe.matching.protocol import Matching


@dataclass(frozen=True)
class _Exact(Matching):
    exact: ClassVar[bool] = True
    symmetric: ClassVar[bool] = True
    needs_affinity: ClassVar[bool] = True
    growth: ClassVar[float] = 3.0


@dataclass(frozen=True)
class ScipyAssignment(_Exact):
    """SciPy's shortest augmenting paths (modified Jonker-Volgenant); releases the GIL."""

    name: ClassVar[str] = "scipy"

    def permutation(self, affinity: np.ndarray) -> np.ndarray:
        """The optimal partners; of a rectangular affinity, all of the shorter side is matched."""
        rows, columns = linear_sum_assignment(affinity, maximize=True)
        partners = np.full(affinity.shape[0], -1)
        partners[rows] = columns
        return partners


@dataclass(frozen=True)
class LapAssignment(_Exact):
    """Jonker-Volgenant from the package `lap`; holds the GIL, so worker threads do not help it."""

    name: ClassVar[str] = "lap"

    def permutation(self, affinity: np.ndarray) -> np.ndarray:
        """The optimal partners; of a rectangular affinity, all of the shorter side is matched."""
        import lap  # imported here: most users never choose it

        # lap pads a rectangle with a cost above all others, which forces the shorter side to be matched in full; costs
        # in [0, 1] keep clear of the constant that it takes for infinity.
        cost = affinity.max() - affinity.astype(np.float64)
        cost /= cost.max() or 1.0
        _, partners, _ = lap.lapjv(cost, extend_cost=True)
        return np.asarray(partners, dtype=np.intp)
