"""What a pair costs: a sample is timed before the work is begun."""

from __future__ import annotations

import time

import numpy as np
from torch import Tensor

from rsm_probe.execution.devices import in_halves
from rsm_probe.matching.matching import Locations, Matching, Pairs, solve_both_ways
from rsm_probe.matching.scaling import each_rescaled
from rsm_probe.pairs.affinities import served_alike

# A sample for an estimate is cut to this many locations; larger problems are extrapolated.
_SAMPLE_LOCATIONS = 512
# Pairs that are timed on a device, which they keep busy.
_ON_DEVICE = 4096


def seconds_per_pair(x: Tensor, method: Matching, samples: int = 3, at_once: int = 0) -> float:
    """Times a method on a few pairs of images, for an estimate of the whole.

    Args:
        x: tokens (N, S, C) of at least 2 images.
        method: any matching.
        samples: pairs to time; the mean counts.
        at_once: pairs that the work matches at once; so many are timed where a device matches them.

    Returns:
        Seconds for one pair, with its affinity: on one core, or of the device where it matches. Above 512 locations a
        part is timed and scaled by the method's growth.
    """
    if x.shape[1] == 1 or method.at_once:
        return 0.0
    scale = max(1.0, x.shape[1] / _SAMPLE_LOCATIONS) ** method.growth
    images = Locations(each_rescaled(x[:, :_SAMPLE_LOCATIONS].contiguous())[0])
    method.prepare(images)
    on_device = method.on_device(x.device, x.dtype, x.shape[1], at_once)
    ((source, _),) = served_alike({method.name: method}, images, images, at_once, on_device)
    rows, columns = np.tril_indices(len(x), -1)
    if source.on_device:  # which takes as long for one pair as for many
        count = min(at_once, source.gathered_per_block, _ON_DEVICE)
        parts = [(np.resize(rows, count), np.resize(columns, count))]
    else:
        parts = [(rows[k : k + 1], columns[k : k + 1]) for k in range(min(samples, len(rows)))]

    def solve(rows: np.ndarray, columns: np.ndarray) -> None:
        affinity = source.block(rows, columns, one_by_one=True).affinity()
        solve_both_ways(method, Pairs(rows, columns, images, images, affinity))

    def solve_all(rows: np.ndarray, columns: np.ndarray) -> None:
        list(in_halves(lambda start, stop: solve(rows[start:stop], columns[start:stop]), len(rows)))

    solve_all(*parts[0])  # what is compiled or prepared once must not count
    start = time.perf_counter()
    for part in parts:
        solve_all(*part)
    return (time.perf_counter() - start) / sum(len(rows) for rows, _ in parts) * scale
