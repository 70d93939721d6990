"""Loops of the cheaper methods, compiled by Numba on first use and cached on disk. They release the GIL."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def choose(affinity, order, out):
    """Give each unmatched row, in the given order, its best free column.

    Args:
        affinity: (S, T), finite.
        order: the rows in the order in which they choose, (S,).
        out: partners, (S,) int64, -1 for unmatched rows; receives the new partners.
    """
    columns = affinity.shape[1]
    # Free columns are stored contiguously, so that rows that choose late check only a few.
    free = np.ones(columns, np.bool_)
    for row in range(len(out)):
        if out[row] >= 0:
            free[out[row]] = False
    left = np.flatnonzero(free)
    count = len(left)
    for row in order:
        if out[row] >= 0 or count == 0:
            continue
        best = 0
        for position in range(1, count):
            if affinity[row, left[position]] > affinity[row, left[best]]:
                best = position
        out[row] = left[best]
        # Preserve the order of the columns, so that ties go to the first.
        for position in range(best, count - 1):
            left[position] = left[position + 1]
        count -= 1


# Allow reassociation, so that the loop vectorises; the sum is in float64 in any case.
@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def matched_product(x, y, permutation):
    """Sum the inner products that a permutation selects, in float64.

    Args:
        x: tokens (S, C).
        y: tokens (T, C).
        permutation: rows of y, (S,) int64, -1 for unmatched rows of x.
    """
    total = 0.0
    for row in range(len(permutation)):
        partner = permutation[row]
        if partner >= 0:
            for channel in range(x.shape[1]):
                total += np.float64(x[row, channel]) * np.float64(y[partner, channel])
    return total


@njit(cache=True, nogil=True)
def matched_products(x, y, rows, columns, permutation, out):
    """Compute `matched_product` for pairs of images under one permutation.

    Args:
        x: tokens (N, S, C).
        y: tokens (M, T, C).
        rows: images of x, (B,).
        columns: images of y, (B,).
        permutation: locations of y, (S,) int64, -1 for unmatched locations.
        out: (B,) float64, receives the sums.
    """
    for pair in range(len(rows)):
        out[pair] = matched_product(x[rows[pair]], y[columns[pair]], permutation)
