"""The search for nearest neighbours: bounds of all pairs, then matchings of those whose bound is high enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor

import numpy as np
import torch

from rsm_probe.errors import CostError
from rsm_probe.execution.amounts import format_bytes
from rsm_probe.execution.devices import token_bytes
from rsm_probe.execution.executors import one_thread
from rsm_probe.matching.bounds import Summaries
from rsm_probe.matching.matching import Matching
from rsm_probe.matching.methods.identity import aligned_products
from rsm_probe.matching.scaling import each_rescaled
from rsm_probe.neighbours.candidates import Best, Counts, Found, Hopeful, rounded_up
from rsm_probe.neighbours.database import BlockReader, Database, ImageBlock
from rsm_probe.pairs.affinities import Affinities
from rsm_probe.pairs.products import is_identity, match_tile
from rsm_probe.pairs.token_sets import Images, Picked, centred_tokens
from rsm_probe.similarity.centering import Centering
from rsm_probe.similarity.kernels import RBF, Closeness, Kernel, squared_distances

# Images of the database that show the directions of its spread.
_SAMPLE = 64
# Bytes of a pair while the median of all distances is found: its product, its distance, and a copy of that.
_PAIR_BYTES = 24

Groups = tuple[np.ndarray, np.ndarray]


class Search:
    """Queries against a database, both of which may be larger than memory.

    Args:
        queries: the queries.
        images: the database.
        method: the matching.
        kernel: what orders candidates. An RBF kernel without a width takes the median distance of all pairs, which are
            then all matched.
        centering: what is subtracted; the mean is the database's.
        memory: bytes that may be held.
        device: where affinities are computed.
        pool: threads that match.

    Attributes:
        counts: what was done so far.
        sigma2: the width that an RBF kernel was given, or None.

    Raises:
        CostError: there is no room for the distances of all pairs, of which the width is the median.
    """

    def __init__(
        self,
        queries: Images,
        images: Images,
        method: Matching,
        kernel: Kernel,
        centering: Centering | None,
        memory: int,
        device: torch.device,
        pool: Executor,
    ) -> None:
        self.queries, self.images, self.method, self.kernel = queries, images, method, kernel
        self.centering, self.memory, self.device, self.pool = centering, memory, device, pool
        self.counts, self.sigma2 = Counts(), None
        first = slice(0, 1)
        dtype = torch.promote_types(queries.tokens(first).dtype, images.tokens(first).dtype)
        some, _ = each_rescaled(centred_tokens(images, slice(0, min(_SAMPLE, len(images))), images, centering))
        locations = max(queries.shape[1], images.shape[1])
        self._summaries = Summaries.fit(some, locations)
        each = images.shape[1] * images.shape[2] * 4 + 8 * self._summaries.length
        at_once = max(1, memory // 16 // each)
        self._reading = BlockReader(images, centering, method, dtype, device, at_once)
        # What a device matches itself is read once and stays there, in blocks that hold many pairs.
        self.on_device = method.on_device(device, dtype, locations, len(queries) * len(images))
        size = max(1, token_bytes(device) // (4 * each)) if self.on_device else at_once
        room = token_bytes(device) if self.on_device else memory // 4
        self._database = Database(images, self._reading, self._summaries, size, room)
        self._order: Kernel = Closeness() if isinstance(kernel, RBF) else kernel
        self._products: np.ndarray | None = None  # of all pairs, where they had to be matched
        if isinstance(kernel, RBF) and kernel.sigma2 is None:
            self.sigma2 = self._median_distance()
            self.kernel = RBF(max(self.sigma2, float(np.finfo(np.float64).tiny)))

    def best(
        self,
        numbers: np.ndarray,
        k: int,
        own: Groups | None = None,
        candidates: Mapping[int, np.ndarray] | None = None,
        on_done: Callable[[int], object] = lambda count: None,
    ) -> Best:
        """The k best images of the database for some queries.

        Args:
            numbers: of the queries.
            k: how many, at most the size of the database.
            own: groups of queries and images; images of a query's own group are no candidates.
            candidates: number of a query -> the images to choose from; None for all.
            on_done: called with the number of queries whenever some are done.
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
            self.counts.pairs += int(allowed.sum())
            parts.append(self._best_of_block(part, allowed, k, on_done))
        return Best.joined(parts)

    def _blocks_of_queries(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Queries that are in memory together."""
        per_query = self.queries.shape[1] * self.queries.shape[2] * 8 + 8 * self._summaries.length
        step = max(1, self.memory // 4 // (per_query + 48 * len(self.images)))
        return np.split(numbers, range(step, len(numbers), step))

    def best_among(
        self, candidates: Sequence[np.ndarray], k: int, on_done: Callable[[int], object] = lambda count: None
    ) -> Best:
        """The k best of the candidates of every query; no other images are read.

        Args:
            candidates: for each query, the images to choose from.
            k: how many, at most the size of the database.
            on_done: called with the number of queries whenever some are done.
        """
        if self._products is not None:
            return self.best(np.arange(len(candidates)), k, None, dict(enumerate(candidates)), on_done)
        # As many queries at a time as keep all their candidates in memory.
        step = max(1, self._database.most_held * self._database.size // max(1, *map(len, candidates)))
        parts = []
        for start in range(0, len(candidates), step):
            own = candidates[start : start + step]
            union = np.unique(np.concatenate(own))
            found = Best(*(np.full((len(own), k), fill) for fill in (-1, np.nan, np.nan)))
            if len(union):
                images = Picked(self.images, union)  # type: ignore[arg-type]
                among = Search(
                    self.queries, images, self.method, self.kernel, self.centering, self.memory, self.device, self.pool
                )
                among.counts = self.counts
                local = {start + row: np.searchsorted(union, numbers) for row, numbers in enumerate(own)}
                best = among.best(np.arange(start, start + len(own)), min(k, len(union)), None, local, on_done)
                width = best.index.shape[1]
                found.index[:, :width] = np.where(best.index >= 0, union[best.index], -1)
                found.products[:, :width], found.similarities[:, :width] = best.products, best.similarities
            parts.append(found)
        return Best.joined(parts)

    def seconds_per_pair(self, allowed: float) -> float:
        """What a pair takes where all pairs are matched in tiles, on one core or the device, timed for some seconds."""
        numbers = [np.arange(min(64, len(images))) for images in (self.queries, self.images)]
        sides = zip((self.queries, self.images), numbers, strict=True)
        few = [self._reading.tokens(images, part).to(self.device) for images, part in sides]
        seconds = 0.0
        for count in (2, 16, 64):  # small tiles cost more for each of their pairs
            x, y = (tokens[:count] for tokens in few)
            if len(x) * len(y) * seconds > allowed:
                break
            with one_thread():
                started = time.perf_counter()
                match_tile(x, y, self.method, (self.queries.grid, self.images.grid), on_device=self.on_device)
                seconds = (time.perf_counter() - started) / (len(x) * len(y))
        return seconds

    def _best_of_block(
        self, numbers: np.ndarray, allowed: np.ndarray, k: int, on_done: Callable[[int], object]
    ) -> Best:
        block = self._reading.block(self.queries, numbers)
        if self._products is not None:
            products = self._products[numbers]
            on_done(len(products))
        elif is_identity(self.method, block.images, self._database.block(0).images) or self.method.at_once:
            products = self._all_products(block)
            on_done(len(products))
        else:
            products = self._matched_in_order(block, allowed, k, on_done)
        similarities = self._similarities(products, block, allowed)
        index = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
        chosen = np.take_along_axis(similarities, index, axis=1)
        there = chosen > -np.inf
        if isinstance(self.kernel, RBF):
            chosen = self.kernel.of_distances(-chosen)
        return Best(
            np.where(there, index, -1),
            np.where(there, np.take_along_axis(products, index, axis=1), np.nan),
            np.where(there, chosen, np.nan),
        )

    def _all_products(self, block: ImageBlock) -> np.ndarray:
        """Of some queries with the whole database (n, M)."""
        if not (is_identity(self.method, block.images, self._database.block(0).images) or self.method.at_once):
            everything = Found(np.full((len(block.images), len(self.images)), np.inf), len(self.images))
            rows, columns = np.indices(everything.bounds.shape).reshape(2, -1)
            self._match(block, rows, columns, everything)
            return everything.products
        products = np.empty((len(block.images), len(self.images)))
        for start in self._database.starts:
            other = self._database.block(start)
            if is_identity(self.method, block.images, other.images):
                part = aligned_products(block.images.tokens, other.images.tokens)
            else:
                part = self.method.products(block.images, other.images)
            products[:, start : start + len(other.norms)] = part * (block.units[:, None] * other.units)
        self.counts.matchings += products.size
        return products

    def _matched_in_order(
        self, block: ImageBlock, allowed: np.ndarray, k: int, on_done: Callable[[int], object]
    ) -> np.ndarray:
        """Products (n, M) of the pairs that had to be matched, NaN elsewhere."""
        started = time.perf_counter()
        found = Found(self._similarities(self._bounds(block), block, allowed), k)
        order = np.argsort(-found.bounds, axis=1, kind="stable")
        self.counts.bound_seconds += time.perf_counter() - started
        # Without a bound all come at once; with one, few first, so that the next know what they must exceed.
        size, place = k if self.method.one_to_one else len(self.images), 0
        waiting = np.arange(len(order))
        while len(waiting):
            following = order[waiting, place : place + size]
            worth = np.take_along_axis(found.bounds[waiting], following, axis=1)
            hopeful = (worth >= found.least[waiting, None]) & (worth > -np.inf)
            rows = np.repeat(waiting, hopeful.sum(axis=1))
            self._match(block, rows, following[hopeful], found)
            # Where the database is not held, each round reads much of it anew.
            place, size = place + size, 2 * size if self._database.all_held else len(self.images)
            before, waiting = len(waiting), waiting[hopeful[:, -1]] if place < len(self.images) else waiting[:0]
            on_done(before - len(waiting))
        return found.products

    def _match(self, block: ImageBlock, rows: np.ndarray, columns: np.ndarray, found: Found) -> None:
        """Matches pairs of queries and images, unless a bound shows that they are not good enough."""
        size = self._database.size
        for start in self._database.held_first(np.unique(columns // size) * size):
            inside = np.flatnonzero(columns // size == start // size)
            # What was found in other blocks may already show that these are not.
            inside = inside[found.bounds[rows[inside], columns[inside]] >= found.least[rows[inside]]]
            if not len(inside):
                continue
            other = self._database.block(start)
            reads, precision = self.method.needs_affinity, self.method.precision
            source = Affinities(block.images, other.images, self.on_device, reads, precision)
            hopeful = Hopeful(self.method, self._order, block, other, found.least, source)
            step, tasks = source.gathered_per_block, []
            for part in np.split(inside, range(step, len(inside), step)):
                tasks.append((part, self.pool.submit(hopeful.match, rows[part], columns[part] - start)))
            products = np.full((len(block.norms), len(other.norms)), np.nan)
            for part, task in tasks:
                kept, values, counts = task.result()
                products[rows[part[kept]], columns[part[kept]] - start] = values
                self.counts.add(counts)
            found.add(start, products, self._order(products, block.norms, other.norms, same=False))

    def _bounds(self, block: ImageBlock) -> np.ndarray:
        """What no matching exceeds, of all pairs of some queries with the database (n, M)."""
        bounds = np.full((len(block.images), len(self.images)), np.inf)
        summaries = block.summaries(self._summaries)
        for start in self._database.held_first(self._database.starts):
            if not self.method.one_to_one:
                self._database.block(start)  # its norms are known from now on
                continue
            others = self._database.summaries(start)
            part = slice(start, start + len(others))
            found, norms = (summaries @ others.T).cpu().numpy(), self._database.norms[part]
            bounds[:, part] = rounded_up(found, block.norms, norms, self.method.precision)
        return bounds

    def _similarities(self, products: np.ndarray, block: ImageBlock, allowed: np.ndarray) -> np.ndarray:
        """Of some queries with the database; -infinity where there is no product, or no candidate."""
        found = self._order(products, block.norms, self._database.norms, same=False)
        return np.where(allowed & ~np.isnan(products), found, -np.inf)

    def _median_distance(self) -> float:
        """Of all pairs, as in `rsm`. All are matched for it: by their bounds, nine of ten may lie on either side."""
        pairs = len(self.queries) * len(self.images)
        if _PAIR_BYTES * pairs > self.memory:
            size, room = format_bytes(_PAIR_BYTES * pairs), format_bytes(self.memory)
            raise CostError(
                f"the width of kernel='rbf' is the median distance of {pairs:,} pairs, which take {size}, above the "
                f"memory budget of {room}; give the width, as in RBF(sigma2=...)"
            )
        self._products = np.empty((len(self.queries), len(self.images)))
        norms = []
        for part in self._blocks_of_queries(np.arange(len(self.queries))):
            block = self._reading.block(self.queries, part)
            self._products[part] = self._all_products(block)
            norms.append(block.norms)
        return float(np.median(squared_distances(self._products, np.concatenate(norms), self._database.norms)))
