"""The sums behind values and certificates, compiled by Numba: hardly anything is lost, and that is counted.

A bound is a sum of thousands of float64 numbers, and may cancel. So what each addition rounds away is added up beside
it (Neumaier's summation), and what is left of all rounding is added to the bound: it holds in exact arithmetic.
"""

from __future__ import annotations

import numpy as np

from rsm_probe.matching.compiled.simd import best_in_float64, compiled

# Of the magnitudes that make a bound. Subtracting prices rounds by 2^-53 each; the rest covers the sums, and those of
# the values, which are added up in pairs.
_ROUNDING = 2.0**-48


@compiled
def sum_over(affinity, owner):
    """The sum over an assignment, in float64."""
    total, lost = 0.0, 0.0
    for column in range(len(owner)):
        total, lost = _added(total, lost, np.float64(affinity[owner[column], column]))
    return total + lost


@compiled
def upper_bound(affinity, prices):
    """The dual's bound on every assignment, in float64: the prices, and each row's best at these prices."""
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
    """A sum with another term, and what rounding has taken from it so far."""
    following = total + term
    if abs(total) >= abs(term):
        lost += (total - following) + term
    else:
        lost += (term - following) + total
    return following, lost


# Terms may be added in any order: several at once.
@compiled(fastmath={"reassoc", "contract", "nsz"})
def frobenius(affinity):
    """The Frobenius norm of the first n columns, in float64."""
    total = 0.0
    for i in range(len(affinity)):
        for j in range(len(affinity)):
            total += np.float64(affinity[i, j]) * np.float64(affinity[i, j])
    return np.sqrt(total)
