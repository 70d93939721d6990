"""Sums of matched affinities, and checks that bounds are consistent with them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rsm_probe.errors import MatchingError

# How far two sums of one affinity may differ, relative to the summed magnitudes; and how far two inner products of the
# same images may differ, relative to their norms, when a method works on float32 tokens.
SUMS_DIFFER, PRODUCTS_DIFFER = 1e-12, 1e-5


def matched_sums(affinities: np.ndarray, permutations: np.ndarray) -> np.ndarray:
    """Sums of the affinities that permutations (B, S) select, (B,), float64; unmatched rows add 0."""
    pairs = zip(affinities, permutations, strict=True)
    return np.array([matched_entries(affinity, partners).sum(dtype=np.float64) for affinity, partners in pairs])


def matched_entries(affinity: np.ndarray, permutation: np.ndarray) -> np.ndarray:
    """Affinities that a permutation selects; unmatched rows are left out."""
    rows = np.flatnonzero(permutation >= 0)
    return affinity[rows, permutation[rows]]


def rounding_of(affinity: np.ndarray, permutation: np.ndarray) -> float:
    """How far rounding can separate two sums of the affinities that a permutation selects."""
    return SUMS_DIFFER * float(np.abs(matched_entries(affinity, permutation)).sum(dtype=np.float64))


def prefer_identity(aligned: np.ndarray, columns: int, permutations: np.ndarray, values: np.ndarray) -> None:
    """Replace matchings by the identity where the identity has the larger value.

    A method that stops within a gap of the optimum can end below the identity.

    Args:
        aligned: values of the identity, (B,).
        columns: number of columns T, or min(S, T).
        permutations: (B, S), changed in place.
        values: (B,), changed in place.
    """
    better = aligned > values
    if not better.any():
        return
    permutations[better] = identity_partners(permutations.shape[1], columns)
    values[better] = aligned[better]


def identity_partners(rows: int, columns: int) -> np.ndarray:
    """The identity as partners (S,): location s for location s, -1 where y has no location s."""
    numbers = np.arange(rows)
    return np.where(numbers < columns, numbers, -1)


def bounds_above(bounds: np.ndarray, values: np.ndarray, rounding: Callable[[int], float], solver: str) -> np.ndarray:
    """Raise bounds (B,) to their values where rounding alone left them below.

    A bound further below its value must be wrong. Raising it would fake a perfect certificate.

    Args:
        bounds: (B,), NaN where unknown.
        values: (B,).
        rounding: maps a pair to how far its bound may lie below its value.
        solver: name of the solver, for the message.

    Raises:
        MatchingError: a bound lies further below its value than rounding explains.
    """
    below = np.flatnonzero(bounds < values)
    for k in below:
        if values[k] - bounds[k] > rounding(int(k)):
            raise MatchingError(
                f"{solver} gave pair {k} a bound of {bounds[k]!r}, which lies below the value {values[k]!r} that it "
                f"reached itself: the bound is wrong, and nothing is certified; please report this"
            )
    if len(below):
        bounds = bounds.copy()
        bounds[below] = values[below]
    return bounds
