"""Sums behind values and certificates, compiled by Numba, with rigorous bounds on rounding.

A bound sums thousands of float64 numbers that may cancel. Neumaier's summation accumulates the rounding error of each
addition, and an allowance for the remaining error is added to the bound, so that it holds in exact arithmetic.
"""

from __future__ import annotations

import numpy as np

from rsm_probe.matching.compiled.simd import best_in_float64, compiled

# Allowance relative to the summed magnitudes. Subtracting prices rounds by 2^-53 each; the rest covers the sums,
# including those of the values, which use pairwise summation.
_ROUNDING = 2.0**-48


@compiled
def sum_over(affinity, owner):
    """The value of an assignment, in float64."""
    total, lost = 0.0, 0.0
    for column in range(len(owner)):
        total, lost = _added(total, lost, np.float64(affinity[owner[column], column]))
    return total + lost


@compiled
def upper_bound(affinity, prices):
    """The dual bound on every assignment, in float64: the prices plus each row's best at these prices."""
    total, lost, size = 0.0, 0.0, 0.0
    for j in range(len(affinity)):
        price = np.float64(prices[j])
        total, lost = _added(total, lost, price)
        size += abs(price)
    for i in range(len(affinity)):
        best = best_in_float64(affinity, i, prices)
        total, lost = _added(total, lost, best)
        size += abs(best)
    return total + lost + _ROUNDING * size


@compiled
def _added(total, lost, term):
    """Add a term to a sum; return the sum and its accumulated rounding error."""
    following = total + term
    if abs(total) >= abs(term):
        lost += (total - following) + term
    else:
        lost += (term - following) + total
    return following, lost


# Allow reassociation, so that the loop vectorises.
@compiled(fastmath={"reassoc", "contract", "nsz"})
def frobenius(affinity):
    """The Frobenius norm of the first n columns, in float64."""
    total = 0.0
    for i in range(len(affinity)):
        for j in range(len(affinity)):
            total += np.float64(affinity[i, j]) * np.float64(affinity[i, j])
    return np.sqrt(total)
