"""The pair loop: affinities on the device, matching on CPU worker threads, a bounded queue between them."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np
from torch import Tensor

from rsm_probe.errors import CostError
from rsm_probe.matching.identity import aligned_products
from rsm_probe.matching.inputs import rescaled
from rsm_probe.matching.protocol import Matching, matched_sum
from rsm_probe.similarity.affinity import AffinityBlock, affinity_block, block_slices, pairs_per_block

# A sample for an estimate is cut to this many locations; larger problems are extrapolated.
_SAMPLE_LOCATIONS = 512


class PairMatcher:
    """Computes matched inner products of all pairs of images, for several matchings at once.

    Args:
        workers: CPU threads that match; None for one per available core. The result does not depend on it.
        memory: bytes, or text such as "1GB": how much the affinities waiting to be matched may occupy; one block of
            8 MB may always wait.
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
        if self.workers < 1:
            raise CostError(f"workers must be at least 1, found {workers}")
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="rsm-probe-match")
        self._on_pairs = on_pairs
        self._waiting = 0
        self._freed = threading.Condition()
        self._counting = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, x: Tensor, y: Tensor | None, methods: Mapping[str, Matching]) -> PendingProducts:
        """Starts the matching of all pairs; blocks while the queue is full.

        Args:
            x: tokens (N, S, C), finite.
            y: tokens (M, T, C), finite, or None for the pairs within x (each unordered pair is matched once).
            methods: label -> method.

        Returns:
            A handle whose `result()` gives label -> (N, M) matched inner products.

        Raises:
            CostError: one affinity alone exceeds the memory budget.
        """
        x = x.contiguous()
        y = x if y is None else y.contiguous().to(x)
        matched = {label: method for label, method in methods.items() if method.needs_affinity}
        # With one location on both sides there is nothing to choose: every matching is the identity.
        if x.shape[1] == y.shape[1] == 1:
            matched = {}
        identity = aligned_products(x, y)
        products = {
            label: identity.copy() if method.needs_affinity else method.products(x, y)
            for label, method in methods.items()
        }
        pending = PendingProducts(products, same=y is x)
        if not matched:
            self._count(_pair_count(x, y))
            return pending
        size = x.shape[1] * y.shape[1] * x.element_size()
        if size > self.memory:
            raise CostError(
                f"one affinity of {x.shape[1]} x {y.shape[1]} locations takes {format_bytes(size)}, above the memory "
                f"budget of {format_bytes(self.memory)}; raise memory=, or use a matching that needs no affinity"
            )
        scaled_x, unit_x = rescaled(x)
        scaled_y, unit_y = (scaled_x, unit_x) if y is x else rescaled(y)
        for rows, column in block_slices(scaled_x, scaled_y):
            reserved = (rows.stop - rows.start) * size
            self._reserve(reserved)
            try:
                block = affinity_block(scaled_x, scaled_y, rows, column)
                future = self._pool.submit(self._match_block, block, matched, products, unit_x * unit_y)
            except BaseException:  # such as a device that is out of memory: whoever tries again needs the place
                self._release(reserved)
                raise
            # Not at the end of the work itself: work that is cancelled never ends, but is done all the same.
            future.add_done_callback(lambda _, reserved=reserved: self._release(reserved))  # type: ignore[misc]
            pending.futures.append(future)
        return pending

    def _match_block(
        self, block: AffinityBlock, methods: Mapping[str, Matching], out: dict[str, np.ndarray], unit: float
    ) -> None:
        for offset, affinity in enumerate(block.values):
            # What matching gains over the identity is added to the identity's float64 value: so equal
            # pairings give equal values to the last bit, and an exact method never falls below the identity.
            aligned = affinity.diagonal()
            unmatched = float(aligned.sum(dtype=np.float64))
            noise = float(np.abs(aligned).sum(dtype=np.float64)) * len(aligned) * np.finfo(np.float64).eps
            for label, method in methods.items():
                value = matched_sum(affinity, method.permutation(affinity))
                if not method.symmetric:
                    value = max(value, matched_sum(affinity.T, method.permutation(affinity.T)))
                gain = value - unmatched
                # The same terms summed in another order differ in the last digits.
                if abs(gain) > noise:
                    out[label][block.rows.start + offset, block.column] += gain * unit
        self._count(len(block.values))

    def _reserve(self, size: int) -> None:
        with self._freed:
            self._freed.wait_for(lambda: not self._waiting or self._waiting + size <= self.memory)
            self._waiting += size

    def _release(self, size: int) -> None:
        with self._freed:
            self._waiting -= size
            self._freed.notify()

    def _count(self, pairs: int) -> None:
        with self._counting:
            self._on_pairs(pairs)


class PendingProducts:
    """Matched inner products that worker threads are filling in."""

    def __init__(self, products: dict[str, np.ndarray], same: bool) -> None:
        self.futures: list[Future[None]] = []
        self._products = products
        self._same = same

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
        if not self._same:
            return self._products
        return {label: np.tril(g) + np.tril(g, -1).T for label, g in self._products.items()}


def _pair_count(x: Tensor, y: Tensor) -> int:
    return x.shape[0] * (x.shape[0] - 1) // 2 if y is x else x.shape[0] * y.shape[0]


def seconds_per_pair(x: Tensor, method: Matching, samples: int = 3) -> float:
    """Times a method on a few pairs of images, for an estimate of the whole.

    Args:
        x: tokens (N, S, C) of at least 2 images.
        method: any matching.
        samples: pairs to time; the mean counts.

    Returns:
        Seconds for one pair on one core. Above 512 locations a part is timed and scaled by the method's growth.
    """
    if not method.needs_affinity or x.shape[1] == 1:
        return 0.0
    scale = max(1.0, x.shape[1] / _SAMPLE_LOCATIONS) ** method.growth
    part = x[:, :_SAMPLE_LOCATIONS].contiguous()
    pairs = [(i, j) for i in range(len(x)) for j in range(i)][:samples]
    blocks = [affinity_block(part, part, slice(i, i + 1), j) for i, j in pairs]
    start = time.perf_counter()
    for block in blocks:
        method.permutation(block.values[0])
    return (time.perf_counter() - start) / len(blocks) * scale


def queue_bytes(x: Tensor, memory: int) -> int:
    """How much of a memory budget the affinities of a layer can really fill."""
    block = pairs_per_block(x, x) * x.shape[1] ** 2 * x.element_size()
    return min(memory, block * (_pair_count(x, x) // pairs_per_block(x, x) + 1))


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(amount: str | int) -> int:
    """Bytes from a number or from text such as "500MB" or "2 GB".

    Raises:
        CostError: no amount above 0.
    """
    if isinstance(amount, int):
        found_bytes = amount
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(amount), re.IGNORECASE)
        if not found:
            raise CostError(f"memory must be a number of bytes or text such as '2GB', found {amount!r}")
        found_bytes = int(float(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2].upper()])
    if found_bytes <= 0:
        raise CostError(f"memory must be above 0, found {amount!r}")
    return found_bytes


def format_bytes(amount: float) -> str:
    """Bytes as people read them: 1.5 GB."""
    units = ["B", "KB", "MB", "GB", "TB"]
    # 999.5 of a unit would be written as 1e+03 of it.
    while amount >= 999.5 and len(units) > 1:
        amount /= 1000
        units.pop(0)
    return f"{amount:.3g} {units[0]}"
