"""What certificates rest on: sums of matched affinities, and how a bound may lie to its value."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rsm_probe.errors import MatchingError

# What the sums of one affinity may differ by, relative to the magnitudes that are added up; and what the products of
# two images may, relative to their norms, where a method works on tokens in float32.
SUMS_DIFFER, PRODUCTS_DIFFER = 1e-12, 1e-5


def matched_sums(affinities: np.ndarray, permutations: np.ndarray) -> np.ndarray:
    """Sums (B,) of the affinities that permutations pick, in float64; rows without a partner add 0."""
    pairs = zip(affinities, permutations, strict=True)
    return np.array([matched_entries(affinity, partners).sum(dtype=np.float64) for affinity, partners in pairs])


def matched_entries(affinity: np.ndarray, permutation: np.ndarray) -> np.ndarray:
    """The affinities that a permutation picks; rows without a partner pick none."""
    rows = np.flatnonzero(permutation >= 0)
    return affinity[rows, permutation[rows]]


def rounding_of(affinity: np.ndarray, permutation: np.ndarray) -> float:
    """How far two sums of the affinities that a permutation picks can lie apart by rounding."""
    return SUMS_DIFFER * float(np.abs(matched_entries(affinity, permutation)).sum(dtype=np.float64))


def prefer_identity(aligned: np.ndarray, columns: int, permutations: np.ndarray, values: np.ndarray) -> None:
    """Pair equal locations where their affinities have the larger sum: within a method's gap, they may be the optimum.

    Args:
        aligned: (B,), the sums of the affinities of equal locations.
        columns: T, or as many locations as both images have.
        permutations: (B, S), changed in place.
        values: (B,), changed in place.
    """
    better = aligned > values
    if not better.any():
        return
    permutations[better] = identity_partners(permutations.shape[1], columns)
    values[better] = aligned[better]


def identity_partners(rows: int, columns: int) -> np.ndarray:
    """The partners (S,) that the identity gives: location s for location s, -1 where y has no such location."""
    numbers = np.arange(rows)
    return np.where(numbers < columns, numbers, -1)


def bounds_above(bounds: np.ndarray, values: np.ndarray, rounding: Callable[[int], float], solver: str) -> np.ndarray:
    """Bounds (B,), raised to their values where rounding alone left them below.

    A bound that lies further below belongs to something else. Raised, it would claim a perfect certificate.

    Args:
        bounds: (B,), NaN where there is none.
        values: (B,).
        rounding: how far the bound of a pair may lie below its value.
        solver: what answered.

    Raises:
        MatchingError: a bound lies further below its value.
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
