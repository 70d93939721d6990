"""Loops over sorted pairs of images, compiled by Numba.

Pairs come in the order of a value; those of equal values share their mean rank. Sums are of float64, in parts, so that
rounding grows with the number of parts only.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# Values whose terms are summed before they are added to the total.
_PART = 4096


@njit(cache=True, nogil=True)
def rank_values(
    first: np.ndarray, second: np.ndarray, begins: np.ndarray, weights: np.ndarray, middle: float, table: np.ndarray
) -> float:
    """Write the rank of each value, less `middle`, to the position of its first pair; return the sum of squares."""
    total = part = below = 0.0
    start = values = 0
    while start < len(first):
        stop, size = start, 0.0
        while stop == start or (stop < len(first) and not begins[stop]):
            size += weights[first[stop]] * weights[second[stop]]
            stop += 1
        rank = below + (size + 1) / 2 - middle
        table[start] = rank
        part += size * rank * rank
        below += size
        start = stop
        values += 1
        if values % _PART == 0:
            total, part = total + part, 0.0
    return total + part


@njit(cache=True, nogil=True)
def compare_ranks(
    first: np.ndarray,
    second: np.ndarray,
    begins: np.ndarray,
    partners: np.ndarray,
    table: np.ndarray,
    weights: np.ndarray,
    middle: float,
) -> tuple[float, float]:
    """The sum of the squares of ranks less `middle`, and that of their products with the ranks of `rank_values`."""
    squares = products = part = part_of_products = below = 0.0
    start = values = 0
    while start < len(first):
        stop, size, others = start, 0.0, 0.0
        while stop == start or (stop < len(first) and not begins[stop]):
            weight = weights[first[stop]] * weights[second[stop]]
            if weight > 0:
                size += weight
                others += weight * table[partners[stop]]
            stop += 1
        rank = below + (size + 1) / 2 - middle
        part += size * rank * rank
        part_of_products += others * rank
        below += size
        start = stop
        values += 1
        if values % _PART == 0:
            squares, part = squares + part, 0.0
            products, part_of_products = products + part_of_products, 0.0
    return squares + part, products + part_of_products
