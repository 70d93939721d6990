"""Bootstrap intervals of CKA for the page of a sweep: how much its values depend on which images were taken."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rsm_probe.comparison.alignment import get_estimator
from rsm_probe.comparison.grid import RsmKey
from rsm_probe.comparison.mini_batches import bootstrap_batch_samples
from rsm_probe.errors import ComparisonError
from rsm_probe.streaming.result import SweepResult
from rsm_probe.streaming.rsm_store import RsmStore
from rsm_probe.studies.sweep_report.shown import Interval

# Bootstrap samples, and the entries of RSMs that all of them may take.
_REPEATS, _FEWEST_REPEATS, _MOST_WORK = 200, 50, 4e9
# Bytes of RSMs in memory at once, and of samples of a grid, beyond which only the diagonal has intervals; cells of all
# grids on a page, each of which takes about 40 bytes of the page.
_MOST_BYTES, _MOST_CELLS = 400e6, 60_000
_LEVEL = 0.95
DIAGONAL_ONLY = (
    "With so many layers, only CKA between the two RSMs of one layer has a bootstrap interval; the cells of the grids "
    "do not."
)


@dataclass(frozen=True)
class Intervals:
    """Intervals of a sweep.

    Attributes:
        diagonal: of CKA between the semantic and the spatio-semantic RSM of each layer.
        repeats: bootstrap samples; 0 where there are no intervals.
        cells: ends of the intervals of CKA between any two RSMs of a kernel, (R, R, 2); NaN where there is none, and
            (0,) where only the diagonal has intervals.
        differences: ends of the intervals of semantic minus spatio-semantic CKA between any two layers, (R, R, 2), at
            their semantic RSMs; NaN and (0,) as above.
        note: what is missing, as a sentence; "" if nothing is.
    """

    diagonal: Sequence[Interval] = ()
    repeats: int = 0
    cells: np.ndarray = field(default_factory=lambda: np.empty(0))
    differences: np.ndarray = field(default_factory=lambda: np.empty(0))
    note: str = ""


class _Few:
    """Some RSMs of a store, as `bootstrap_batch_samples` takes them."""

    def __init__(self, store: RsmStore, numbers: Sequence[int]) -> None:
        self._store, self._numbers, self.sizes = store, numbers, store.sizes
        self.keys = [store.keys[k] for k in numbers]

    def rsms(self, batch: int, /) -> np.ndarray:
        """See `RsmBatches`."""
        return np.concatenate([self._store.rsms(batch, slice(k, k + 1)) for k in self._numbers])


def intervals_of(
    store: RsmStore, keys: Sequence[RsmKey], number_of: Mapping[RsmKey, int], semantic: str, result: SweepResult
) -> Intervals:
    """Draw images within mini-batches; no intervals where they take too long.

    Args:
        store: the RSMs of the sweep.
        keys: RSMs on the page, R of them.
        number_of: numbers of RSMs in the store by their keys with depth 0.
        semantic: the semantic matching of the pairs on the page; "" for none.
        result: the sweep, whose first estimator is taken.
    """
    of_both = [key for key in keys if semantic and key.matching in (semantic, "identity")]
    entries = sum(size**2 for size in store.sizes) * len(of_both)
    repeats = int(min(_REPEATS, _MOST_WORK / max(1, entries)))
    if not of_both:
        return Intervals()
    if repeats < _FEWEST_REPEATS:
        return Intervals(note="There are no bootstrap intervals: with so many images and layers, they would take long.")
    groups = [[key for key in of_both if key.kernel == kernel] for kernel in dict.fromkeys(k.kernel for k in of_both)]
    whole = _affordable(store, groups, repeats)
    if not whole:
        groups = [[key, key._replace(matching="identity")] for key in of_both if key.matching == semantic]
    measure = get_estimator(result.dataset.attrs["estimator"]).measure
    place = {key: k for k, key in enumerate(keys)}
    cells, differences = (np.full((len(keys), len(keys), 2), np.nan, np.float32) for _ in range(2))
    for group in groups:
        few = _Few(store, [number_of[key._replace(depth=0)] for key in group])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of RSMs without a value, which the sweep named
                samples = bootstrap_batch_samples(few, measure, repeats)
                at = [place[key] for key in group]
                cells[np.ix_(at, at)] = _ends(samples)
                if whole:
                    matched = [k for k, key in enumerate(group) if key.matching == semantic]
                    aligned = [group.index(group[k]._replace(matching="identity")) for k in matched]
                    at = [place[group[k]] for k in matched]
                    changes = samples[:, matched][:, :, matched] - samples[:, aligned][:, :, aligned]
                    differences[np.ix_(at, at)] = _ends(changes)
        except ComparisonError as error:
            return Intervals(note=f"There are no bootstrap intervals: {error}.")
    diagonal = []
    for key in (key for key in of_both if key.matching == semantic):
        a, b = place[key], place[key._replace(matching="identity")]
        value, (low, high) = _value(result, key), cells[a, b].tolist()
        if np.isfinite([value, low, high]).all():
            diagonal.append(Interval(key.model, key.layer, semantic, key.kernel, value, low, high))
    if whole:
        return Intervals(diagonal, repeats, cells, differences)
    return Intervals(diagonal, repeats, note=DIAGONAL_ONLY)


def _affordable(store: RsmStore, groups: Sequence[Sequence[RsmKey]], repeats: int) -> bool:
    """Whether all RSMs of a kernel fit into memory at once, and the intervals of their cells into a page."""
    most = max(map(len, groups))
    in_memory = 8 * most * max(max(store.sizes) ** 2, repeats * most)
    return in_memory <= _MOST_BYTES and sum((len(group) // 2) ** 2 for group in groups) <= _MOST_CELLS


def _ends(samples: np.ndarray) -> np.ndarray:
    """Both ends of the intervals of samples (repeats, A, B), as (A, B, 2)."""
    quantile = np.nanquantile if np.isnan(samples).any() else np.quantile  # the former is much slower
    return np.moveaxis(quantile(samples, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], axis=0), 0, -1)


def _value(result: SweepResult, key: RsmKey) -> float:
    """CKA between the semantic and the spatio-semantic RSM of a layer."""
    depth = result.layers(key.model).index(key.layer)
    return float(result.grid(key.model, key.model, key.matching, "identity", kernel=key.kernel).values[depth, depth])
