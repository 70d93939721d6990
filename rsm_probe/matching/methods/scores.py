"""Scores: similarities of sets of locations that pair nothing one to one. They are measures beyond the paper.

Norms do not bound them, so only the linear kernel applies. Neither is the same in both directions, which are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rsm_probe.checks import brief, require_number, require_whole
from rsm_probe.errors import MatchingError
from rsm_probe.matching.matching import Locations, Matching, Pairs, Solution


@dataclass(frozen=True)
class LateInteraction(Matching):
    """Each location's best answer, summed (Khattab and Zaharia, "ColBERT", 2020).

    Attributes:
        unit_length: compare directions only, by the cosines of concept vectors, as ColBERT does; a location that is all
            zero then answers with 0.
    """

    unit_length: bool = False

    name: ClassVar[str] = "late-interaction"
    symmetric: ClassVar[bool] = True
    one_to_one: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.unit_length, bool | np.bool_):
            raise MatchingError(f"unit_length must be True or False, found {brief(self.unit_length)}")

    def prepare(self, images: Locations) -> np.ndarray | None:
        """Measure the concept vectors (N, S), where only their directions count."""
        return images.norms if self.unit_length else None

    def solve(self, pairs: Pairs) -> Solution:
        """Sum the largest affinities of the rows, and of the columns, and take the mean of both.

        Raises:
            TokensNeededError: `unit_length`, and only affinities are known.
        """
        affinities = pairs.affinities()
        values = np.zeros(len(pairs))
        x, y = pairs.prepared_by(self) if self.unit_length else (None, None)
        for axis, own, other, own_rows, other_rows in (
            (2, x, y, pairs.rows, pairs.columns),
            (1, y, x, pairs.columns, pairs.rows),
        ):
            if own is None or other is None:
                best = affinities.max(axis=axis)
            else:
                scales = np.expand_dims(_inverse(other[other_rows]), 3 - axis).astype(affinities.dtype)
                best = (affinities * scales).max(axis=axis) * _inverse(own[own_rows])
            values += best.sum(axis=1, dtype=np.float64) / 2
        return Solution.uncertified(values, None, self.name)


@dataclass(frozen=True)
class SoftMatching(Matching):
    """Entropic optimal transport between the locations (Cuturi, "Sinkhorn distances", 2013), by the package POT.

    The value is the transported affinity times the number of locations of the smaller image, so that it tends to the
    optimal matching's as the regularisation goes to 0.

    Attributes:
        regularisation: relative to the range of the affinity.
        iterations: of Sinkhorn's algorithm at most.
    """

    regularisation: float = 0.01
    iterations: int = 1000

    name: ClassVar[str] = "soft"
    one_to_one: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_number(self.regularisation, "regularisation", MatchingError, above=0)
        require_whole(self.iterations, "iterations", 1, MatchingError)

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        """The affinity and its costs in float64, and the transport plans of Sinkhorn's algorithm."""
        return 40 * rows * columns

    def solve(self, pairs: Pairs) -> Solution:
        """Transport every pair.

        Raises:
            MatchingError: POT is not installed.
        """
        values = np.array([self._value(affinity.astype(np.float64)) for affinity in pairs.affinities()])
        return Solution.uncertified(values, None, self.name)

    def _value(self, affinity: np.ndarray) -> float:
        try:
            from ot import sinkhorn
        except ImportError as error:
            raise MatchingError("POT is not installed; pip install 'rsm-probe[soft]'") from error
        rows, columns = affinity.shape
        spread = affinity.max() - affinity.min()
        if spread == 0:
            return float(affinity[0, 0]) * min(rows, columns)
        cost = (affinity.max() - affinity) / spread
        masses = np.full(rows, 1 / rows), np.full(columns, 1 / columns)
        plan = sinkhorn(
            *masses,
            cost,
            self.regularisation,
            method="sinkhorn_log",
            numItermax=self.iterations,
            warn=False,
        )
        return float((_feasible(plan, *masses) * affinity).sum()) * min(rows, columns)


def _inverse(norms: np.ndarray) -> np.ndarray:
    return np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)


def _feasible(plan: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A plan with exactly these masses: one that was stopped early could otherwise be worth more than the optimum.

    Source: Altschuler, Weed and Rigollet, "Near-linear time approximation algorithms for optimal transport", 2017,
    algorithm 2.
    """
    plan = plan * np.minimum(1, rows / np.maximum(plan.sum(axis=1), 1e-300))[:, None]
    plan = plan * np.minimum(1, columns / np.maximum(plan.sum(axis=0), 1e-300))
    missing = rows - plan.sum(axis=1), columns - plan.sum(axis=0)
    return plan + np.outer(*missing) / max(missing[0].sum(), 1e-300)
