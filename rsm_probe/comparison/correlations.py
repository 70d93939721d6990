"""Representational similarity analysis: correlations of the similarities of different images."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from rsm_probe.comparison.protocol import About, Measure, RowMeasure
from rsm_probe.errors import ComparisonError

# Entries that vary by less than this share of their size (squared) vary by rounding alone.
_CONSTANT = 1e-14


class _Triangle(RowMeasure):
    """A correlation of the similarities of different images."""

    fewest = 3

    def rows(self, rsms: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Entries above the diagonal, as the correlation takes them."""
        values, counted = _triangle(rsms), None
        if weights is not None:
            if (np.asarray(weights) > 0).sum() < self.fewest:
                raise ComparisonError(f"too few different images are left for {self.name}")
            first, second = np.triu_indices(rsms.shape[-1], 1)
            counted = np.asarray(weights, dtype=np.float64)[first] * np.asarray(weights, dtype=np.float64)[second]
            values, counted = values[:, counted > 0], counted[counted > 0]
        return self._prepared(values, counted)

    @abstractmethod
    def _prepared(self, values: np.ndarray, counted: np.ndarray | None) -> np.ndarray: ...


class PearsonRSA(_Triangle):
    """Pearson correlation of the similarities of different images."""

    name = "rsa-pearson"
    about = About("similarity", "[-1, 1]", ("scale", "shift", "images"), "Kriegeskorte et al. 2008")

    def _prepared(self, values: np.ndarray, counted: np.ndarray | None) -> np.ndarray:
        return _centred(values, counted)


class SpearmanRSA(_Triangle):
    """Spearman correlation of the similarities of different images; equal ones share their mean rank."""

    name = "rsa-spearman"
    about = About("similarity", "[-1, 1]", ("scale", "shift", "monotone", "images"), "Kriegeskorte et al. 2008")

    def ready(self, rsms: np.ndarray) -> np.ndarray:
        """The place of every similarity among the different ones of its RSM, so that no sample sorts again."""
        return np.stack([np.unique(rsm, return_inverse=True)[1].reshape(rsm.shape) for rsm in np.asarray(rsms)])

    def _prepared(self, values: np.ndarray, counted: np.ndarray | None) -> np.ndarray:
        return _centred(np.stack([_ranks(row, counted) for row in values]), counted)


class CosineRSA(_Triangle):
    """Cosine between the similarities of different images."""

    name = "rsa-cosine"
    about = About(
        "similarity", "[-1, 1]; [0, 1] without negative entries", ("scale", "images"), "Diedrichsen et al. 2021"
    )

    def _prepared(self, values: np.ndarray, counted: np.ndarray | None) -> np.ndarray:
        return values if counted is None else values * np.sqrt(counted)


class KendallRSA(Measure):
    """Kendall's tau-a of the similarities of different images: concordant less discordant pairs, over all pairs.

    Ties count as neither, so an RSM with ties is not at 1 with itself.
    """

    name = "rsa-kendall"
    about = About("similarity", "[-1, 1]", ("scale", "shift", "monotone", "images"), "Nili et al. 2014")
    fewest = 3

    def _grid(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        from scipy.stats import kendalltau

        first, second = _triangle(a), _triangle(b)
        untied = [np.array([_untied(row) for row in rows]) for rows in (first, second)]
        grid = np.full((len(a), len(b)), np.nan)
        for i, j in np.ndindex(grid.shape):
            # SciPy's tau-b is over the pairs that are not tied in the one and in the other.
            shares = untied[0][i] * untied[1][j]
            if shares > 0:
                grid[i, j] = kendalltau(first[i], second[j]).statistic * shares
        return grid


def _triangle(rsms: np.ndarray) -> np.ndarray:
    first, second = np.triu_indices(rsms.shape[-1], 1)
    values = np.asarray(rsms)
    return (values if values.dtype.kind == "i" else values.astype(np.float64, copy=False))[:, first, second]


def _centred(values: np.ndarray, counted: np.ndarray | None) -> np.ndarray:
    """Rows less their mean; rows that vary by rounding alone become 0."""
    scale = np.ones(values.shape[1]) if counted is None else counted
    centred = values - (values @ scale / scale.sum())[:, None]
    centred *= np.sqrt(scale)
    centred[(centred**2).sum(axis=1) <= _CONSTANT * (values**2 @ scale)] = 0.0
    return centred


def _ranks(values: np.ndarray, counted: np.ndarray | None) -> np.ndarray:
    """Mean ranks, as if every value stood there as often as it counts."""
    counted = np.ones(len(values)) if counted is None else counted
    places = values if values.dtype.kind == "i" else np.unique(values, return_inverse=True)[1]
    sizes = np.bincount(places, counted)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[places]


def _untied(values: np.ndarray) -> float:
    """Square root of the share of pairs that are not tied."""
    sizes = np.unique(values, return_counts=True)[1].astype(np.float64)
    count = len(values)
    return float(np.sqrt(1 - (sizes * (sizes - 1)).sum() / (count * (count - 1)))) if count > 1 else 0.0
