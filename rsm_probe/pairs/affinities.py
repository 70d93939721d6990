"""Tokens -> inner products between all locations of two images, pair by pair, where the tokens are."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from rsm_probe.execution.devices import block_bytes, full_precision, in_halves
from rsm_probe.pairs.sides import Side

# Bytes of one block of affinities on the CPU, or for it. It is a constant, not derived from workers or memory, so that
# the shapes of the matrix products, and with them the last bits of the results, never depend on the machine's load.
BLOCK_BYTES = 8 << 20
# Most pairs per CPU block whose tokens are gathered one by one: larger blocks gain nothing, however small the pairs.
_MOST_GATHERED = 256

Numbers = tuple[np.ndarray, np.ndarray]


def pairs_per_block(x: Tensor, y: Tensor, memory: int = BLOCK_BYTES) -> int:
    """How many affinities (S, T) make one block, by default one for the CPU; at least 1."""
    return max(1, memory // (x.shape[1] * y.shape[1] * x.element_size()))


def pair_affinities(x: Tensor, y: Tensor, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """The locations of images of x against those of single images of y.

    Args:
        x: tokens (N, S, C), contiguous.
        y: tokens (M, T, C), contiguous.
        rows: (B,), images of x.
        columns: (B,), images of y.

    Returns:
        Shape (B, S, T), where the tokens are.
    """
    numbers = (torch.from_numpy(part).to(x.device) for part in (rows, columns))
    left, right = (tokens[number] for tokens, number in zip((x, y), numbers, strict=True))
    if x.dtype == torch.float16:  # added up in float32
        return torch.bmm(left, right.mT, out_dtype=torch.float32)
    return torch.bmm(left, right.mT)


# Streams of this thread, by device. PyTorch caches memory per stream, so a new stream could not reuse any.
_streams = threading.local()


def _stream(device: torch.device) -> torch.cuda.Stream:
    if not hasattr(_streams, str(device)):
        setattr(_streams, str(device), torch.cuda.Stream(device))
    return getattr(_streams, str(device))


@dataclass(frozen=True, eq=False)
class Block:
    """Some pairs of images, and their affinities, which a device may still be computing.

    Attributes:
        rows: (B,), images of x.
        columns: (B,), images of y.
        on_device: whether the affinities stay on the device.
        ready: recorded once they are computed; None where they already are.
        buffer: the memory that holds them, if later blocks may reuse it.
    """

    rows: np.ndarray
    columns: np.ndarray
    _values: Tensor | None
    on_device: bool
    ready: torch.cuda.Event | None = None
    buffer: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def affinity(self) -> np.ndarray | Tensor | None:
        """Wait for the affinities (B, S, T), in any thread; None where no method reads them."""
        if self._values is None:
            return None
        if self.ready is not None and self.on_device:
            stream = torch.cuda.current_stream(self._values.device)
            stream.wait_event(self.ready)
            self._values.record_stream(stream)  # or their memory would be reused too soon
        elif self.ready is not None:
            self.ready.synchronize()
        return self._values if self.on_device else self._values.numpy()


class BlockMemory:
    """Memory of CPU blocks that were solved, which later blocks reuse, in any thread.

    The C library cannot reuse it: small results that last are put into the gap that a block leaves, and the next block
    no longer fits. 60 images of 784 locations took 3.7 GB under a budget of 0.5 GB. Nor would it return the memory when
    the last block is solved, so it comes from the operating system.

    Attributes:
        allocated: bytes of all memory that was allocated.
    """

    def __init__(self) -> None:
        self.allocated = 0
        self._free: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        """Return a buffer of at least `size` bytes with arbitrary contents."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = None
        if buffer is None or len(buffer) < size:
            # A tensor that was made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                buffer = torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)
            self.allocated += len(buffer)
        return buffer

    def give_back(self, buffer: Tensor) -> None:
        """Let later blocks overwrite what `take` returned."""
        self._free.append(buffer)


class Affinities:
    """The affinities of pairs of images, block by block, for methods that read the same ones.

    A CUDA device computes them on a stream of their own. Where the CPU matches, the same stream copies them into pinned
    memory. Both overlap with the matching of earlier blocks.

    Args:
        x: the images in the rows, whose tokens are contiguous.
        y: those in the columns, on the same device.
        on_device: whether they stay on the device, for methods that solve them there.
        reads: whether any method reads them; if not, blocks only say which pairs come next.
        precision: "float32", or "float16" for tokens that are rounded to it.
        block_memory: bytes of one block; None for a constant where a CPU matches, and else for what the device allows.
        solved: memory of solved blocks; None to share none with other affinities.

    Attributes:
        pair_bytes: size of one affinity; 0 where no method reads them.
        pairs_per_block: most pairs in a block.
    """

    def __init__(
        self,
        x: Side,
        y: Side,
        on_device: bool = False,
        reads: bool = True,
        precision: str = "float32",
        block_memory: int | None = None,
        solved: BlockMemory | None = None,
    ) -> None:
        self._reused = solved or BlockMemory()
        self.on_device, self.reads, self.device = on_device, reads, x.tokens.device
        self.x, self.y = x.tokens, y.tokens
        self.pair_bytes = self.x.shape[1] * self.y.shape[1] * self.x.element_size() if reads else 0
        self.block_memory = block_memory or (block_bytes(self.device) if on_device else BLOCK_BYTES)
        self.pairs_per_block = pairs_per_block(self.x, self.y, self.block_memory)
        self._units: tuple[np.ndarray, np.ndarray] | None = None
        if reads and precision == "float16":
            (self.x, units_x), (self.y, units_y) = x.half, y.half
            self._units = units_x, units_y
        self._dtype = torch.promote_types(self.x.dtype, torch.float32)
        self._stream = None
        if self.device.type == "cuda":
            self._stream = _stream(self.device)
            self._stream.wait_stream(torch.cuda.current_stream(self.device))  # which computed the tokens
            for tokens in (self.x, self.y):
                tokens.record_stream(self._stream)

    @property
    def gathered_per_block(self) -> int:
        """Pairs per block where tokens are gathered pair by pair, which takes memory as well; at least 1."""
        tokens = (self.x.shape[1] + self.y.shape[1]) * self.x.shape[2] * self.x.element_size()
        if self.on_device:
            return max(1, self.block_memory // (self.pair_bytes + tokens))
        return max(1, min(_MOST_GATHERED, self.block_memory // max(self.pair_bytes, tokens)))

    def block_size(self, pairs: int) -> int:
        """Bytes of a block of that many pairs. Blocks on the CPU all have the size of the largest, to share buffers."""
        largest = min(self.pairs_per_block, len(self.x)) if self.device.type == "cpu" else 0
        return max(pairs, largest) * self.pair_bytes

    def all_pairs(self, diagonal: bool = False) -> Iterator[Numbers]:
        """Yield the pairs of each block: all pairs, or those below the diagonal (with it, if asked) where x is y.

        A CPU block holds images of x against one image of y; a device block holds as many such runs as fit.
        """
        runs: list[tuple[slice, int]] = []
        held = 0
        for rows, column in block_slices(self.x, self.y, diagonal, self.pairs_per_block):
            count = rows.stop - rows.start
            if runs and (not self.on_device or held + count > self.pairs_per_block):
                yield _numbers(runs)
                runs, held = [], 0
            runs.append((rows, column))
            held += count
        if runs:
            yield _numbers(runs)

    def start(self, rows: np.ndarray, columns: np.ndarray, wait: Callable[[], bool] = bool) -> Iterator[Block]:
        """Start computing the affinities of some pairs, in several blocks where the device lacks memory for one.

        Args:
            rows: (B,), images of x.
            columns: (B,), images of y.
            wait: see `in_halves`.

        Raises:
            CostError: the device lacks memory for a single affinity.
        """
        return in_halves(lambda start, stop: self.block(rows[start:stop], columns[start:stop]), len(rows), wait)

    def block(self, rows: np.ndarray, columns: np.ndarray, one_by_one: bool = False) -> Block:
        """Start computing the affinities of some pairs.

        Args:
            rows: (B,), images of x.
            columns: (B,), images of y.
            one_by_one: compute one product per pair, for pairs that share no images; on a CPU, its last bits then do
                not depend on the rest of the block.

        Raises:
            torch.OutOfMemoryError: the device lacks memory for them.
        """
        if not self.reads:
            return Block(rows, columns, None, self.on_device)
        if self._stream is None:
            buffer = None
            if self.device.type == "cpu" and not one_by_one:
                buffer = self._reused.take(max(self.block_size(len(rows)), self._bytes(rows)))
            values = self._products(rows, columns, one_by_one, buffer)
            return Block(rows, columns, values if self.on_device else values.cpu(), self.on_device, buffer=buffer)
        with torch.cuda.stream(self._stream):
            values = self._products(rows, columns, one_by_one)
            if not self.on_device:
                pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
                values = pinned.copy_(values, non_blocking=True)
            ready = torch.cuda.Event(blocking=True)
            ready.record(self._stream)
        return Block(rows, columns, values, self.on_device, ready)

    def solved(self, block: Block) -> None:
        """Say that nothing reads the affinities of a block any more, so that later blocks may overwrite them."""
        if block.buffer is not None:
            self._reused.give_back(block.buffer)

    def _bytes(self, rows: np.ndarray) -> int:
        return len(rows) * self.x.shape[1] * self.y.shape[1] * self._dtype.itemsize

    def _products(
        self, rows: np.ndarray, columns: np.ndarray, one_by_one: bool, buffer: Tensor | None = None
    ) -> Tensor:
        with full_precision(self.device):
            values = self._multiplied(rows, columns, one_by_one, buffer)
        if self._units is None:
            return values
        units = self._units[0][rows] * self._units[1][columns]
        return values.mul_(torch.from_numpy(units).to(values)[:, None, None])

    def _multiplied(self, rows: np.ndarray, columns: np.ndarray, one_by_one: bool, buffer: Tensor | None) -> Tensor:
        if one_by_one:
            return pair_affinities(self.x, self.y, rows, columns)
        cuts = np.flatnonzero((np.diff(columns) != 0) | (np.diff(rows) != 1)) + 1
        size = len(rows), self.x.shape[1], self.y.shape[1]
        if buffer is None:
            values = torch.empty(size, dtype=self._dtype, device=self.device)
        else:
            values = buffer[: self._bytes(rows)].view(self._dtype).view(size)
        for start, stop in pairwise([0, *cuts.tolist(), len(rows)]):
            left, right = self.x[rows[start] : rows[stop - 1] + 1].flatten(0, 1), self.y[columns[start]].T
            out = values[start:stop].view(-1, size[2])
            if self.x.dtype == torch.float16:  # added up in float32
                torch.mm(left, right, out_dtype=torch.float32, out=out)
            else:
                torch.mm(left, right, out=out)
        return values


def block_slices(x: Tensor, y: Tensor, diagonal: bool = False, most: int | None = None) -> Iterator[tuple[slice, int]]:
    """Yield all pairs, or those below the diagonal (with it, if asked) where x is y, as images of x against one of y.

    Args:
        x: tokens (N, S, C).
        y: tokens (M, T, C).
        diagonal: whether to include each image with itself.
        most: images of x at a time; by default as many as fill a CPU block.
    """
    step = most or pairs_per_block(x, y)
    for column in range(y.shape[0]):
        first = column + (not diagonal) if y is x else 0
        for start in range(first, x.shape[0], step):
            yield slice(start, min(start + step, x.shape[0])), column


def _numbers(runs: list[tuple[slice, int]]) -> Numbers:
    rows = [np.arange(part.start, part.stop) for part, _ in runs]
    return np.concatenate(rows), np.repeat([column for _, column in runs], [len(part) for part in rows])
