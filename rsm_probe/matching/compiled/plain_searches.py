"""The searches of the auction in plain Numba: what `numba_internals` does with vector instructions, value for value.

They serve as the fallback where a release of Numba or a platform cannot compile those, and as their specification: both
name the same columns, ties included, so that matchings are the same to the last bit.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# How many values of a row one vector holds, and how many candidates.
LANES, CANDIDATE_LANES = 64, 16
# Candidates pay where a pass over a row costs more than gathering some prices: not for small matrices, and not while
# prices rise so fast that the best candidate soon drops below the threshold.
FEWEST_FOR_CANDIDATES = 512


@njit(cache=True, nogil=True)
def lowest_value(array):
    """A finite value below all others, even after a price was subtracted."""
    return array.dtype.type(-3e38 if array.itemsize == 4 else -1e300)


@njit(cache=True, nogil=True)
def best_lanes(affinity, row, prices):
    """One pass over `affinity[row] - prices`; both have a multiple of 64 columns.

    Returns:
        (best, runner_up, lane, threshold): the best value; the best of other lanes, or a better one of its own lane
        that is not the best itself, so that it equals `best` where two lanes hold that; the first lane, in whose
        columns lane, lane + 64, ... the best stands; a value that some twenty columns exceed, as it is the smallest of
        eight maxima, where there are enough columns for candidates.
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
    """The best of `affinity[row] - prices`, subtracted in float64: nothing is rounded where both are float32."""
    best = -1e300
    for column in range(affinity.shape[1]):
        value = np.float64(affinity[row, column]) - np.float64(prices[column])
        best = value if value > best else best
    return best


@njit(cache=True, nogil=True)
def lanes_above(affinity, row, prices, start, threshold):
    """Which of 64 values `affinity[row] - prices` from column `start` exceed a threshold, as the bits of an integer."""
    bits = np.uint64(0)
    for lane in range(LANES):
        if affinity[row, start + lane] - prices[start + lane] > threshold:
            bits |= np.uint64(1) << np.uint64(lane)
    return bits


@njit(cache=True, nogil=True)
def best_candidate(values, columns, row, count, prices):
    """One pass over `values[row, :count] - prices[columns[row, :count]]`; count is a multiple of 16.

    Returns:
        (best, second, position): the two best values, equal where two candidates tie, and where the best stands.
    """
    best, second, best_position = lowest_value(values), lowest_value(values), 0
    for position in range(count):
        value = values[row, position] - prices[columns[row, position]]
        # Of equal values, the one in the first lane counts, as in a vector.
        if value > best or (value == best and position % CANDIDATE_LANES < best_position % CANDIDATE_LANES):
            best, second, best_position = value, best, position
        else:
            second = max(second, value)
    return best, second, best_position


@njit(cache=True, nogil=True)
def lowest_bit(bits):
    """The position of the lowest bit that is set; at least one must be."""
    position = 0
    while (bits >> np.uint64(position)) & np.uint64(1) == 0:
        position += 1
    return position
