"""The auction of `cpu_auction` on a device: many pairs at once, one Triton program per pair.

A program keeps prices and column owners in registers from the first bid to the certificate, and reads affinities row
by row from global memory. Programs share nothing and need no synchronisation. A row that loses its column bids next;
this takes about as many bids as a queue, without its memory.

Without a device, Triton's interpreter runs the same code (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import triton
import triton.language as tl

# As on the CPU: the first epsilon as a share of the range of the affinities, and the factor between epsilons.
_FIRST = tl.constexpr(0.005)
_SHRINK = tl.constexpr(8.0)
# Below every affinity, but differences stay finite.
_LOWEST = tl.constexpr(-1e38)
_LOWEST_KEY = tl.constexpr(-(2**31))
# The smallest relative rise of a price, a few units in the last place. If rounding swallowed a rise, two rows would
# outbid each other forever.
_LEAST_RISE = tl.constexpr(2.4e-7)
# A code holds a column in its lower 16 bits and its owner plus one above them.
_OWNER = tl.constexpr(65536)
# Rounding error of float64 per summand of a bound, relative to the summed magnitudes.
_ROUNDING = tl.constexpr(2.0**-52)


@triton.jit
def _key(values):
    """Map float32 numbers to integers in the same order, because devices reduce integers faster; see `_number`."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _number(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def solve_pairs(
    affinities,
    scales,
    orders,
    aside,
    counts,
    permutations,
    values,
    bounds,
    bids_made,
    size,
    order_stride,
    gap,
    bids_per_row,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Solve the assignments of B affinities.

    Args:
        affinities: (B, size, size) float32, contiguous, finite.
        scales: scale of the gap, (B,) float64.
        orders: rows in order, (B, size) int32; those to be matched come first.
        aside: (B, size) int32, 1 for columns that are set aside.
        counts: number of rows, and of columns, to be matched, (B,) int32.
        permutations: (B, size) int32, receives the columns of the matched rows.
        values: (B,) float64, receives the sums, -infinity if the bids ran out.
        bounds: (B,) float64, receives the dual upper bounds, which are always valid.
        bids_made: (B,) int32, receives the number of bids; each reads one row.
        size: number of locations.
        order_stride: distance between the rows of `orders` and `aside`; 0 if all pairs share one row.
        gap: allowed difference between bound and value, relative to the scale.
        bids_per_row: bids per row after which to give up.
        BLOCK: a power of two, at least `size`.
    """
    pair = tl.program_id(0).to(tl.int64)
    affinity = affinities + pair * size * size
    order = orders + pair * order_stride
    count = tl.load(counts + pair)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    wanted = tl.load(aside + pair * order_stride + columns, mask=inside, other=1) == 0

    # Start prices at the column means.
    total = tl.zeros([BLOCK], tl.float32)
    low, high = tl.full([BLOCK], -_LOWEST, tl.float32), tl.full([BLOCK], _LOWEST, tl.float32)
    for k in range(count):
        row = tl.load(order + k)
        entries = tl.load(affinity + row * size + columns, mask=inside, other=0.0)
        total += entries
        low, high = tl.minimum(low, entries), tl.maximum(high, entries)
    largest = tl.max(tl.where(wanted, high, _LOWEST), 0)
    spread = largest - tl.min(tl.where(wanted, low, -_LOWEST), 0)
    # Unwanted columns are unaffordable, which is cheaper than a mask in every bid.
    prices = tl.where(wanted, total / tl.maximum(count, 1), -_LOWEST)

    allowed = (gap * tl.load(scales + pair)).to(tl.float32)
    finest = tl.minimum(gap * spread, 0.9 * allowed / tl.maximum(count, 1))
    epsilon = _FIRST * spread
    if spread <= 0:
        # All assignments have the same value, and one phase finds one of them.
        epsilon = gap * tl.maximum(tl.abs(largest), 1e-30)
        finest = epsilon

    # No column has an owner yet. Derived from loaded data, `unowned` (and so `codes`) has the thread layout of the
    # affinities; otherwise every bid would move codes through shared memory.
    unowned = tl.where(wanted, columns, -1)
    codes = unowned
    budget = bids_per_row * count
    bids, placed = 0, count
    running = count > 0
    while running:
        codes = unowned
        placed = 0
        row = tl.load(order)
        while (placed < count) & (bids < budget):
            keys = _key(tl.load(affinity + row * size + columns, mask=inside, other=0.0) - prices)
            best = tl.max(keys, 0)
            top_code = tl.max(tl.where(keys == best, codes, -1), 0)
            mine = codes == top_code
            second = _number(tl.max(tl.where(mine, _LOWEST_KEY, keys), 0))
            # A single column has no second best.
            ahead = tl.where(second > 0.5 * _LOWEST, _number(best) - second, 0.0)
            raised = tl.maximum(prices + (ahead + epsilon), prices + tl.abs(prices) * _LEAST_RISE)
            prices = tl.where(mine, raised, prices)
            codes = tl.where(mine, unowned + (row + 1) * _OWNER, codes)
            bids += 1
            loser = top_code // _OWNER - 1
            placed += (loser < 0).to(tl.int32)
            row = tl.where(loser < 0, tl.load(order + tl.minimum(placed, count - 1)), loser)
        running = (placed == count) & (epsilon > finest)
        epsilon = tl.maximum(epsilon / _SHRINK, finest)

    owners = codes // _OWNER - 1
    owned = owners >= 0
    value = tl.sum(tl.load(affinity + owners * size + columns, mask=owned, other=0.0).to(tl.float64), 0)
    # The dual value: prices, plus each row's best at these prices, plus an allowance for rounding.
    paid = tl.where(wanted, prices, 0.0).to(tl.float64)
    bound = tl.sum(paid, 0)
    magnitude = tl.sum(tl.abs(paid), 0)
    for k in range(count):
        row = tl.load(order + k)
        entries = tl.load(affinity + row * size + columns, mask=inside, other=0.0)
        best = tl.max(entries.to(tl.float64) - prices.to(tl.float64), 0)
        bound += best
        magnitude += tl.abs(best)
    bound += _ROUNDING * (count + 16) * magnitude

    tl.store(permutations + pair * size + owners, columns, mask=owned)
    tl.store(values + pair, tl.where(placed == count, value, float("-inf")))
    tl.store(bounds + pair, bound)
    tl.store(bids_made + pair, bids)


# Whether the program runs in Triton's interpreter, for tests that set TRITON_INTERPRET=1 before the import.
interpreted = not isinstance(solve_pairs, triton.JITFunction)
