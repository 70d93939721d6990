"""Representational similarity analysis (RSA): correlations between the off-diagonal entries of two RSMs."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from rsm_probe.comparison.inputs import CONSTANT, holds_nan
from rsm_probe.comparison.protocol import Measure, Properties, RowMeasure
from rsm_probe.errors import ComparisonError

# Pairs of 3 images.
_FEWEST_PAIRS = 3


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


class SpearmanRSA(PearsonRSA):
    """Spearman correlation between the off-diagonal entries (Kriegeskorte et al. 2008); ties share their mean rank."""

    name = "rsa-spearman"
    properties = Properties(
        "similarity", "[-1, 1]", ("scale", "shift", "monotone", "images"), "Kriegeskorte et al. 2008"
    )

    def ready(self, rsms: np.ndarray) -> np.ndarray:
        """Replace similarities (R, N, N) by their index among the distinct ones of an RSM: samples need not sort."""
        rsms = np.asarray(rsms)
        indices = np.stack([np.unique(rsm, return_inverse=True)[1].reshape(rsm.shape) for rsm in rsms])
        lost = np.isnan(rsms)
        return np.where(lost, np.nan, indices) if lost.any() else indices

    def pool(self, rsms: np.ndarray, shares: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Average ranks; the measure ranks the averages again."""
        return _mean_ranks(rsms, shares, weights)

    def _prepared(self, values: np.ndarray, pair_weights: np.ndarray) -> np.ndarray:
        return super()._prepared(np.stack([_ranks(row, pair_weights) for row in values]), pair_weights)


class CosineRSA(_Triangle):
    """Cosine between the off-diagonal entries of two RSMs (Diedrichsen et al. 2021)."""

    name = "rsa-cosine"
    properties = Properties(
        "similarity", "[-1, 1]; [0, 1] without negative entries", ("scale", "images"), "Diedrichsen et al. 2021"
    )

    def _prepared(self, values: np.ndarray, pair_weights: np.ndarray) -> np.ndarray:
        return values * np.sqrt(pair_weights)


class KendallRSA(Measure):
    """Kendall's tau-a between the off-diagonal entries (Nili et al. 2014): concordant minus discordant pairs, over all.

    Ties count as neither, so an RSM with ties has tau-a below 1 with itself.
    """

    name = "rsa-kendall"
    properties = Properties("similarity", "[-1, 1]", ("scale", "shift", "monotone", "images"), "Nili et al. 2014")
    fewest = 3
    skips_missing = True

    def pool(self, rsms: np.ndarray, shares: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Average ranks, whose tau-a is near the highest, though not proven to be it (Nili et al. 2014)."""
        return _mean_ranks(rsms, shares, weights)

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


def _mean_ranks(rsms: np.ndarray, shares: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Averages (T, N, N) of the ranks of RSMs (K, N, N), by shares (T, K); NaN for missing pairs."""
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
    indices = values if values.dtype.kind == "i" else np.unique(values, return_inverse=True)[1]
    sizes = np.bincount(indices, counts)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[indices]


def _untied(values: np.ndarray) -> float:
    """Square root of the share of untied pairs."""
    sizes = np.unique(values, return_counts=True)[1].astype(np.float64)
    count = len(values)
    return float(np.sqrt(1 - (sizes * (sizes - 1)).sum() / (count * (count - 1)))) if count > 1 else 0.0
