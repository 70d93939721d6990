"""The auction's inner loops, compiled by Numba on first use and cached on disk. They release the GIL.

This is a forward auction with epsilon scaling (Bertsekas, "The auction algorithm: a distributed relaxation method for
the assignment problem", 1988). Rows bid for columns. A bid raises the price of the row's best column by the margin over
its second best, plus epsilon; the previous owner of the column bids again. At the end of a phase, every row owns a
column within epsilon of its best, so the sum is within S times epsilon of the optimum. Prices carry over to the next
phase. Because prices only rise, columns below a threshold stay below it: a row's next bids need to check only the few
columns that were above it (its candidates).
"""

from __future__ import annotations

import numpy as np

from rsm_probe.matching.compiled.simd import (
    CANDIDATE_LANES,
    FEWEST_FOR_CANDIDATES,
    LANES,
    best_candidate,
    best_lanes,
    compiled,
    lanes_above,
    lowest_bit,
    lowest_value,
)
from rsm_probe.matching.compiled.sums import frobenius, sum_over, upper_bound

# The first epsilon as a share of the range of the affinities, and the factor between successive epsilons.
_FIRST, _SHRINK = 0.005, 8.0
# Rows sampled for the starting prices: enough to estimate the column means.
_SAMPLED = 256
# Candidates stored per row; they pay off if the best lies this many epsilons above the threshold.
_CANDIDATES = 64
_WORTHWHILE = 8.0

CERTIFIED, LOOSE, OUT_OF_BIDS = 0, 1, 2


@compiled
def solve_batch(affinities, scales, gap, bids_per_row, out, values, bounds, outcomes, bids):
    """Solve a batch of assignments.

    Args:
        affinities: (B, S, T), contiguous, finite; float32 affinities must lie below 1e30.
        scales: scale of the gap, (B,) float64: the product of the norms, or 0 if unknown.
        gap: allowed difference between bound and value, relative to the scale.
        bids_per_row: bids per row after which to give up.
        out: (B, S) int64, receives the column of each row, -1 for unmatched rows.
        values: (B,) float64, receives the sums.
        bounds: (B,) float64, receives the dual upper bounds; valid even if the bids ran out.
        outcomes: (B,) int64, receives CERTIFIED if the gap was reached, otherwise LOOSE or OUT_OF_BIDS.
        bids: (B,) int64, receives the number of bids.
    """
    rows, columns = affinities.shape[1], affinities.shape[2]
    size = max(rows, columns)
    fits = rows == columns and size % LANES == 0
    space = np.empty(0, affinities.dtype)
    for pair in range(len(affinities)):
        affinity = affinities[pair]
        live_rows, live_columns = _live_lines(affinity)
        n = max(len(live_rows), len(live_columns))
        if fits and len(live_rows) == rows and len(live_columns) == columns:
            square = affinity
        else:
            padded = (n + LANES - 1) // LANES * LANES
            space = space if len(space) >= n * padded else np.empty(n * padded, affinities.dtype)
            square = space[: n * padded].reshape(n, padded)
            _pad(affinity, live_rows, live_columns, square)
        owner, prices = np.arange(n), np.zeros(square.shape[1], square.dtype)
        values[pair], bounds[pair], outcomes[pair], bids[pair] = _solve(
            square, scales[pair], gap, bids_per_row, owner, prices
        )
        _report(owner, live_rows, live_columns, columns, out[pair])


@compiled
def dual_prices(affinity, gap, bids_per_row):
    """Compute column prices that certify the optimum of a square affinity up to a gap; see `solve_batch`."""
    n = len(affinity)
    square = np.empty((n, (n + LANES - 1) // LANES * LANES), affinity.dtype)
    _pad(affinity, np.arange(n), np.arange(n), square)
    prices = np.zeros(square.shape[1], affinity.dtype)
    _solve(square, 0.0, gap, bids_per_row, np.arange(n), prices)
    return prices[:n]


@compiled
def improve_windows(affinities, prices, epsilon, first, bids_per_row, positions):
    """Improve the pairs of windows, row i with column i, from the prices that an earlier round left.

    Only rows whose column is not within epsilon of their best at these prices bid. In the first round, all rows bid
    from the column means.

    Args:
        affinities: (B, n, n), contiguous, finite, of magnitudes that squares and differences keep in range.
        prices: prices of the columns, (B, n); changed in place, their mean over a window stays.
        epsilon: what a row may miss of its best; in the first round, a share of the range of the window.
        first: whether this is the first round.
        bids_per_row: bids per row after which a window keeps its pairs.
        positions: (B, n) int64, receives the column of each row; a window keeps its pairs if it gains nothing.
    """
    count, n = affinities.shape[0], affinities.shape[1]
    lines, remembering = np.arange(n), n if n >= FEWEST_FOR_CANDIDATES else 0
    square = np.empty((n, (n + LANES - 1) // LANES * LANES), affinities.dtype)
    held = np.empty((remembering, _CANDIDATES), affinities.dtype)
    named = np.empty((remembering, _CANDIDATES), np.int32)
    queue, thresholds = np.empty(n, np.int64), np.empty(n, affinities.dtype)
    current = np.zeros(square.shape[1], affinities.dtype)
    for k in range(count):
        if square.shape[1] > n:
            _pad(affinities[k], lines, lines, square)
        else:
            square = affinities[k]
        owner, counts, waiting, step = np.arange(n), np.zeros(n, np.int64), 0, epsilon
        before = 0.0
        if first:
            step = _FIRST * _start(square, current)
        else:
            current[:n] = prices[k]
            before = prices[k].sum()
        for i in range(n):
            if not first:
                best, _, _, _ = best_lanes(square, i, current)
            if first or best > square[i, i] - current[i] + affinities.dtype.type(step):
                owner[i] = -1
                queue[waiting] = i
                waiting += 1
        budget = bids_per_row * n
        waiting, _ = _bid(square, current, step, owner, queue, waiting, budget, held, named, counts, thresholds)
        positions[k] = lines
        if waiting > 0:
            continue
        gained, after = 0.0, 0.0
        for j in range(n):
            gained += np.float64(square[owner[j], j]) - np.float64(square[j, j])
            after += current[j]
        prices[k] = current[:n] + affinities.dtype.type((before - after) / n)
        if gained > 0:
            positions[k][owner] = lines


@compiled
def _live_lines(affinity):
    """Select the rows and columns to match; if nothing is negative, all-zero (dead) rows and columns are set aside.

    Matching dead rows with dead columns loses nothing: whenever a dead row is matched with a live column and a live row
    with a dead column, exchanging the partners gains the affinity of the live pair.
    """
    rows, columns = affinity.shape
    row_lives, column_lives = np.zeros(rows, np.bool_), np.zeros(columns, np.bool_)
    for i in range(rows):
        for j in range(columns):
            if affinity[i, j] != 0:
                row_lives[i] = True
                break
    if row_lives.all():
        return np.arange(rows), np.arange(columns)
    for i in range(rows):
        for j in range(columns):
            if affinity[i, j] < 0:
                return np.arange(rows), np.arange(columns)
            if affinity[i, j] > 0:
                column_lives[j] = True
    return np.flatnonzero(row_lives), np.flatnonzero(column_lives)


@compiled
def _pad(affinity, live_rows, live_columns, square):
    """Copy the live part, pad the smaller side with zeros, and fill up to a multiple of 64 with unwanted columns."""
    n, rows, columns = len(square), len(live_rows), len(live_columns)
    square[:, n:] = lowest_value(square)
    square[:rows, columns:n] = 0
    square[rows:, :n] = 0
    for a in range(rows):
        for b in range(columns):
            square[a, b] = affinity[live_rows[a], live_columns[b]]


@compiled
def _report(owner, live_rows, live_columns, columns, out):
    """Turn owners of live columns into columns of all rows; rows and columns set aside are matched with each other."""
    out[:] = -1
    free = np.ones(columns, np.bool_)
    for b in range(len(live_columns)):
        if owner[b] < len(live_rows):
            out[live_rows[owner[b]]] = live_columns[b]
            free[live_columns[b]] = False
    left = np.flatnonzero(free)
    taken = 0
    for row in range(len(out)):
        if out[row] < 0 and taken < len(left):
            out[row] = left[taken]
            taken += 1


@compiled
def _solve(affinity, scale, gap, bids_per_row, owner, prices):
    """Assign the first n columns of an (n, multiple of 64) matrix; return value, bound, outcome and bids."""
    n = len(affinity)
    if n == 0:
        return 0.0, 0.0, CERTIFIED, 0
    spread = _start(affinity, prices)
    if n == 1:
        value = sum_over(affinity, owner)
        return value, value, CERTIFIED, 0
    if spread == 0:
        # All assignments have the same value.
        prices[:n] = 0
        return sum_over(affinity, owner), upper_bound(affinity, prices), CERTIFIED, 0
    queue = np.empty(n, np.int64)
    remembering = n if n >= FEWEST_FOR_CANDIDATES else 0
    held = np.empty((remembering, _CANDIDATES), affinity.dtype)
    named = np.empty((remembering, _CANDIDATES), np.int32)
    counts, thresholds = np.zeros(n, np.int64), np.empty(n, affinity.dtype)
    # |x||y| is at least the Frobenius norm of the affinity, and at least the sum over any matching.
    norm = 0.0 if scale > 0 else frobenius(affinity)
    epsilon, bids = _FIRST * spread, 0
    while True:
        budget = bids_per_row * n - bids
        made = _phase(affinity, prices, epsilon, owner, queue, budget, held, named, counts, thresholds)
        bids += made
        if made == budget:
            return -np.inf, upper_bound(affinity, prices), OUT_OF_BIDS, bids
        value = sum_over(affinity, owner)
        allowed = gap * (scale if scale > 0 else max(norm, abs(value)))
        finest = min(gap * spread, 0.9 * allowed / n)
        if epsilon <= finest:
            bound = upper_bound(affinity, prices)
            return value, bound, CERTIFIED if bound - value <= allowed else LOOSE, bids
        epsilon = max(epsilon / _SHRINK, finest)


@compiled
def _start(affinity, prices):
    """Set prices to the (sampled) column means, and return the (sampled) range of the affinities."""
    n = len(affinity)
    step = max(1, n // _SAMPLED)
    while True:
        smallest, largest = affinity[0, :n].copy(), affinity[0, :n].copy()
        prices[:] = 0
        share = affinity.dtype.type(1 / len(range(0, n, step)))
        for i in range(0, n, step):
            for j in range(n):
                value = affinity[i, j]
                prices[j] += value * share
                smallest[j] = value if value < smallest[j] else smallest[j]
                largest[j] = value if value > largest[j] else largest[j]
        spread = float(largest.max()) - float(smallest.min())
        if spread > 0 or step == 1:
            return spread
        step = 1  # a constant sample does not prove that the whole is constant


@compiled
def _phase(affinity, prices, epsilon, owner, queue, budget, held, named, counts, thresholds):
    """Run one phase: rows bid until each owns a column. Return the number of bids, or the budget if it ran out."""
    n = len(affinity)
    owner[:] = -1
    for i in range(n):
        queue[i] = i
        counts[i] = max(counts[i], 0)
    waiting, bids = _bid(affinity, prices, epsilon, owner, queue, n, budget, held, named, counts, thresholds)
    return budget if waiting > 0 else bids


@compiled
def _bid(affinity, prices, epsilon, owner, queue, waiting, budget, held, named, counts, thresholds):
    """Let the first `waiting` rows of the queue bid, and the owners that they displace, until every row owns a column.

    Returns:
        The number of rows that still wait because the budget ran out, and the number of bids.
    """
    n = len(affinity)
    step = affinity.dtype.type(epsilon)
    head, bids = 0, 0
    while waiting > 0 and bids < budget:
        row = queue[head]
        remembered = counts[row] > 0
        if remembered:
            best, second, position = best_candidate(held, named, row, counts[row], prices)
            # All other columns are at most at the threshold. Using it as second best may overestimate that, which only
            # makes the bid smaller.
            remembered = best > thresholds[row]
            second = max(second, thresholds[row])
            column = np.int64(named[row, position])
        if not remembered:
            best, second, lane, threshold = best_lanes(affinity, row, prices)
            column, seen = lane, False
            for j in range(lane, n, LANES):
                value = affinity[row, j] - prices[j]
                if value == best and not seen:
                    column, seen = j, True
                elif value > second:
                    second = value
            counts[row] = min(counts[row], 0)
            if counts[row] == 0 and len(held) > 0 and best - threshold > _WORTHWHILE * step:
                counts[row] = _remember(affinity, row, prices, threshold, held, named)
                thresholds[row] = threshold
        raised = prices[column] + ((best - second) + step)
        # A rise below the resolution of the price must not be lost: two rows would outbid each other forever.
        if raised <= prices[column]:
            raised = np.nextafter(prices[column], affinity.dtype.type(np.inf))
        prices[column] = raised
        bids += 1
        head = head + 1 if head + 1 < n else 0
        waiting -= 1
        if owner[column] >= 0:
            tail = head + waiting
            queue[tail if tail < n else tail - n] = owner[column]
            waiting += 1
        owner[column] = row
    return waiting, bids


@compiled
def _remember(affinity, row, prices, threshold, held, named):
    """Store the columns above the threshold; return their number, padded for the vector unit, or -1 if too many."""
    count = 0
    for start in range(0, affinity.shape[1], LANES):
        bits = lanes_above(affinity, row, prices, start, threshold)
        while bits != 0:
            if count == held.shape[1]:
                return -1
            column = start + lowest_bit(bits)
            bits &= bits - np.uint64(1)
            held[row, count] = affinity[row, column]
            named[row, count] = column
            count += 1
    while count % CANDIDATE_LANES != 0:
        held[row, count] = lowest_value(held)
        named[row, count] = 0
        count += 1
    return count
