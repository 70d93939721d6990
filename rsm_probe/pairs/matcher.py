"""The pair loop in worker threads: affinities on the device, matching beside it, bounded queues between."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from rsm_probe.execution.devices import require_memory
from rsm_probe.execution.execution import Execution
from rsm_probe.matching.matching import Matching
from rsm_probe.pairs.affinities import Block, BlockMemory, pairs_per_block
from rsm_probe.pairs.pair_loop import BlockSolver, PairLoop
from rsm_probe.pairs.products import MatchedProducts, ProductMatrix
from rsm_probe.pairs.sides import Side

# Most bytes of affinities from a CPU that wait for its own threads: more would only take memory, as nothing is gained
# by multiplying far ahead of the threads that match.
_QUEUED_BYTES = 256 << 20


class PairMatcher:
    """Computes matched inner products of all pairs of images, for several matchings at once.

    Args:
        execution: how many CPU threads match, and the memory budget for affinities that wait for them; those from a
            CPU take at most 256 MB of it, and one block of 8 MB may always wait. Affinities that a device solves take
            at most a quarter of its memory.
        on_pairs: called with the number of pairs whenever some are solved.
        block_memory: see `Affinities`.

    Attributes:
        threads: number of CPU threads that match.
        reused: memory of the blocks that the CPU solves.
    """

    def __init__(
        self,
        execution: Execution,
        on_pairs: Callable[[int], None] = lambda count: None,
        block_memory: int | None = None,
    ) -> None:
        self.threads, self._memory = execution.worker_count, execution.memory_bytes
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="rsm-probe-match", initializer=_one_thread)
        self._on_pairs, self._block_memory = on_pairs, block_memory
        self._queues: dict[torch.device, _Queue] = {}  # of affinities that wait for the CPU, by where they come from
        self.reused = BlockMemory()
        self._device_queues: dict[torch.device, _Queue] = {}
        self._counting = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.reused = BlockMemory()

    def submit(
        self,
        x: Tensor | Side,
        y: Tensor | Side | None,
        methods: Mapping[str, Matching],
        grid: tuple[int, ...] | None = None,
        *,
        bounds: bool = False,
        permutations: bool = False,
    ) -> PendingProducts:
        """Start the matching of all pairs; blocks while the queue is full.

        Args:
            x: finite tokens (N, S, C), or a side.
            y: finite tokens (M, T, C), or a side; None for the pairs within x (each unordered pair is matched once).
            methods: label -> method.
            grid: (H, W) of the locations of tokens, for methods that move along it.
            bounds: whether to keep bounds.
            permutations: whether to keep how locations were paired.

        Returns:
            A handle whose `result()` returns label -> (N, M) matched inner products.

        Raises:
            CostError: one affinity alone exceeds the memory budget.
            MatchingError: a method cannot work on these locations.
        """
        columns = len(x if y is None else y)
        locations = (x.tokens if isinstance(x, Side) else x).shape[1]
        require_memory(
            len(methods) * len(x) * columns * (8 * (1 + bounds) + 4 * locations * permutations),
            f"the similarity of {len(x)} x {columns} images",
            "take fewer images, or all_pairs(..., out=), which keeps it on disk",
        )
        left = x if isinstance(x, Side) else Side.of(x, grid)
        right = left if y is None or y is x else y if isinstance(y, Side) else Side.of(y.to(left.tokens), grid)
        # A layer may be read within the forward pass of a model that runs in half precision; match in full precision.
        with torch.autocast(left.tokens.device.type, enabled=False):
            loop = PairLoop(
                left,
                right,
                methods,
                memory=self._memory,
                bounds=bounds,
                permutations=permutations,
                block_memory=self._block_memory,
                solved=self.reused,
            )
            pending = PendingProducts(loop.matrices, (left.squared_norms, right.squared_norms))
            del x, y, left, right  # the loop keeps all that workers need
            if not loop.solvers:
                self._count(loop.workload.pairs)
            for solver in loop.solvers:
                solve = partial(self._solve_block, loop, solver)
                for pairs in loop.block_pairs(solver):
                    pending.futures += self._submit_block(solver, *pairs, solve)
        return pending

    def _submit_block(
        self, solver: BlockSolver, rows: np.ndarray, columns: np.ndarray, solve: Callable[[list[Block]], None]
    ) -> list[Future[None]]:
        """Have the affinities of some pairs computed and solved, once the queue has room for them."""
        affinities = solver.affinities
        queue, whole, sizes = self._queue_of(solver), affinities.block_size(len(rows)), [0]
        submitted: list[Future[None]] = []
        queue.reserve(whole)
        try:
            for block in affinities.start(rows, columns, lambda: queue.wait_for_others(whole - sum(sizes))):
                sizes.append(affinities.block_size(len(block)))
                work = self._pool.submit(solve, [block])
                # A callback, because cancelled work never reaches its own end.
                work.add_done_callback(lambda _, size=sizes[-1]: queue.release(size))  # type: ignore[misc]
                submitted.append(work)
                del block  # or it would stay in memory until the next one is there
        finally:  # after an error, such as a device out of memory, the next attempt needs the room
            queue.release(whole - sum(sizes))
        return submitted

    def _queue_of(self, solver: BlockSolver) -> _Queue:
        """Two blocks may wait on a device; the memory budget bounds what waits for the CPU."""
        device = solver.affinities.device
        if not solver.affinities.on_device:
            return self._queues.setdefault(device, _Queue(_most_queued(device, self._memory)))
        return self._device_queues.setdefault(device, _Queue(2 * solver.affinities.block_memory))

    def _solve_block(self, loop: PairLoop, solver: BlockSolver, blocks: list[Block]) -> None:
        block = blocks.pop()  # popped, so that no reference keeps its memory alive
        loop.fill(solver, block)
        if solver is loop.solvers[-1]:
            self._count(int(np.count_nonzero((block.rows != block.columns) | (not loop.within))))

    def _count(self, pairs: int) -> None:
        with self._counting:
            self._on_pairs(pairs)


class _Queue:
    """Counts the bytes of waiting affinities, up to a limit that a single larger block may exceed."""

    def __init__(self, most: int) -> None:
        self.most, self.waiting = most, 0
        self._freed = threading.Condition()

    def reserve(self, size: int) -> None:
        """Wait until there is room."""
        with self._freed:
            self._freed.wait_for(lambda: not self.waiting or self.waiting + size <= self.most)
            self.waiting += size

    def release(self, size: int) -> None:
        """Give room back."""
        with self._freed:
            self.waiting -= size
            self._freed.notify_all()

    def wait_for_others(self, own: int) -> bool:
        """Wait until only one's own bytes are queued; return whether others had to finish first."""
        with self._freed:
            others = self.waiting > own
            self._freed.wait_for(lambda: self.waiting <= own)
        return others


class PendingProducts:
    """Matched inner products that worker threads are still computing.

    Attributes:
        squared_norms: |z_i|^2 of the images in the rows (N,) and in the columns (M,); the same array for pairs within
            one set.
    """

    def __init__(self, matrices: Mapping[str, ProductMatrix], squared_norms: tuple[np.ndarray, np.ndarray]) -> None:
        self.futures: list[Future[None]] = []
        self.squared_norms = squared_norms
        self._matrices = matrices

    def matched(self) -> dict[str, MatchedProducts]:
        """Wait for the workers; label -> products, and bounds and permutations where they were asked for.

        Raises:
            Exception: as raised in a worker; the remaining blocks are cancelled.
        """
        try:
            for future in self.futures:
                future.result()
        except BaseException:
            for future in self.futures:
                future.cancel()
            raise
        self.futures = []
        # PyTorch applies the thread count that workers set to threads that start later, too.
        torch.set_num_threads(torch.get_num_threads())
        return {label: matrix.completed() for label, matrix in self._matrices.items()}

    def result(self) -> dict[str, np.ndarray]:
        """Wait for the products alone: label -> (N, M) float64, symmetric for pairs within one set; see `matched`."""
        return {label: known.products for label, known in self.matched().items()}


def queue_bytes(x: Tensor, memory: int, pairs: int) -> int:
    """How many bytes of a memory budget the affinities of some pairs of a layer can fill while they wait."""
    per_block = pairs_per_block(x, x)
    size = per_block * x.shape[1] ** 2 * x.element_size()
    return min(_most_queued(x.device, memory), size * (pairs // per_block + 1))


def _most_queued(device: torch.device, memory: int) -> int:
    """How many bytes of a memory budget affinities from a device may fill while they wait."""
    return min(memory, _QUEUED_BYTES) if device.type == "cpu" else memory


def _one_thread() -> None:
    """Keep the matrix products of a worker from starting threads of their own: the workers fill the cores."""
    torch.set_num_threads(1)
