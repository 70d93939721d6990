"""Exact assignment by established libraries (paper, equation 4); also the test oracles of our own solver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rsm_probe.checks import require_whole
from rsm_probe.errors import MatchingError
from rsm_probe.matching.matching import Matching

# OR-Tools sums costs in 64-bit integers.
_LARGEST_COST = 1 << 62


@dataclass(frozen=True)
class _Exact(Matching):
    exact: ClassVar[bool] = True
    symmetric: ClassVar[bool] = True
    growth: ClassVar[float] = 3.0

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Costs in float64, and the library's own copy."""
        return 16 * rows * columns


@dataclass(frozen=True)
class ScipyAssignment(_Exact):
    """SciPy's shortest augmenting paths (modified Jonker-Volgenant). Releases the GIL."""

    name: ClassVar[str] = "scipy"

    def permutation(self, affinity: np.ndarray) -> np.ndarray:
        """Return the optimal partners (S,) for an affinity (S, T); the shorter side is matched in full."""
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(affinity, maximize=True)
        partners = np.full(affinity.shape[0], -1)
        partners[rows] = columns
        return partners


@dataclass(frozen=True)
class LapAssignment(_Exact):
    """Jonker-Volgenant from the package `lap`. Holds the GIL, so worker threads do not help."""

    name: ClassVar[str] = "lap"

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Costs in float64, and the library's own square copy."""
        return 8 * rows * columns + 8 * max(rows, columns) ** 2

    def permutation(self, affinity: np.ndarray) -> np.ndarray:
        """Return the optimal partners (S,) for an affinity (S, T); the shorter side is matched in full."""
        import lap  # lazy: few users need it

        # lap pads a rectangle with a cost above all others, which matches the shorter side in full. Costs in [0, 1]
        # stay below the constant that it treats as infinity.
        cost = affinity.max() - affinity.astype(np.float64)
        cost /= cost.max() or 1.0
        _, partners, _ = lap.lapjv(cost, extend_cost=True)
        return np.asarray(partners, dtype=np.intp)


@dataclass(frozen=True)
class OrToolsAssignment(_Exact):
    """OR-Tools' cost-scaling auction, the fastest solver in the paper. An optional extra; holds the GIL.

    Attributes:
        levels: integer levels to which costs are rounded over the range of the affinity; OR-Tools takes integers only.
    """

    levels: int = 1 << 30

    def __post_init__(self) -> None:
        require_whole(self.levels, "levels", 2, MatchingError)

    name: ClassVar[str] = "ortools"
    growth: ClassVar[float] = 2.5

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Square costs in float64 and as integers, and for each an arc with two ends, here and in the solver."""
        return 56 * max(rows, columns) ** 2

    def permutation(self, affinity: np.ndarray) -> np.ndarray:
        """Return the optimal partners (S,) for an affinity (S, T), up to rounding; the shorter side is matched in full.

        Raises:
            MatchingError: OR-Tools is not installed or finds no solution, or `levels` is too large.
        """
        try:
            from ortools.graph.python import linear_sum_assignment as ortools
        except ImportError as error:
            raise MatchingError("OR-Tools is not installed; pip install 'rsm-probe[ortools]'") from error
        rows, columns = affinity.shape
        size = max(rows, columns)
        most = _LARGEST_COST // (size + 1)
        if self.levels > most:
            raise MatchingError(
                f"levels must be at most {most} for {size} locations, found {self.levels}: sums would overflow"
            )
        square = np.zeros((size, size))
        square[:rows, :columns] = affinity
        costs = square.max() - square
        costs *= self.levels / (costs.max() or 1.0)
        solver = ortools.SimpleLinearSumAssignment()
        ends = np.indices((size, size), dtype=np.int32).reshape(2, -1)
        solver.add_arcs_with_cost(*ends, np.rint(costs).astype(np.int64).ravel())
        if solver.solve() != solver.OPTIMAL:
            raise MatchingError(f"OR-Tools found no assignment for an affinity of shape {affinity.shape}")
        partners = np.array([solver.right_mate(row) for row in range(rows)])
        return np.where(partners < columns, partners, -1)
