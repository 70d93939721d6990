"""The pair loop: affinities on the device, matching in worker threads or by its kernel, bounded queues between."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from rsm_probe.checks import require_whole
from rsm_probe.errors import CostError
from rsm_probe.execution.amounts import parse_bytes
from rsm_probe.execution.devices import block_bytes, require_memory
from rsm_probe.matching.matching import Locations, Matching, Pairs
from rsm_probe.matching.methods.identity import aligned_products, squared_norms
from rsm_probe.matching.scaling import each_rescaled
from rsm_probe.pairs.affinities import Affinities, Block, pairs_per_block, served_alike
from rsm_probe.pairs.products import affinity_bytes, is_identity, solve_over


class PairMatcher:
    """Computes matched inner products of all pairs of images, for several matchings at once.

    Args:
        workers: CPU threads that match; None for one per available core. The result does not depend on it.
        memory: bytes, or text such as "1GB": how much the affinities waiting for CPU threads may occupy; one block of
            8 MB may always wait. Those that a device matches itself take a quarter of its memory at most.
        on_pairs: called with the number of pairs whenever some are done.
    """

    def __init__(
        self,
        workers: int | None = None,
        memory: str | int = "1GB",
        on_pairs: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.workers = available_cores() if workers is None else workers
        self.memory = parse_bytes(memory)
        require_whole(self.workers, "workers", 1, CostError)
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="rsm-probe-match", initializer=_one_thread)
        self._on_pairs = on_pairs
        self._queue = _Queue(self.memory)
        self._device_queues: dict[torch.device, _Queue] = {}
        self._counting = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(
        self,
        x: Tensor,
        y: Tensor | None,
        methods: Mapping[str, Matching],
        grid: tuple[int, ...] | None = None,
    ) -> PendingProducts:
        """Starts the matching of all pairs; blocks while the queue is full.

        Args:
            x: tokens (N, S, C), finite.
            y: tokens (M, T, C), finite, or None for the pairs within x (each unordered pair is matched once).
            methods: label -> method.
            grid: (H, W) of the locations, for methods that move along it.

        Returns:
            A handle whose `result()` gives label -> (N, M) matched inner products.

        Raises:
            CostError: one affinity alone exceeds the memory budget.
            MatchingError: a method cannot work on these locations.
        """
        # A layer may be taken up within the forward pass of a model that runs in half precision: we do not.
        with torch.autocast(x.device.type, enabled=False):
            return self._submit(x, None if y is x else y, methods, grid)

    def _submit(
        self, x: Tensor, y: Tensor | None, methods: Mapping[str, Matching], grid: tuple[int, ...] | None
    ) -> PendingProducts:
        columns = len(x if y is None else y)
        require_memory(
            8 * len(methods) * len(x) * columns,
            f"the similarity of {len(x)} x {columns} images",
            "take fewer images, or all_pairs(..., out=), which keeps it on disk",
        )
        scaled_x, units_x = each_rescaled(x)
        scaled_y, units_y = (scaled_x, units_x) if y is None else each_rescaled(y.to(x))
        left = Locations(scaled_x, grid)
        right = left if y is None else Locations(scaled_y, grid)
        # The same numbers, to the last bit, for all that is measured against them.
        aligned = cache(lambda: aligned_products(scaled_x, scaled_y))
        products: dict[str, np.ndarray] = {}
        unsolved: dict[str, Matching] = {}
        for label, method in methods.items():
            if is_identity(method, left, right):
                products[label] = aligned()
            elif method.at_once:
                products[label] = method.products(left, right)
            else:
                products[label] = np.zeros((len(left), len(right)))
                unsolved[label] = method
        norms_x = squared_norms(scaled_x)
        norms_y = norms_x if y is None else squared_norms(scaled_y)
        pending = PendingProducts(products, (units_x, units_y), (norms_x, norms_y), methods)
        if not unsolved:
            self._count(_pair_count(left, right))
            return pending
        # What is done at once reads tokens as they lie; what follows works on many pairs of them.
        left = Locations(scaled_x.contiguous(), grid)
        right = left if y is None else Locations(scaled_y.contiguous(), grid)
        for method in unsolved.values():
            method.prepare(left)
            method.prepare(right)
        sizes = [affinity_bytes(method, left.tokens, right.tokens, self.memory) for method in unsolved.values()]
        base = aligned() if any(sizes) else np.empty((0, 0))
        diagonal = any(not method.one_to_one for method in unsolved.values())
        groups = served_alike(unsolved, left, right, _pair_count(left, right))
        for source, alike in groups:
            match = partial(self._match_block, (left, right), alike, base, products, alike is groups[-1][1])
            for numbers in source.all_pairs(diagonal):
                pending.futures += self._submit_block(source, *numbers, match)
        return pending

    def _submit_block(
        self, source: Affinities, rows: np.ndarray, columns: np.ndarray, match: Callable[[list[Block]], None]
    ) -> list[Future[None]]:
        """Has the affinities of some pairs made and matched, when there is room for them."""
        queue, whole, sizes = self._queue_of(source), len(rows) * source.pair_bytes, [0]
        submitted: list[Future[None]] = []
        queue.reserve(whole)
        try:
            for block in source.start(rows, columns, lambda: queue.wait_for_others(whole - sum(sizes))):
                sizes.append(len(block) * source.pair_bytes)
                work = self._pool.submit(match, [block])
                # Not at the end of the work itself: what is cancelled never ends, but is done all the same.
                work.add_done_callback(lambda _, size=sizes[-1]: queue.release(size))  # type: ignore[misc]
                submitted.append(work)
                del block  # or it would stay in memory until the next one is there
        finally:  # of a device that is out of memory, for one: whoever tries again needs the place
            queue.release(whole - sum(sizes))
        return submitted

    def _queue_of(self, source: Affinities) -> _Queue:
        """What waits on a device is bounded by two of its blocks, what waits for the CPU by the memory."""
        if not source.on_device:
            return self._queue
        return self._device_queues.setdefault(source.device, _Queue(2 * block_bytes(source.device)))

    def _match_block(
        self,
        images: tuple[Locations, Locations],
        methods: Mapping[str, Matching],
        aligned: np.ndarray,
        out: dict[str, np.ndarray],
        last: bool,
        blocks: list[Block],
    ) -> None:
        block = blocks.pop()  # whoever submitted it holds it no more: its memory is free when this ends
        pairs = Pairs(block.rows, block.columns, *images, block.affinity())
        places = pairs.rows, pairs.columns
        for label, method in methods.items():
            out[label][places] = solve_over(method, pairs, aligned[places] if aligned.size else aligned).values
        if last:
            self._count(int(np.count_nonzero((pairs.rows != pairs.columns) | (images[0] is not images[1]))))

    def _count(self, pairs: int) -> None:
        with self._counting:
            self._on_pairs(pairs)


class _Queue:
    """Bytes that wait to be matched: at most so many, unless one block alone is larger."""

    def __init__(self, most: int) -> None:
        self.most, self.waiting = most, 0
        self._freed = threading.Condition()

    def reserve(self, size: int) -> None:
        """Waits until there is room."""
        with self._freed:
            self._freed.wait_for(lambda: not self.waiting or self.waiting + size <= self.most)
            self.waiting += size

    def release(self, size: int) -> None:
        """Gives room back."""
        with self._freed:
            self.waiting -= size
            self._freed.notify_all()

    def wait_for_others(self, own: int) -> bool:
        """Waits until nothing waits but what one holds oneself; says whether there was anything."""
        with self._freed:
            others = self.waiting > own
            self._freed.wait_for(lambda: self.waiting <= own)
        return others


class PendingProducts:
    """Matched inner products that worker threads are filling in.

    Attributes:
        squared_norms: |z_i|^2 of the images in the rows (N,) and in the columns (M,), which are the same array for the
            pairs within one set.
    """

    def __init__(
        self,
        products: dict[str, np.ndarray],
        units: tuple[np.ndarray, np.ndarray],
        norms: tuple[np.ndarray, np.ndarray],
        methods: Mapping[str, Matching],
    ) -> None:
        self.futures: list[Future[None]] = []
        self._products = products
        self._units = units[0][:, None] * units[1]
        self._norms = norms
        rows = norms[0] * units[0] ** 2
        self.squared_norms = rows, rows if norms[1] is norms[0] else norms[1] * units[1] ** 2
        self._methods = methods

    def result(self) -> dict[str, np.ndarray]:
        """Waits for the workers; label -> (N, M) float64, symmetric where both sets were the same images.

        Raises:
            Exception: whatever a worker raised; its remaining blocks are cancelled.
        """
        try:
            for future in self.futures:
                future.result()
        except BaseException:
            for future in self.futures:
                future.cancel()
            raise
        self.futures = []
        # What workers set for themselves, PyTorch also takes as the default of threads that others start later.
        torch.set_num_threads(torch.get_num_threads())
        return {label: self._completed(label) * self._units for label in self._products}

    def _completed(self, label: str) -> np.ndarray:
        products = self._products[label]
        if self._norms[1] is not self._norms[0]:
            return products
        products = np.tril(products) + np.tril(products, -1).T
        if self._methods[label].one_to_one:  # an image matches itself location by location
            np.fill_diagonal(products, self._norms[0])
        return products


def _pair_count(x: Locations, y: Locations) -> int:
    return len(x) * (len(x) - 1) // 2 if y is x else len(x) * len(y)


def queue_bytes(x: Tensor, memory: int) -> int:
    """How much of a memory budget the affinities of a layer can really fill."""
    block = pairs_per_block(x, x) * x.shape[1] ** 2 * x.element_size()
    return min(memory, block * (len(x) * (len(x) - 1) // 2 // pairs_per_block(x, x) + 1))


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_thread() -> None:
    """Keeps the matrix products of a worker from starting threads of their own: the workers fill the cores."""
    torch.set_num_threads(1)
