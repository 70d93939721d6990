"""Loops of the cheaper methods, compiled by Numba on first use and cached on disk; they release the GIL."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def choose(affinity, order, out):
    """Rows without a partner take, in a given order, the best column that is free.

    Args:
        affinity: (S, T), finite.
        order: (S,), the rows in the order in which they choose.
        out: (S,) int64, the partners that are given, -1 where a row has none; receives the others.
    """
    columns = affinity.shape[1]
    # Free columns are kept together, so that rows that choose late look at few.
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
        # The order of columns is kept: among equal ones the first is taken.
        for position in range(best, count - 1):
            left[position] = left[position + 1]
        count -= 1


# Terms may be added in any order, so that several are added at once; the sum is float64 all the same.
@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def matched_product(x, y, permutation):
    """Sum of the inner products that a permutation picks, in float64.

    Args:
        x: tokens (S, C).
        y: tokens (T, C).
        permutation: (S,) int64, rows of y, -1 where a row of x has no partner.
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
    """Sums as of `matched_product` for pairs of images under one permutation.

    Args:
        x: tokens (N, S, C).
        y: tokens (M, T, C).
        rows: (B,), images of x.
        columns: (B,), images of y.
        permutation: (S,) int64, rows of an image of y, -1 where there is none.
        out: (B,) float64, receives the sums.
    """
    for pair in range(len(rows)):
        out[pair] = matched_product(x[rows[pair]], y[columns[pair]], permutation)
