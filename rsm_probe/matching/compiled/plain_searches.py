"""The auction's searches in plain Numba, equal in every value to the vector instructions of `numba_internals`.

They are the fallback if a Numba release or a platform cannot compile the vector instructions, and their specification.
Both select the same columns, ties included, so that matchings agree to the last bit.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# Values of a row per vector, and candidates per vector.
LANES, CANDIDATE_LANES = 64, 16
# Candidates pay off if a pass over a row costs more than gathering a few prices: not for small matrices, and not while
# prices rise so fast that the best candidate soon drops below the threshold.
FEWEST_FOR_CANDIDATES = 512


@njit(cache=True, nogil=True)
def lowest_value(array):
    """A finite value below all others, even after a price is subtracted."""
    return array.dtype.type(-3e38 if array.itemsize == 4 else -1e300)


@njit(cache=True, nogil=True)
def best_lanes(affinity, row, prices):
    """Search `affinity[row] - prices` in one pass; both have a multiple of 64 columns.

    Returns:
        (best, runner_up, lane, threshold). `runner_up` is the best value of the other lanes, or a larger one from the
        same lane; it equals `best` if two lanes hold that. `lane` is the first lane whose columns lane, lane + 64, ...
        hold the best. `threshold` is the smallest of eight maxima, which some twenty columns exceed; it equals `best`
        if there are too few columns for candidates.
    """
    best, runner_up, best_lane = lowest_value(affinity), lowest_value(affinity), 0
    for column in range(affinity.shape[1]):
        value = affinity[row, column] - prices[column]
        if value >= runner_up:
            if value > best:
                best, runner_up, best_lane = value, best, column % LANES
            else:
                runner_up = value
                if value == best:
                    best_lane = min(best_lane, column % LANES)
    return (
        best,
        runner_up,
        best_lane,
        _threshold(affinity, row, prices) if len(prices) >= FEWEST_FOR_CANDIDATES else best,
    )


@njit(cache=True, nogil=True, fastmath={"nnan"})
def _threshold(affinity, row, prices):
    """The smallest of eight maxima over lanes lane, lane + 8, ... of `affinity[row] - prices`."""
    maxima = np.full(LANES, lowest_value(affinity))
    for start in range(0, len(prices), LANES):
        for lane in range(LANES):
            value = affinity[row, start + lane] - prices[start + lane]
            maxima[lane] = value if value > maxima[lane] else maxima[lane]
    smallest = maxima.max()
    for group in range(8):
        smallest = min(smallest, maxima[group::8].max())
    return smallest


@njit(cache=True, nogil=True, fastmath={"nnan"})
def best_in_float64(affinity, row, prices):
    """The largest of `affinity[row] - prices`, subtracted in float64, which is exact if both are float32."""
    best = -1e300
    for column in range(affinity.shape[1]):
        value = np.float64(affinity[row, column]) - np.float64(prices[column])
        best = value if value > best else best
    return best


@njit(cache=True, nogil=True)
def lanes_above(affinity, row, prices, start, threshold):
    """A bit mask of the 64 values `affinity[row] - prices` from column `start` on that exceed a threshold."""
    bits = np.uint64(0)
    for lane in range(LANES):
        if affinity[row, start + lane] - prices[start + lane] > threshold:
            bits |= np.uint64(1) << np.uint64(lane)
    return bits


@njit(cache=True, nogil=True)
def best_candidate(values, columns, row, count, prices):
    """Search `values[row, :count] - prices[columns[row, :count]]` in one pass; count is a multiple of 16.

    Returns:
        (best, second, position): the two largest values, equal if two candidates tie, and the position of the best.
    """
    best, second, best_position = lowest_value(values), lowest_value(values), 0
    for position in range(count):
        value = values[row, position] - prices[columns[row, position]]
        # As in a vector, ties go to the first lane.
        if value > best or (value == best and position % CANDIDATE_LANES < best_position % CANDIDATE_LANES):
            best, second, best_position = value, best, position
        else:
            second = max(second, value)
    return best, second, best_position


@njit(cache=True, nogil=True)
def lowest_bit(bits):
    """The position of the lowest set bit; at least one bit must be set."""
    position = 0
    while (bits >> np.uint64(position)) & np.uint64(1) == 0:
        position += 1
    return position
