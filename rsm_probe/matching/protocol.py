"""What a matching method is, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Match:
    """How the locations of one image answer to those of another.

    Attributes:
        permutation: shape (S,), for each location of the first image its partner in the second, -1 where it has none.
        value: sum of the affinities of matched locations, in float64: the matched inner product.
        bound: a proven upper bound on the value of any matching, or None where the method gives none.
        solver: the name of the method that ran.
        status: "optimal" for methods that solve the assignment exactly, else "feasible".
    """

    permutation: np.ndarray
    value: float
    bound: float | None
    solver: str
    status: str


class Matching(ABC):
    """A way to pair locations: a small frozen object that carries its own options.

    Class attributes are what the rest of the project reads instead of asking for names:

    Attributes:
        name: how users and results call it.
        exact: whether it reaches the optimum of the assignment (paper, equation 4).
        symmetric: whether matching (x, y) and (y, x) gives equal values; if not, both are tried and the larger counts.
        needs_affinity: whether it reads the full affinity (paper, equation 5); if not, it works on tokens.
        growth: its time per pair grows as S to this power; used for estimates only.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    symmetric: ClassVar[bool]
    needs_affinity: ClassVar[bool]
    growth: ClassVar[float]

    @abstractmethod
    def permutation(self, affinity: np.ndarray) -> np.ndarray:
        """Matches the locations of one pair.

        Args:
            affinity: shape (S, T), finite, float32 or float64; the inner products of all pairs of locations.

        Returns:
            Shape (S,), integer: partner of each row, -1 where it has none. No column is used twice.
        """

    def products(self, x: Tensor, y: Tensor) -> np.ndarray:
        """Matched inner products of all pairs of two sets of images; for methods that need no affinity.

        Args:
            x: tokens (N, S, C).
            y: tokens (M, T, C).

        Returns:
            Shape (N, M), float64.
        """
        raise NotImplementedError(f"{self.name} works on affinities")


def matched_sum(affinity: np.ndarray, permutation: np.ndarray) -> float:
    """Sum of the affinities that a permutation picks, in float64; rows without a partner add 0."""
    rows = np.flatnonzero(permutation >= 0)
    return float(affinity[rows, permutation[rows]].sum(dtype=np.float64))
