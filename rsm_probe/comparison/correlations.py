"""Representational similarity analysis (RSA): correlations between the off-diagonal entries of two RSMs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from rsm_probe.comparison.alignment import LARGEST
from rsm_probe.comparison.inputs import CONSTANT, holds_nan, in_range
from rsm_probe.comparison.protocol import Measure, Properties, RowMeasure
from rsm_probe.errors import ComparisonError

# Pairs of 3 images.
_FEWEST_PAIRS = 3


class _Weighted(NamedTuple):
    """Entries of RSMs in a draw of images, whose weighted inner products are correlations up to factors.

    Attributes:
        entries: (R, Q).
        means: their weighted means, where these are to be subtracted, else 0, (R,).
        squares: weighted sums of their squares after that, (R,); NaN for constant RSMs.
        weights: how often each entry counts, (Q,).
    """

    entries: np.ndarray
    means: np.ndarray
    squares: np.ndarray
    weights: np.ndarray


class _Triangle(RowMeasure):
    """A correlation between the off-diagonal entries of two RSMs."""

    fewest = 3

    def rows(self, rsms: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Transform the entries above the diagonal, so that cosines of rows are correlations."""
        if weights is None:
            known = _known(_triangle(rsms), self)
            return self._prepared(known, np.ones(known.shape[1]))
        values, pair_weights = self._drawn(rsms, weights)
        if holds_nan(values):
            counted = ~np.isnan(values).any(axis=0)
            if counted.sum() < _FEWEST_PAIRS:  # of the known pairs, this draw left too few
                return np.zeros((len(values), 1))
            values, pair_weights = values[:, counted], pair_weights[counted]
        return self._prepared(values, pair_weights)

    def over_draws(self, a: np.ndarray, b: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Prepare for many draws, of which each is a product of prepared matrices; see `Measure.over_draws`."""
        if holds_nan(a) or holds_nan(b) or max(a.nbytes, b.nbytes) > LARGEST:
            return super().over_draws(a, b)
        count = a.shape[-1]
        row, column = np.triu_indices(count, 1)
        sides = [self._prepare(in_range(side)) for side in ([a] if b is a else [a, b])]

        def values(weights: np.ndarray) -> np.ndarray:
            self.require_images(count, weights)
            weights = np.asarray(weights, dtype=np.float64)
            pair_weights = weights[row] * weights[column]
            drawn = [side(pair_weights) for side in sides]
            first, second = drawn[0], drawn[-1]
            # Means are subtracted on one side, which suffices.
            others = (second.entries - second.means[:, None]) * second.weights
            return (first.entries @ others.T) / np.sqrt(first.squares[:, None] * second.squares)

        return values

    @abstractmethod
    def _prepare(self, rsms: np.ndarray) -> Callable[[np.ndarray], _Weighted]:
        """Prepare RSMs (R, N, N) for many draws, each given by how often the pairs of images count, (P,)."""

    def _drawn(self, rsms: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Entries above the diagonal of the images that count, (R, P), and how often each counts, (P,)."""
        weights = np.asarray(weights, dtype=np.float64)
        self.require_images(rsms.shape[-1], weights)
        drawn = np.flatnonzero(weights)
        row, column = np.triu_indices(len(drawn), 1)
        return _triangle(rsms[:, drawn[:, None], drawn]), weights[drawn[row]] * weights[drawn[column]]

    @abstractmethod
    def _prepared(self, values: np.ndarray, pair_weights: np.ndarray) -> np.ndarray:
        """Transform similarities (R, P) of image pairs, each of which counts `pair_weights` (P,) times."""


class PearsonRSA(_Triangle):
    """Pearson correlation between the off-diagonal entries of two RSMs (Kriegeskorte et al. 2008)."""

    name = "rsa-pearson"
    properties = Properties("similarity", "[-1, 1]", ("scale", "shift", "images"), "Kriegeskorte et al. 2008")

    def _prepared(self, values: np.ndarray, pair_weights: np.ndarray) -> np.ndarray:
        centred = values - (values @ pair_weights / pair_weights.sum())[:, None]
        centred *= np.sqrt(pair_weights)
        centred[(centred**2).sum(axis=1) <= CONSTANT * (values**2 @ pair_weights)] = 0.0
        return centred

    def _prepare(self, rsms: np.ndarray) -> Callable[[np.ndarray], _Weighted]:
        entries = _triangle(rsms)
        shift = entries.mean(axis=1)
        entries = entries - shift[:, None]  # so that little is left to cancel
        squares = entries**2

        def drawn(pair_weights: np.ndarray) -> _Weighted:
            total = pair_weights.sum()
            means, squared = entries @ pair_weights / total, squares @ pair_weights
            own = squared - total * means**2
            raw = squared + total * shift * (2 * means + shift)
            # Entries that are 0 in this draw leave no raw size, but the rounding of the shift.
            size = np.maximum(raw, squared)
            return _Weighted(entries, means, np.where(own > CONSTANT * size, own, np.nan), pair_weights)

        return drawn


class SpearmanRSA(PearsonRSA):
    """Spearman correlation between the off-diagonal entries (Kriegeskorte et al. 2008); ties share their mean rank."""

    name = "rsa-spearman"
    properties = Properties(
        "similarity", "[-1, 1]", ("scale", "shift", "monotone", "images"), "Kriegeskorte et al. 2008"
    )
    averages = "ranks"

    def ready(self, rsms: np.ndarray) -> np.ndarray:
        """Replace similarities (R, N, N) by their index among the distinct ones of an RSM: samples need not sort."""
        rsms = np.asarray(rsms)
        indices = np.stack([np.unique(rsm, return_inverse=True)[1].reshape(rsm.shape) for rsm in rsms])
        lost = np.isnan(rsms)
        return np.where(lost, np.nan, indices) if lost.any() else indices

    def _prepared(self, values: np.ndarray, pair_weights: np.ndarray) -> np.ndarray:
        return super()._prepared(np.stack([_ranks(row, pair_weights) for row in values]), pair_weights)

    def _prepare(self, rsms: np.ndarray) -> Callable[[np.ndarray], _Weighted]:
        indices = _triangle(self.ready(rsms)).astype(np.int32)
        distinct = int(indices.max()) + 1
        rank = _compiled_ranks()

        def drawn(pair_weights: np.ndarray) -> _Weighted:
            counted = np.flatnonzero(pair_weights)
            counts = pair_weights[counted]
            ranks = np.empty((len(indices), len(counts)))
            rank(indices, counted, counts, np.empty(distinct), ranks)
            own = ranks**2 @ counts
            return _Weighted(ranks, np.zeros(len(ranks)), np.where(own > 0, own, np.nan), counts)

        return drawn


class CosineRSA(_Triangle):
    """Cosine between the off-diagonal entries of two RSMs (Diedrichsen et al. 2021)."""

    name = "rsa-cosine"
    properties = Properties(
        "similarity", "[-1, 1]; [0, 1] without negative entries", ("scale", "images"), "Diedrichsen et al. 2021"
    )

    def _prepared(self, values: np.ndarray, pair_weights: np.ndarray) -> np.ndarray:
        return values * np.sqrt(pair_weights)

    def _prepare(self, rsms: np.ndarray) -> Callable[[np.ndarray], _Weighted]:
        entries = _triangle(rsms)
        squares = entries**2

        def drawn(pair_weights: np.ndarray) -> _Weighted:
            own = squares @ pair_weights
            return _Weighted(entries, np.zeros(len(entries)), np.where(own > 0, own, np.nan), pair_weights)

        return drawn


class KendallRSA(Measure):
    """Kendall's tau-a between the off-diagonal entries (Nili et al. 2014): concordant minus discordant pairs, over all.

    Ties count as neither, so an RSM with ties has tau-a below 1 with itself.
    """

    name = "rsa-kendall"
    properties = Properties("similarity", "[-1, 1]", ("scale", "shift", "monotone", "images"), "Nili et al. 2014")
    fewest = 3
    averages = "ranks"
    skips_missing = True

    def _grid(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        from scipy.stats import kendalltau

        x, y = (_known(_triangle(stack), self) for stack in (a, b))
        # SciPy's tau-b divides by the numbers of untied pairs in x and in y; multiply them back in.
        untied = np.outer([_untied(row) for row in x], [_untied(row) for row in y])
        grid = np.full(untied.shape, np.nan)
        for i, j in np.argwhere(untied > 0):
            grid[i, j] = kendalltau(x[i], y[j]).statistic * untied[i, j]
        return grid


def _triangle(rsms: np.ndarray) -> np.ndarray:
    first, second = np.triu_indices(rsms.shape[-1], 1)
    values = np.asarray(rsms)
    return (values if values.dtype.kind == "i" else values.astype(np.float64, copy=False))[:, first, second]


def _known(values: np.ndarray, measure: Measure) -> np.ndarray:
    """The columns of similarities (R, P) of image pairs that are not missing, in which case all RSMs hold NaN.

    Raises:
        ComparisonError: too few pairs are left.
    """
    if not holds_nan(values):
        return values
    known = values[:, ~np.isnan(values).any(axis=0)]
    if known.shape[1] < _FEWEST_PAIRS:
        raise ComparisonError(
            f"{known.shape[1]} pairs of images are known in all RSMs, too few for {measure.name}; compare fewer RSMs "
            "at once"
        )
    return known


def mean_ranks(rsms: np.ndarray, shares: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Average the ranks of the similarities in RSMs.

    Args:
        rsms: (K, N, N); missing pairs are NaN in all of them.
        shares: how much each RSM counts in each of T averages, (T, K).
        weights: how often each image counts, (N,); see `Estimator.rows`.

    Returns:
        Shape (T, N, N); NaN for missing pairs.
    """
    count = rsms.shape[-1]
    drawn = np.arange(count) if weights is None else np.flatnonzero(weights)
    row, column = (drawn[side] for side in np.triu_indices(len(drawn), 1))
    pair_weights = np.ones(len(row)) if weights is None else np.asarray(weights, float)[row] * weights[column]
    values = rsms[:, row, column]
    known = ~np.isnan(values).any(axis=0)
    ranks = np.stack([_ranks(one[known], pair_weights[known]) for one in values])
    pooled = np.full((len(shares), count, count), 0.0 if known.all() else np.nan)
    row, column = row[known], column[known]
    pooled[:, row, column] = pooled[:, column, row] = shares @ ranks
    return pooled


def _ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean ranks of values, each of which occurs `counts` times."""
    if values.dtype.kind == "i":
        indices = values
    else:
        order = np.argsort(values)
        steps = np.diff(values[order]) > 0
        if steps.all():
            ranks, sizes = np.empty(len(values)), counts[order]
            ranks[order] = np.cumsum(sizes) - (sizes - 1) / 2
            return ranks
        indices = np.empty(len(values), dtype=np.intp)
        indices[order] = np.concatenate([[0], np.cumsum(steps)])
    sizes = np.bincount(indices, counts)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[indices]


def _ranks_in_draw(
    indices: np.ndarray, counted: np.ndarray, counts: np.ndarray, sizes: np.ndarray, ranks: np.ndarray
) -> None:
    """Write the ranks of some pairs, minus their mean.

    Args:
        indices: of similarities among the distinct ones of their RSM, (R, P).
        counted: the pairs that count, (Q,).
        counts: how often each of these counts, (Q,).
        sizes: room for one number per distinct similarity.
        ranks: the result, (R, Q).
    """
    mean = counts.sum() / 2
    for row in range(len(indices)):
        sizes[:] = 0.0
        for place in range(len(counted)):
            sizes[indices[row, counted[place]]] += counts[place]
        below = 0.0
        for index in range(len(sizes)):
            size = sizes[index]
            sizes[index] = below + size / 2 - mean
            below += size
        for place in range(len(counted)):
            ranks[row, place] = sizes[indices[row, counted[place]]]


@cache
def _compiled_ranks() -> Callable[..., None]:
    """`_ranks_in_draw`, compiled on first use: a call from Python for each RSM and step takes three times as long."""
    from numba import njit

    compiled: Callable[..., None] = njit(cache=True, nogil=True)(_ranks_in_draw)
    return compiled


def _untied(values: np.ndarray) -> float:
    """Square root of the share of untied pairs."""
    sizes = np.unique(values, return_counts=True)[1].astype(np.float64)
    count = len(values)
    return float(np.sqrt(1 - (sizes * (sizes - 1)).sum() / (count * (count - 1)))) if count > 1 else 0.0
