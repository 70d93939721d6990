"""Bootstrap intervals of the CKA grids of a page, and of the difference between the two kinds of RSM."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

import numpy as np

from rsm_probe.comparison.grid import RsmKey
from rsm_probe.comparison.mini_batches import bootstrap_batch_samples
from rsm_probe.errors import ComparisonError
from rsm_probe.streaming.rsm_store import RsmStore

# Samples of the images, and the entries of RSMs that all of them may take.
_REPEATS, _FEWEST_REPEATS, _MOST_WORK = 200, 50, 4e9
# Entries of the RSMs of a mini-batch, and values of all samples, that are in memory at once.
_MOST_ENTRIES, _MOST_VALUES = 1e7, 1e7
_ENDS = (0.025, 0.975)
# What the RSMs of a group have in common: the first of these that makes the groups small enough.
_GROUPS = (attrgetter("kernel"), attrgetter("kernel", "model"), attrgetter("kernel", "model", "layer"))


@dataclass(frozen=True)
class Intervals:
    """95% bootstrap intervals of CKA between the RSMs of each of several groups, over images.

    Attributes:
        groups: keys of the RSMs of each group.
        ends: of a group of R RSMs, lower and upper ends (4, R, R): first of CKA between both RSMs; then, where both are
            semantic, of that CKA less the CKA between the spatio-semantic RSMs of the same layers. NaN where undefined.
        repeats: number of samples.
    """

    groups: Sequence[Sequence[RsmKey]] = ()
    ends: Sequence[np.ndarray] = ()
    repeats: int = 0

    def of(self, a: RsmKey, b: RsmKey) -> tuple[float, float] | None:
        """The interval of CKA between two RSMs, whose depths do not matter; None if there is none."""
        return self._between(a, b, 0)

    def of_change(self, a: RsmKey, b: RsmKey) -> tuple[float, float] | None:
        """The interval of CKA between two semantic RSMs less that between the spatio-semantic ones; None if none."""
        return self._between(a, b, 2)

    @property
    def row(self) -> np.ndarray:
        """All ends in one row."""
        return np.concatenate([np.empty(0), *(part.ravel() for part in self.ends)])

    @classmethod
    def from_row(cls, groups: Sequence[Sequence[RsmKey]], row: np.ndarray, repeats: int) -> Intervals:
        """Turn a `row` into intervals again.

        Raises:
            ValueError: the row is too short.
        """
        ends, start = list[np.ndarray](), 0
        for group in groups:
            shape = (4, len(group), len(group))
            stop = start + math.prod(shape)
            ends.append(row[start:stop].reshape(shape))
            start = stop
        return cls(groups, ends, repeats)

    @cached_property
    def _places(self) -> dict[RsmKey, tuple[int, int]]:
        return {
            key._replace(depth=0): (number, place)
            for number, keys in enumerate(self.groups)
            for place, key in enumerate(keys)
        }

    def _between(self, a: RsmKey, b: RsmKey, first: int) -> tuple[float, float] | None:
        one, other = (self._places.get(key._replace(depth=0)) for key in (a, b))
        if one is None or other is None or one == other or one[0] != other[0]:
            return None
        low, high = self.ends[one[0]][first : first + 2, one[1], other[1]].tolist()
        return (low, high) if np.isfinite([low, high]).all() else None


def bootstrap_intervals(store: RsmStore, keys: Sequence[RsmKey], measure: str, notes: list[str]) -> Intervals:
    """Draw the images of each mini-batch again and again, for all RSMs alike.

    Args:
        store: RSMs of all mini-batches.
        keys: those of the page.
        measure: CKA by the estimator of the sweep.
        notes: sentences of the page, to which this adds why there are no intervals, or only some.

    Returns:
        The intervals; none if they would take long.
    """
    most = int(min(np.sqrt(_MOST_VALUES / _REPEATS), _MOST_ENTRIES / max(store.sizes) ** 2))
    for common in _GROUPS:
        groups = _grouped(keys, common)
        if max(map(len, groups), default=0) <= most:
            break
    entries = sum(size**2 for size in store.sizes) * len(keys)
    repeats = int(min(_REPEATS, _MOST_WORK / max(1, entries)))
    if repeats < _FEWEST_REPEATS:
        notes.append("There are no bootstrap intervals: they would take long with so many images and layers.")
        return Intervals()
    if common is not _GROUPS[0]:
        within = "a model" if common is _GROUPS[1] else "a layer"
        notes.append(f"There are bootstrap intervals for RSMs of {within} only: others would take much memory.")
    number_of = {key._replace(depth=0): k for k, key in enumerate(store.keys)}
    ends = list[np.ndarray]()
    for group in groups:
        some = _Some(store, [number_of[key._replace(depth=0)] for key in group])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of RSMs without a value, which the sweep named
                samples = bootstrap_batch_samples(some, measure, repeats)
        except ComparisonError as error:
            notes.append(f"There are no bootstrap intervals: {error}.")
            return Intervals()
        ends.append(np.concatenate([np.quantile(part, _ENDS, axis=0) for part in (samples, _changes(samples, group))]))
    return Intervals(groups, ends, repeats)


def diagonal_interval(
    intervals: Intervals, model: str, layer: str, matching: str, kernel: str
) -> tuple[float, float] | None:
    """The interval of CKA between the semantic and the spatio-semantic RSM of a layer; None if there is none."""
    semantic = RsmKey(model, layer, 0, matching, kernel)
    return intervals.of(semantic, semantic._replace(matching="identity"))


class _Some:
    """Some RSMs of a store, as `bootstrap_batch_samples` takes them."""

    def __init__(self, store: RsmStore, numbers: Sequence[int]) -> None:
        self._store, self._numbers, self.sizes = store, numbers, store.sizes
        self.keys = [store.keys[k] for k in numbers]

    def rsms(self, batch: int, /) -> np.ndarray:
        """See `RsmBatches`."""
        return np.concatenate([self._store.rsms(batch, slice(k, k + 1)) for k in self._numbers])


def _grouped(keys: Sequence[RsmKey], common: attrgetter) -> list[list[RsmKey]]:
    groups = dict[str, list[RsmKey]]()
    for key in keys:
        groups.setdefault(common(key), []).append(key)
    return list(groups.values())


def _changes(samples: np.ndarray, keys: Sequence[RsmKey]) -> np.ndarray:
    """CKA between semantic RSMs of one matching less that between the spatio-semantic RSMs of the same layers."""
    changes = np.full_like(samples, np.nan)
    place = {key: k for k, key in enumerate(keys)}
    for matching in {key.matching for key in keys} - {"identity"}:
        both = [
            (k, place[aligned])
            for key, k in place.items()
            if key.matching == matching and (aligned := key._replace(matching="identity")) in place
        ]
        if both:
            semantic, identity = np.array(both).T
            cells = np.ix_(range(len(samples)), semantic, semantic)
            changes[cells] = samples[cells] - samples[:, identity[:, None], identity]
    return changes
