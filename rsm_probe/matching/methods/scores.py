"""Scores: similarities of two sets of locations without a one-to-one pairing. The paper does not use them.

Norms do not bound scores, so only the linear kernel applies. The two directions of a score differ and are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rsm_probe.checks import require_flag, require_number, require_whole
from rsm_probe.errors import MatchingError
from rsm_probe.matching.matching import Locations, Matching, Pairs, Solution


@dataclass(frozen=True)
class LateInteraction(Matching):
    """The best affinity of each location, summed (Khattab and Zaharia, "ColBERT", 2020).

    Attributes:
        unit_length: use cosines of concept vectors in place of inner products, as ColBERT does. Zero vectors then
            contribute 0.
    """

    unit_length: bool = False

    name: ClassVar[str] = "late-interaction"
    symmetric: ClassVar[bool] = True
    one_to_one: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_flag(self.unit_length, "unit_length", MatchingError)

    def prepare(self, images: Locations) -> np.ndarray | None:
        """Compute the norms of the concept vectors, (N, S), if only directions count."""
        return images.norms if self.unit_length else None

    def solve(self, pairs: Pairs) -> Solution:
        """Average the sum of row maxima and the sum of column maxima.

        Raises:
            TokensNeededError: `unit_length` is set, but only affinities are known.
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
    """Entropic optimal transport between locations (Cuturi, "Sinkhorn distances", 2013), by the package POT.

    The value is the transported affinity times the number of locations of the smaller image. It tends to the value of
    the optimal matching as the regularisation goes to 0.

    Attributes:
        regularisation: entropic regularisation, relative to the range of the affinity.
        iterations: maximal number of Sinkhorn iterations.
    """

    regularisation: float = 0.01
    iterations: int = 1000

    name: ClassVar[str] = "soft"
    one_to_one: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_number(self.regularisation, "regularisation", MatchingError, above=0)
        require_whole(self.iterations, "iterations", 1, MatchingError)

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        """The affinity and its costs in float64, and Sinkhorn's transport plans."""
        return 40 * rows * columns

    def solve(self, pairs: Pairs) -> Solution:
        """Transport each pair.

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
    """Round a plan to exactly these masses; a plan from too few iterations could otherwise exceed the optimum.

    Source: Altschuler, Weed and Rigollet, "Near-linear time approximation algorithms for optimal transport", 2017,
    algorithm 2.
    """
    plan = plan * np.minimum(1, rows / np.maximum(plan.sum(axis=1), 1e-300))[:, None]
    plan = plan * np.minimum(1, columns / np.maximum(plan.sum(axis=0), 1e-300))
    missing = rows - plan.sum(axis=1), columns - plan.sum(axis=0)
    return plan + np.outer(*missing) / max(missing[0].sum(), 1e-300)
