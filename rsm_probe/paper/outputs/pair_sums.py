"""Correlations over pairs of images whose arrays do not fit into memory: sums over parts, exact and weighted.

The pairs of N images are those above the diagonal, row by row; each counts as often as both of its images, multiplied.
Arrays over pairs may be memory-mapped files: they are read in order, one part at a time. The values are those of
`PearsonRSA` and `SpearmanRSA`, up to the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rsm_probe.comparison.inputs import CONSTANT

# Rows and columns of a block of pairs, and arrays (rows, columns) that are 0 on and below the diagonal.
Block = tuple[slice, slice, Sequence[np.ndarray]]


def pair_weights(weights: np.ndarray) -> np.ndarray:
    """How often all pairs count together, for samples (R, N) of how often each image counts; shape (R,)."""
    drawn = np.asarray(weights, dtype=np.float64)
    return (drawn.sum(axis=1) ** 2 - (drawn**2).sum(axis=1)) / 2


def weighted_sums(blocks: Iterable[Block], weights: np.ndarray) -> np.ndarray:
    """Sum arrays over pairs, in several samples of the images.

    Args:
        blocks: blocks that cover each pair once, with A arrays each.
        weights: how often each image counts, (R, N).

    Returns:
        Shape (A, R), float64.
    """
    drawn, total = np.asarray(weights, dtype=np.float64), np.zeros(())
    for rows, columns, arrays in blocks:
        of_columns = drawn[:, columns]
        total = total + np.stack([((drawn[:, rows] @ array) * of_columns).sum(axis=1) for array in arrays])
    return total


def correlation(
    counts: np.ndarray, centres: tuple[float, float], first: np.ndarray, second: np.ndarray, product: np.ndarray
) -> np.ndarray:
    """Correlate two values over pairs, from their sums.

    Args:
        counts: how often all pairs count, (R,).
        centres: numbers near the means, which were subtracted from the values.
        first: sums of the first values and of their squares, (2, R).
        second: sums of the second values and of their squares, (2, R).
        product: sums of products of both, (R,).

    Returns:
        Shape (R,); NaN where values are constant.
    """
    spreads = []
    for centre, (sums, squares) in zip(centres, (first, second), strict=True):
        spread = squares - sums**2 / counts
        size = squares + 2 * centre * sums + centre**2 * counts
        spreads.append(np.where(spread <= CONSTANT * size, np.nan, spread))
    return (product - first[0] * second[0] / counts) / np.sqrt(spreads[0] * spreads[1])


@dataclass(frozen=True)
class PairOrder:
    """The pairs of images in the order of a value; all arrays have shape (P,).

    Attributes:
        first: one image of each pair.
        second: its other image.
        begins: whether a pair is the first one of its value.
    """

    first: np.ndarray
    second: np.ndarray
    begins: np.ndarray

    def rank(self, weights: np.ndarray, table: np.ndarray) -> float:
        """Rank the values among pairs that count several times; equal values share their mean rank.

        Args:
            weights: how often each image counts, (N,).
            table: receives, at the position of the first pair of each value, its rank less the mean of all ranks, (P,).

        Returns:
            The sum of the squares of these, over all pairs.
        """
        # Lazy: importing Numba takes seconds.
        from rsm_probe.paper.outputs.rank_loops import rank_values

        return float(rank_values(*self._arrays(), *_weighted(weights), np.asarray(table)))

    def compare(self, weights: np.ndarray, partners: np.ndarray, table: np.ndarray) -> tuple[float, float]:
        """Rank the values, and compare their ranks with those of another value.

        Args:
            weights: how often each image counts, (N,).
            partners: for each pair of this order, the position of the first pair of its other value, (P,).
            table: ranks of the other value at these positions; see `rank`.

        Returns:
            The sum of the squares of the ranks less their mean, and the sum of their products with the other ranks.
        """
        from rsm_probe.paper.outputs.rank_loops import compare_ranks

        squares, products = compare_ranks(*self._arrays(), np.asarray(partners), np.asarray(table), *_weighted(weights))
        return float(squares), float(products)

    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The arrays as plain ones: Numba knows no memory-mapped ones."""
        return np.asarray(self.first), np.asarray(self.second), np.asarray(self.begins)


def _weighted(weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights as float64, and the mean of all ranks."""
    return weights.astype(np.float64), (float(pair_weights(weights[None])[0]) + 1) / 2


def rank_correlation(count: float, first: float, second: float, product: float) -> float:
    """Correlate ranks, from the sums of squares and products of centred ranks; NaN if one value is constant.

    Args:
        count: how often all pairs count.
        first: sum of the squares of the first ranks, less their mean.
        second: sum of the squares of the second ranks, less their mean.
        product: sum of their products.
    """
    size = count * ((count + 1) / 2) ** 2
    if min(first, second) <= CONSTANT * (min(first, second) + size):
        return float("nan")
    return float(product / np.sqrt(first * second))
