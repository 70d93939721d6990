"""Candidates of queries: only pairs whose bound puts them among the nearest are matched."""

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
from rsm_probe.matching.certificate import identity_partners
from rsm_probe.matching.matching import Pairs
from rsm_probe.matching.methods.identity import products_of_pairs
from rsm_probe.pairs.pair_loop import BlockSolver, solve_over
from rsm_probe.similarity.kernels import Kernel

# Most pairs in a CPU task: larger tasks gain nothing, however small the pairs.
_MOST_PAIRS = 256
# Two tasks use a device at a time: one solves while one prepares. More would take more of its memory.
_device_slots = threading.Semaphore(2)
# How much the rounding of tokens may add to a product, relative to the norms.
_ROUNDING = {"float32": 1e-5, "float16": 2e-3}


@dataclass
class Counts:
    """Counts of the work done. Seconds of affinities and matchings are summed over threads."""

    pairs: int = 0
    affinities: int = 0
    matchings: int = 0
    bound_seconds: float = 0.0
    affinity_seconds: float = 0.0
    matching_seconds: float = 0.0

    def add(self, other: Counts) -> None:
        """Add the counts of another part."""
        for part in fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))


@dataclass(frozen=True)
class Best:
    """The best images of every query, in descending order, and the work it took to find them.

    Attributes:
        index: (N, k), numbers in the database, -1 where candidates run out.
        products: (N, k), NaN where candidates run out.
        similarities: (N, k), NaN where candidates run out.
        counts: the work done.
    """

    index: np.ndarray
    products: np.ndarray
    similarities: np.ndarray
    counts: Counts

    @classmethod
    def joined(cls, parts: Sequence[Best]) -> Best:
        """Concatenate the queries of several parts."""
        counts = Counts()
        for best in parts:
            counts.add(best.counts)
        arrays = zip(*((best.index, best.products, best.similarities) for best in parts), strict=True)
        index, products, similarities = map(np.concatenate, arrays)
        return cls(index, products, similarities, counts)


class TopK:
    """The reduction of a search: known products, and the k-th best similarity of every query.

    Args:
        bounds: upper bounds of the similarities (n, M); -infinity for images that are not candidates.
        k: neighbours per query.

    Attributes:
        bounds: as given.
        products: (n, M) of the matched pairs, NaN elsewhere.
        kth_best: the k-th best similarity of each query so far (n,), which further pairs must reach.
    """

    def __init__(self, bounds: np.ndarray, k: int) -> None:
        self.bounds, self.products = bounds, np.full(bounds.shape, np.nan)
        self._best = np.full((len(bounds), k), -np.inf)
        self.kth_best = self._best.min(axis=1)

    def fill(self, start: int, products: np.ndarray, similarities: np.ndarray) -> None:
        """Store matched pairs (n, B) of a block of the database, NaN for the rest."""
        self.products[:, start : start + products.shape[1]][~np.isnan(products)] = products[~np.isnan(products)]
        both = np.concatenate([self._best, np.where(np.isnan(products), -np.inf, similarities)], axis=1)
        self._best = np.partition(both, products.shape[1], axis=1)[:, products.shape[1] :]
        self.kth_best = self._best.min(axis=1)


def rounded_up(products: np.ndarray, norms_x: np.ndarray, norms_y: np.ndarray, precision: str) -> np.ndarray:
    """Bounds of computed products (N, M), given bounds of exact ones and squared norms."""
    return products + _ROUNDING[precision] * np.sqrt(norms_x)[:, None] * np.sqrt(norms_y)[None]


@dataclass(frozen=True)
class Candidates:
    """Queries against a part of the database: pairs are matched unless the best affinities of locations rule them out.

    Attributes:
        solver: solves their pairs by one method; called in several threads at once.
        kernel: orders candidates.
        kth_best: the similarity that a pair must reach, for every query.
    """

    solver: BlockSolver
    kernel: Kernel
    kth_best: np.ndarray

    def match(self, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, Counts]:
        """Match the pairs that no bound rules out.

        Args:
            rows: (B,), the query of each pair.
            columns: (B,), the image in the part of the database.

        Returns:
            Which pairs were matched (B,), their products, and counts of the work done.
        """
        with one_thread():
            parts = list(in_halves(lambda start, stop: self._match(rows[start:stop], columns[start:stop]), len(rows)))
        counts = Counts()
        for _, _, done in parts:
            counts.add(done)
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]), counts

    def _match(self, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, Counts]:
        started = time.perf_counter()
        possible = np.ones(len(rows), bool)
        x, y = self.solver.x, self.solver.y
        ((label, method),) = self.solver.methods.items()
        with _device_slots if self.solver.affinities.on_device else nullcontext():
            block = self.solver.affinities.block(rows, columns, one_by_one=True)
            pairs = self.solver.pairs(label, block)
            del block
            if pairs.affinity is not None and method.one_to_one:
                bounds = _best_affinity_bounds(pairs.affinity) * (x.units[rows] * y.units[columns])
                norms = x.squared_norms[rows], y.squared_norms[columns]
                possible = _similarities(self.kernel, bounds, *norms, method.precision) >= self.kth_best[rows]
                pairs = pairs.selected(possible)
            halfway = time.perf_counter()
            products = np.empty(0)
            if len(pairs):
                # One pair at a time: its sum must not depend on the images beside it in memory.
                aligned = None if pairs.affinity is None else _aligned_products(pairs)
                units = x.units[pairs.rows] * y.units[pairs.columns]
                products = solve_over(method, pairs, aligned).values * units
        spent = halfway - started, time.perf_counter() - halfway
        return possible, products, Counts(0, len(possible), len(products), 0.0, *spent)


def _similarities(
    kernel: Kernel, bounds: np.ndarray, norms_x: np.ndarray, norms_y: np.ndarray, precision: str
) -> np.ndarray:
    """Upper bounds of the similarities of pairs (B,), given upper bounds of their products and squared norms."""
    parts = []
    for start in range(0, len(bounds), _MOST_PAIRS):
        part = slice(start, start + _MOST_PAIRS)
        # Kernels take all rows with all columns; pairs are on the diagonal.
        rounded = rounded_up(bounds[part, None], norms_x[part], norms_y[part], precision)
        parts.append(np.diagonal(kernel(rounded, norms_x[part], norms_y[part], same=False)))
    return np.concatenate(parts)


def _best_affinity_bounds(affinity: np.ndarray | Tensor) -> np.ndarray:
    """The sum of each location's best affinity (B,), from the side where it is smaller."""
    values = torch.as_tensor(affinity)
    _, rows, columns = values.shape
    of_rows, of_columns = values.amax(dim=2), values.amax(dim=1)
    # Surplus locations of the larger image may stay unmatched, which beats a negative affinity.
    if rows > columns:
        of_rows = of_rows.clamp(min=0)
    if columns > rows:
        of_columns = of_columns.clamp(min=0)
    sums = [part.sum(dim=1, dtype=torch.float64) for part in (of_rows, of_columns)]
    return torch.minimum(*sums).cpu().numpy()


def _aligned_products(pairs: Pairs) -> np.ndarray:
    """Inner products (B,) of whole images, computed where the tokens are and summed in float64."""
    x, y = pairs.images()
    if pairs.on_device:
        shared, device = min(x.count, y.count), x.tokens.device
        rows, columns = (torch.from_numpy(numbers).to(device) for numbers in (pairs.rows, pairs.columns))
        return products_of_pairs(x.tokens[rows, :shared], y.tokens[columns, :shared])
    # Lazy: importing Numba takes seconds.
    from rsm_probe.matching.compiled.loops import matched_products

    products = np.empty(len(pairs))
    partners = identity_partners(x.count, y.count)
    matched_products(x.on_cpu.numpy(), y.on_cpu.numpy(), pairs.rows, pairs.columns, partners, products)
    return products
