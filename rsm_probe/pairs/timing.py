"""The cost of a pair, timed on a sample before the work starts."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rsm_probe.execution.amounts import format_bytes, format_seconds
from rsm_probe.execution.devices import in_halves
from rsm_probe.execution.execution import Execution
from rsm_probe.execution.executors import available_cores
from rsm_probe.matching.cpu_or_gpu import Workload
from rsm_probe.matching.demand import LONG, pair_seconds, remark
from rsm_probe.matching.matching import Locations, Matching, solve_both_ways
from rsm_probe.pairs.affinities import pairs_per_block
from rsm_probe.pairs.matcher import PairMatcher
from rsm_probe.pairs.pair_loop import BlockSolver
from rsm_probe.pairs.sides import Side

# Samples are cut to this many locations; the time of larger problems is extrapolated.
_SAMPLE_LOCATIONS = 1024
# Most pairs timed together: enough to keep a device busy.
_ON_DEVICE = 4096
# Seconds of solving on the CPU that are long enough to be typical of the work.
_LONG_ENOUGH = 0.05
# More pairs are timed where these are fewer than this part of all: estimating costs little where the work is short.
_LITTLE = 1 / 200
# Pairs of a timed block: larger blocks gain little per pair.
_MOST_ROWS = 32
# Images, and multiplications of their tokens, of methods that solve all pairs at once.
_TIMED_AT_ONCE, _TIMED_PRODUCTS = 64, 10**8
# Images whose pairs are timed.
_TIMED_IMAGES = 11
# Work is timed if it is this many times the pair that is timed first, which is then a hundredth of it, twice.
_TIMED_SHARE = 200


def seconds_per_pair(x: Tensor, method: Matching, samples: int = 3, at_once: int = 0) -> float:
    """Time a method on a few pairs of images, to estimate the whole work.

    Args:
        x: tokens (N, S, C) of at least 2 images.
        method: any matching.
        samples: fewest pairs to time on the CPU. Where pairs are fast, more are timed at once, as the work does.
        at_once: pairs that the work matches together; where a device solves them, as many are timed.

    Returns:
        Seconds per pair, including its affinity: on one core, or on the device where it solves the pairs. Above 1024
        locations, a part is timed and scaled by the growth of the method.
    """
    if x.shape[1] == 1 or method.at_once:
        return 0.0
    scale = max(1.0, x.shape[1] / _SAMPLE_LOCATIONS) ** method.growth
    side = Side.of(x[:, :_SAMPLE_LOCATIONS].contiguous())
    on_device = Workload(at_once, x.shape[1]).on_device(method, x.device, x.dtype)
    solver = BlockSolver.of(side, side, {method.name: method}, on_device)
    rows, columns = np.tril_indices(len(x), -1)
    most = min(max(at_once, samples), solver.affinities.gathered_per_block, _ON_DEVICE)
    count = most if on_device else min(samples, len(rows))  # a device takes as long for one pair as for many

    def solve(count: int) -> float:
        part = np.resize(rows, count), np.resize(columns, count)
        start = time.perf_counter()
        list(in_halves(lambda start, stop: solver.solve_gathered(*(side[start:stop] for side in part)), count))
        return time.perf_counter() - start

    new = True
    while True:
        if new:  # compilation and preparation must not count, and any pair may be the first that needs them
            solve(count)
        seconds = solve(count)
        if on_device or seconds >= _LONG_ENOUGH or count >= most:
            return seconds / count * scale
        new, count = count < len(rows), min(most, 4 * count)


def timing_matcher(execution: Execution) -> PairMatcher:
    """A matcher for timing pairs, with as many threads as will match them, but at most one per core."""
    return PairMatcher(replace(execution, workers=min(execution.worker_count, available_cores()), progress=False))


def core_seconds_per_pair(
    x: Tensor,
    method: Matching,
    matcher: PairMatcher,
    images: int,
    pairs: int,
    *,
    negligible: float = 0.0,
    grid: tuple[int, ...] | None = None,
) -> float:
    """Time pairs as `PairMatcher` solves them: blocks of the size of the work, in all threads at once.

    Args:
        x: tokens (N, S, C) of at least 2 images, in main memory.
        method: any matching.
        matcher: see `timing_matcher`.
        images: images that are matched with each other.
        pairs: pairs of the whole work, of which few are timed.
        negligible: seconds of the whole work that need not be known any better.
        grid: (H, W) of the locations, where known.

    Returns:
        Seconds per pair and thread, including its affinity and its share of the work per block; see `seconds_per_pair`.
    """
    threads = matcher.threads
    if method.at_once:  # in the calling thread
        count = max(2, min(images, _TIMED_AT_ONCE, math.isqrt(_TIMED_PRODUCTS // x[0].numel())))
        some = Locations(x[torch.arange(count) % len(x)], grid)
        start = time.perf_counter()
        method.products(some, some)
        return 2 * (time.perf_counter() - start) / (count * (count - 1)) * threads
    if x.shape[1] == 1:
        return 0.0
    scale = max(1.0, x.shape[1] / _SAMPLE_LOCATIONS) ** method.growth
    x = x[:, :_SAMPLE_LOCATIONS]
    # A block holds images against a single one: all after it, of which there are half of all on average.
    rows = max(1, min(images // 2, pairs_per_block(x, x), _MOST_ROWS))
    side, columns = Side.of(x[torch.arange(rows) % len(x)].contiguous()), min(threads, images)
    best = np.inf
    while True:
        part = Side.of(x[torch.arange(columns) % len(x)].contiguous())
        for _ in range(2):  # compilation must not count, and any pair may be the first that needs some
            start = time.perf_counter()
            matcher.submit(side, part, {method.name: method}).result()
            seconds = time.perf_counter() - start
            best = min(best, seconds / (rows * columns))
            if best * scale * pairs <= negligible:
                return best * threads * scale
        if seconds >= _LONG_ENOUGH / 2 or columns >= images or rows * columns >= _LITTLE * pairs:
            return best * threads * scale
        columns = min(images, 4 * columns)


def expected_seconds(x: Tensor, y: Tensor, method: Matching, pairs: int, execution: Execution) -> float:
    """Seconds of matching the pairs of two sets of images, from a few of them; 0 where timing these would count.

    Args:
        x: tokens (N, S, C) of at least one image in the rows.
        y: tokens (M, T, C) of at least one image in the columns.
        method: any matching.
        pairs: number of pairs.
        execution: how many workers match.
    """
    locations, entries = max(x.shape[1], y.shape[1]), x.shape[1] * y.shape[1]
    if method.at_once or pairs * entries < _TIMED_SHARE * min(locations, _SAMPLE_LOCATIONS) ** 2:
        return 0.0
    on_device = Workload(pairs, locations).on_device(method, x.device, x.dtype)
    workers = 1 if on_device else min(execution.worker_count, available_cores(), pairs)
    larger = x if x.shape[1] >= y.shape[1] else y
    if not on_device:
        one = larger[: min(2, len(larger))]
        seconds = pair_seconds(method, Locations(x[:1]), Locations(y[-1:])) * pairs / workers
        if len(one) < 2 or seconds < LONG / 4:
            return seconds
        with timing_matcher(execution) as matcher:
            seconds = core_seconds_per_pair(larger[:_TIMED_IMAGES], method, matcher, len(larger), pairs)
        return seconds * pairs / workers
    return seconds_per_pair(larger[:_TIMED_IMAGES], method, at_once=pairs) * pairs


def announce(execution: Execution, work: str, seconds: float, needed: int, about: str = "about") -> None:
    """Say what work takes before it starts: always with `progress`, else as a warning if it is long or large."""
    if execution.progress:
        time = f"{about} {format_seconds(seconds)} with {execution.worker_count} workers" if seconds else "little time"
        execution.say(f"{work}; {time}, at most {format_bytes(needed)} of memory")
    elif (text := remark(work, seconds, needed, about=about)) is not None:
        warnings.warn(text, stacklevel=4)


def time_methods(
    tokens: Tensor, grid: tuple[int, ...] | None, methods: Mapping[str, Matching]
) -> dict[str, tuple[float, float]]:
    """Match one pair of images by several methods in turn, in the calling thread.

    Args:
        tokens: (2, S, C), contiguous, in main memory.
        grid: (H, W) of the locations, where known.
        methods: label -> method.

    Returns:
        Label -> the matched inner product and the seconds of solving, without preparation and affinity.
    """
    side = Side.of(tokens, grid)
    solver = BlockSolver.of(side, side, methods, on_device=False)
    block = solver.affinities.block(np.array([0]), np.array([1]), one_by_one=True)
    timed = {}
    for label, method in methods.items():
        pairs = solver.pairs(label, block)
        start = time.perf_counter()
        value = solve_both_ways(method, pairs).values[0]
        timed[label] = float(value * side.units.prod()), time.perf_counter() - start
    return timed
