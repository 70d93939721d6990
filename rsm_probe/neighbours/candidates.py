"""Pairs of queries and images: only those that may be good enough are matched."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from rsm_probe.execution.devices import in_halves
from rsm_probe.execution.executors import one_thread
from rsm_probe.matching.matching import Locations, Matching, Pairs
from rsm_probe.neighbours.database import ImageBlock
from rsm_probe.pairs.affinities import Affinities
from rsm_probe.pairs.products import solve_over
from rsm_probe.similarity.kernels import Kernel

# Pairs of a task for the CPU at most: more gain nothing, however small they are.
_MOST_PAIRS = 256
# Tasks on a device at a time: one works, and one prepares itself. More would want more of its memory.
_turns = threading.Semaphore(2)
# What affinities of rounded tokens may add to a product, relative to the norms.
_ROUNDING = {"float32": 1e-5, "float16": 2e-3}


@dataclass
class Counts:
    """What was done. Seconds of affinities and matchings are summed over threads."""

    pairs: int = 0
    affinities: int = 0
    matchings: int = 0
    bound_seconds: float = 0.0
    affinity_seconds: float = 0.0
    matching_seconds: float = 0.0

    def add(self, other: Counts) -> None:
        """Adds what another count holds."""
        for part in fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))


@dataclass(frozen=True)
class Best:
    """The best of every query, in descending order: places in the database, products and similarities (N, k)."""

    index: np.ndarray
    products: np.ndarray
    similarities: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Best]) -> Best:
        """That of the queries of several parts."""
        fields = zip(*((best.index, best.products, best.similarities) for best in parts), strict=True)
        return cls(*map(np.concatenate, fields))


class Found:
    """What is known of some queries and the whole database.

    Args:
        bounds: similarities (n, M) that no matching exceeds; -infinity of images that are no candidates.
        k: how many neighbours are wanted.

    Attributes:
        bounds: these.
        products: (n, M) of the pairs that were matched, NaN elsewhere.
        least: the k-th best similarity that each query has found (n,), which others must reach.
    """

    def __init__(self, bounds: np.ndarray, k: int) -> None:
        self.bounds, self.products = bounds, np.full(bounds.shape, np.nan)
        self._best = np.full((len(bounds), k), -np.inf)
        self.least = self._best.min(axis=1)

    def add(self, start: int, products: np.ndarray, similarities: np.ndarray) -> None:
        """Takes in what was matched of a block of the database, (n, B), NaN elsewhere."""
        self.products[:, start : start + products.shape[1]][~np.isnan(products)] = products[~np.isnan(products)]
        both = np.concatenate([self._best, np.where(np.isnan(products), -np.inf, similarities)], axis=1)
        self._best = np.partition(both, products.shape[1], axis=1)[:, products.shape[1] :]
        self.least = self._best.min(axis=1)


def rounded_up(products: np.ndarray, norms_x: np.ndarray, norms_y: np.ndarray, precision: str) -> np.ndarray:
    """Bounds of exact products (N, M) as bounds of those that are computed, given squared norms."""
    return products + _ROUNDING[precision] * np.sqrt(norms_x)[:, None] * np.sqrt(norms_y)[None]


@dataclass(frozen=True)
class Hopeful:
    """Queries against a part of the database: pairs are matched unless the best answers add up to too little.

    Attributes:
        method: any matching; called in several threads at once.
        kernel: what says how similar two images are.
        block: the queries.
        other: the part of the database.
        least: what a pair must reach, for every query of the block.
        source: the affinities of both.
    """

    method: Matching
    kernel: Kernel
    block: ImageBlock
    other: ImageBlock
    least: np.ndarray
    source: Affinities

    def match(self, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, Counts]:
        """Matches the hopeful ones of some pairs.

        Args:
            rows: (B,), the query of each pair.
            columns: (B,), the image in the part of the database.

        Returns:
            Which pairs were matched (B,), their products, and what was done.
        """
        with one_thread():
            found = list(in_halves(lambda start, stop: self._match(rows[start:stop], columns[start:stop]), len(rows)))
        counts = Counts()
        for _, _, done in found:
            counts.add(done)
        return np.concatenate([part[0] for part in found]), np.concatenate([part[1] for part in found]), counts

    def _match(self, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, Counts]:
        started = time.perf_counter()
        hopeful = np.ones(len(rows), bool)
        with _turns if self.source.on_device else nullcontext():
            affinity = self.source.block(rows, columns, one_by_one=True).affinity()
            if affinity is not None and self.method.one_to_one:
                bounds = _best_answers(affinity) * (self.block.units[rows] * self.other.units[columns])
                norms = self.block.norms[rows], self.other.norms[columns]
                hopeful = _similarities(self.kernel, bounds, *norms, self.method.precision) >= self.least[rows]
                rows, columns = rows[hopeful], columns[hopeful]
                kept = torch.from_numpy(hopeful).to(affinity.device) if isinstance(affinity, Tensor) else hopeful
                affinity = affinity[kept]
            halfway = time.perf_counter()
            values = self._products(rows, columns, affinity) if len(rows) else np.empty(0)
        spent = halfway - started, time.perf_counter() - halfway
        return hopeful, values, Counts(0, len(hopeful), len(rows), 0.0, *spent)

    def _products(self, rows: np.ndarray, columns: np.ndarray, affinity: np.ndarray | Tensor | None) -> np.ndarray:
        x, y, aligned = self.block.images, self.other.images, np.empty(0)
        if affinity is not None:
            # One pair at a time: what two images add up to must not depend on who stands beside them in memory.
            aligned = _aligned_products(x, rows, y, columns, isinstance(affinity, Tensor))
        found = solve_over(self.method, Pairs(rows, columns, x, y, affinity), aligned)
        return found.values * (self.block.units[rows] * self.other.units[columns])


def _similarities(
    kernel: Kernel, bounds: np.ndarray, norms_x: np.ndarray, norms_y: np.ndarray, precision: str
) -> np.ndarray:
    """What pairs of such squared norms (B,) reach at most, given what no matching exceeds (B,)."""
    found = []
    for start in range(0, len(bounds), _MOST_PAIRS):
        part = slice(start, start + _MOST_PAIRS)
        # Kernels take all rows with all columns; pairs are on the diagonal.
        rounded = rounded_up(bounds[part, None], norms_x[part], norms_y[part], precision)
        found.append(np.diagonal(kernel(rounded, norms_x[part], norms_y[part], same=False)))
    return np.concatenate(found)


def _best_answers(affinity: np.ndarray | Tensor) -> np.ndarray:
    """What each location's best answer adds up to, seen from the side where that is less (B,)."""
    values = torch.as_tensor(affinity)
    _, rows, columns = values.shape
    of_rows, of_columns = values.amax(dim=2), values.amax(dim=1)
    # Surplus locations of the larger image may stay without an answer, which is better than a negative one.
    if rows > columns:
        of_rows = of_rows.clamp(min=0)
    if columns > rows:
        of_columns = of_columns.clamp(min=0)
    sums = [part.sum(dim=1, dtype=torch.float64) for part in (of_rows, of_columns)]
    return torch.minimum(*sums).cpu().numpy()


def _aligned_products(x: Locations, rows: np.ndarray, y: Locations, columns: np.ndarray, on_device: bool) -> np.ndarray:
    """Inner products (B,) of pairs of images whose equal locations answer to each other, added up in float64."""
    shared = min(x.count, y.count)
    if on_device:
        numbers = [torch.from_numpy(part).to(x.tokens.device) for part in (rows, columns)]
        each = x.tokens[numbers[0], :shared].mul_(y.tokens[numbers[1], :shared])
        # Over channels in float32: a sum of float32 numbers in float64 would first copy them all.
        return each.sum(dim=2).sum(dim=1, dtype=torch.float64).cpu().numpy()
    # Numba takes seconds to load, and whoever never matches should not wait for it.
    from rsm_probe.matching.compiled.loops import matched_products

    same, aligned = np.arange(x.count), np.empty(len(rows))
    same = np.where(same < shared, same, -1)
    matched_products(x.on_cpu.numpy(), y.on_cpu.numpy(), rows, columns, same, aligned)
    return aligned
