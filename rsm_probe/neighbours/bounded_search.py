"""The search for nearest neighbours: bounds of all pairs, then matchings of those whose bound is high enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rsm_probe.errors import CostError
from rsm_probe.execution.amounts import format_bytes
from rsm_probe.execution.devices import token_bytes
from rsm_probe.execution.execution import Execution
from rsm_probe.execution.executors import one_thread
from rsm_probe.matching.bounds import Summaries
from rsm_probe.matching.cpu_or_gpu import Workload
from rsm_probe.matching.matching import Matching
from rsm_probe.matching.methods.identity import aligned_products
from rsm_probe.matching.scaling import each_rescaled
from rsm_probe.neighbours.candidates import Best, Candidates, Counts, TopK, rounded_up
from rsm_probe.neighbours.database import BlockReader, Database, summaries_of
from rsm_probe.pairs.pair_loop import BlockSolver, match_sides, pairs_equal_locations
from rsm_probe.pairs.sides import Side
from rsm_probe.pairs.token_sets import TokenSet, TokenSubset, centred_tokens
from rsm_probe.similarity.centering import Centering
from rsm_probe.similarity.kernels import Kernel, squared_distances

# Images of the database whose principal directions the summaries use.
_SAMPLE = 64
# Bytes per pair while the median distance is computed: its product, its distance and a copy of the latter.
_PAIR_BYTES = 24

Groups = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class AllProducts:
    """Products of all pairs of queries and images, for searches that must match all of them.

    Attributes:
        products: (N, M).
        median_distance: of all pairs, squared.
        counts: the work done.
    """

    products: np.ndarray
    median_distance: float
    counts: Counts


class Search:
    """Queries against a database, both of which may be larger than memory.

    Args:
        queries: the queries.
        images: the database.
        method: the matching.
        kernel: orders candidates.
        centering: which mean of the database is subtracted.
        execution: where affinities are computed, and the memory budget.
        pool: threads that match.

    Attributes:
        on_device: whether the device solves the pairs.
    """

    def __init__(
        self,
        queries: TokenSet,
        images: TokenSet,
        method: Matching,
        kernel: Kernel,
        centering: Centering | None,
        execution: Execution,
        pool: Executor,
    ) -> None:
        self.queries, self.images, self.method, self.kernel = queries, images, method, kernel
        self.centering, self.execution, self.pool = centering, execution, pool
        self.memory, self.device = execution.memory_bytes, execution.device_or("cpu")
        first = slice(0, 1)
        dtype = torch.promote_types(queries.tokens(first).dtype, images.tokens(first).dtype)
        some, _ = each_rescaled(centred_tokens(images, slice(0, min(_SAMPLE, len(images))), images, centering))
        workload = Workload.of(queries.shape, images.shape)
        self._summaries = Summaries.fit(some, workload.locations)
        each = images.shape[1] * images.shape[2] * 4 + 8 * self._summaries.length
        at_once = max(1, self.memory // 16 // each)
        self._reader = BlockReader(images, centering, method, dtype, self.device, at_once)
        # A device that solves the pairs keeps the database, in blocks that hold many pairs.
        self.on_device = workload.on_device(method, self.device, dtype)
        size = max(1, token_bytes(self.device) // (4 * each)) if self.on_device else at_once
        room = token_bytes(self.device) if self.on_device else self.memory // 4
        self._identity = pairs_equal_locations(method, queries.shape[1], images.shape[1])
        self._at_once = self._identity or method.at_once
        self._database = Database(images, self._reader, self._summaries, size, room)

    def best(
        self,
        numbers: np.ndarray,
        k: int,
        own: Groups | None = None,
        candidates: Mapping[int, np.ndarray] | None = None,
        on_done: Callable[[int], object] = lambda count: None,
        known: AllProducts | None = None,
    ) -> Best:
        """The k best images of the database for some queries.

        Args:
            numbers: of the queries.
            k: number of images, at most the size of the database.
            own: groups of queries and images; images of a query's own group are not candidates.
            candidates: number of a query -> its candidates; None for all images.
            on_done: called with the number of queries whenever some are done.
            known: products of all pairs, where known; nothing is matched then.
        """
        parts = []
        for part in self._blocks_of_queries(numbers):
            allowed = np.ones((len(part), len(self.images)), bool)
            if candidates is not None:
                allowed[:] = False
                for row, number in enumerate(part):
                    allowed[row, candidates[int(number)]] = True
            if own is not None:
                allowed &= own[0][part][:, None] != own[1][None]
            counts = Counts(pairs=int(allowed.sum()))
            side = self._reader.block(self.queries, part)
            if known is not None:
                products = known.products[part]
            elif self._at_once:
                products = self._all_products(side, counts)
            else:
                products = self._matched_in_order(side, allowed, k, counts, on_done)
            if known is not None or self._at_once:
                on_done(len(part))
            similarities = self._similarities(products, side, allowed)
            index = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
            values, products = (np.take_along_axis(each, index, axis=1) for each in (similarities, products))
            there = values > -np.inf
            products, values = (np.where(there, each, np.nan) for each in (products, values))
            parts.append(Best(np.where(there, index, -1), products, values, counts))
        return Best.joined(parts)

    def best_among(
        self, candidates: Sequence[np.ndarray], k: int, on_done: Callable[[int], object] = lambda count: None
    ) -> Best:
        """The k best of the candidates of every query; only candidates are read.

        Args:
            candidates: for each query, the numbers of the images to compare.
            k: number of images, at most the size of the database.
            on_done: called with the number of queries whenever some are done.
        """
        # Process as many queries at a time as leave memory for all their candidates.
        step = max(1, self._database.most_held * self._database.size // max(1, *map(len, candidates)))
        parts = []
        for start in range(0, len(candidates), step):
            lists = candidates[start : start + step]
            union = np.unique(np.concatenate(lists))
            index, products, similarities = (np.full((len(lists), k), fill) for fill in (-1, np.nan, np.nan))
            counts = Counts()
            if len(union):
                among = {start + row: np.searchsorted(union, numbers) for row, numbers in enumerate(lists)}
                numbers, width = np.arange(start, start + len(lists)), min(k, len(union))
                inner = self._within(union).best(numbers, width, None, among, on_done)
                index[:, :width] = np.where(inner.index >= 0, union[inner.index], -1)
                products[:, :width], similarities[:, :width], counts = inner.products, inner.similarities, inner.counts
            parts.append(Best(index, products, similarities, counts))
        return Best.joined(parts)

    def match_all(self) -> AllProducts:
        """Match all pairs, for the median of their distances: bounds cannot place most pairs below or above it.

        Raises:
            CostError: the distances of all pairs exceed the memory.
        """
        pairs = len(self.queries) * len(self.images)
        if _PAIR_BYTES * pairs > self.memory:
            size, room = format_bytes(_PAIR_BYTES * pairs), format_bytes(self.memory)
            raise CostError(
                f"the width of kernel='rbf' is the median distance of {pairs:,} pairs, which take {size}, above the "
                f"memory budget of {room}; give the width, as in RBF(sigma2=...)"
            )
        products, norms, counts = np.empty((len(self.queries), len(self.images))), [], Counts()
        for part in self._blocks_of_queries(np.arange(len(self.queries))):
            side = self._reader.block(self.queries, part)
            products[part] = self._all_products(side, counts)
            norms.append(side.squared_norms)
        distances = squared_distances(products, np.concatenate(norms), self._database.norms)
        return AllProducts(products, float(np.median(distances)), counts)

    def few(self, count: int) -> list[Tensor]:
        """Centred tokens (n, S, C) of the first few queries, and of the first few images of the database."""
        sides = self.queries, self.images
        return [self._reader.tokens(side, np.arange(min(count, len(side)))).to(self.device) for side in sides]

    def seconds_per_pair(self, allowed: float) -> float:
        """Seconds per pair where all pairs are matched in tiles, on one core or the device, timed for some seconds."""
        few = self.few(64)
        grids, workload = (self.queries.grid, self.images.grid), Workload.of(self.queries.shape, self.images.shape)
        seconds = 0.0
        for count in (2, 16, 64):  # small tiles cost more per pair
            pairs = min(count, len(few[0])) * min(count, len(few[1]))
            if pairs * seconds > allowed:
                break
            with one_thread():
                started = time.perf_counter()
                x, y = (Side.of(part[:count].contiguous(), grid) for part, grid in zip(few, grids, strict=True))
                match_sides(x, y, self.method, workload)
                seconds = (time.perf_counter() - started) / pairs
        return seconds

    def _within(self, numbers: np.ndarray) -> Search:
        """The same search among some images of the database, whose numbers ascend."""
        images = TokenSubset(self.images, numbers)
        return Search(self.queries, images, self.method, self.kernel, self.centering, self.execution, self.pool)

    def _blocks_of_queries(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Split queries into blocks that fit into memory."""
        per_query = self.queries.shape[1] * self.queries.shape[2] * 8 + 8 * self._summaries.length
        step = max(1, self.memory // 4 // (per_query + 48 * len(self.images)))
        return np.split(numbers, range(step, len(numbers), step))

    def _all_products(self, side: Side, counts: Counts) -> np.ndarray:
        """Products (n, M) of some queries with the whole database."""
        if not self._at_once:
            everything = TopK(np.full((len(side), len(self.images)), np.inf), len(self.images))
            rows, columns = np.indices(everything.bounds.shape).reshape(2, -1)
            self._match(side, rows, columns, everything, counts)
            return everything.products
        products = np.empty((len(side), len(self.images)))
        for start in self._database.starts:
            block = self._database.block(start)
            if self._identity:
                part = aligned_products(side.tokens, block.tokens)
            else:
                part = self.method.products(side.locations, block.locations)
            products[:, start : start + len(block)] = part * (side.units[:, None] * block.units)
        counts.matchings += products.size
        return products

    def _matched_in_order(
        self, side: Side, allowed: np.ndarray, k: int, counts: Counts, on_done: Callable[[int], object]
    ) -> np.ndarray:
        """Match pairs in descending order of their bounds; return products (n, M), NaN where no matching was needed."""
        started = time.perf_counter()
        self._database.block(0)  # every pass starts here, whichever blocks the previous one left in memory
        top = TopK(self._similarities(self._bounds(side), side, allowed), k)
        order = np.argsort(-top.bounds, axis=1, kind="stable")
        counts.bound_seconds += time.perf_counter() - started
        # Without bounds, match all at once. With them, match a few first: the rest must exceed the k-th best of these.
        size, start = k if self.method.one_to_one else len(self.images), 0
        waiting = np.arange(len(order))
        while len(waiting):
            following = order[waiting, start : start + size]
            bounds = np.take_along_axis(top.bounds[waiting], following, axis=1)
            possible = (bounds >= top.kth_best[waiting, None]) & (bounds > -np.inf)
            self._match(side, np.repeat(waiting, possible.sum(axis=1)), following[possible], top, counts)
            # Where the database exceeds the memory, each round rereads much of it.
            start, size = start + size, 2 * size if self._database.all_held else len(self.images)
            before, waiting = len(waiting), waiting[possible[:, -1]] if start < len(self.images) else waiting[:0]
            on_done(before - len(waiting))
        return top.products

    def _match(self, side: Side, rows: np.ndarray, columns: np.ndarray, top: TopK, counts: Counts) -> None:
        """Match pairs of queries and images, except those that a bound rules out."""
        size, methods = self._database.size, {self.method.name: self.method}
        for start in self._database.held_first(np.unique(columns // size) * size):
            inside = np.flatnonzero(columns // size == start // size)
            # Pairs matched in earlier blocks may already rule these out.
            inside = inside[top.bounds[rows[inside], columns[inside]] >= top.kth_best[rows[inside]]]
            if not len(inside):
                continue
            block = self._database.block(start)
            solver = BlockSolver.of(side, block, methods, self.on_device)
            candidates = Candidates(solver, self.kernel, top.kth_best)
            step, tasks = solver.affinities.gathered_per_block, []
            for part in np.split(inside, range(step, len(inside), step)):
                tasks.append((part, self.pool.submit(candidates.match, rows[part], columns[part] - start)))
            products = np.full((len(side), len(block)), np.nan)
            for part, task in tasks:
                near, values, done = task.result()
                products[rows[part[near]], columns[part[near]] - start] = values
                counts.add(done)
            top.fill(start, products, self.kernel(products, side.squared_norms, block.squared_norms, same=False))

    def _bounds(self, side: Side) -> np.ndarray:
        """Upper bounds of any matching (n, M), for all pairs of some queries with the database."""
        bounds = np.full((len(side), len(self.images)), np.inf)
        summaries = summaries_of(side, self._summaries)
        for start in self._database.held_first(self._database.starts):
            if not self.method.one_to_one:
                self._database.block(start)  # its norms are known from now on
                continue
            others = self._database.summaries(start)
            part = slice(start, start + len(others))
            products, norms = (summaries @ others.T).cpu().numpy(), self._database.norms[part]
            bounds[:, part] = rounded_up(products, side.squared_norms, norms, self.method.precision)
        return bounds

    def _similarities(self, products: np.ndarray, side: Side, allowed: np.ndarray) -> np.ndarray:
        """Similarities (n, M) to the database; -infinity for unknown products and images that are not candidates."""
        values = self.kernel(products, side.squared_norms, self._database.norms, same=False)
        return np.where(allowed & ~np.isnan(products), values, -np.inf)
