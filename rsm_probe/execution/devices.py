"""Devices by name, their memory, and what to do when memory runs out."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch

from rsm_probe.checks import brief
from rsm_probe.errors import CostError, RsmProbeError
from rsm_probe.execution.amounts import available_bytes

_Part = TypeVar("_Part")
# Share of the memory that PyTorch may use on a device for the affinities of two blocks: one is matched while the next
# one is computed.
_SHARE = 0.25
# Share for tokens that stay on the device for later use.
_TOKEN_SHARE = 0.5
# Larger blocks gain nothing: this size occupies any device many times over.
_LARGEST_BLOCK = 4 << 30
_switching = threading.RLock()
# Smaller amounts of main memory are not checked: the check takes longer than the allocation.
_TOO_LITTLE_TO_ASK = 256 << 20
# Budget of a device that shares the memory of the CPU.
_SHARED_MEMORY = 512 << 20


def free_memory() -> int | None:
    """Bytes of main memory that this process can still allocate.

    Returns:
        The minimum of the memory available on the system, in the container and under `ulimit -v`; None if all three are
        unknown.
    """
    known = [amount for amount in (available_bytes(), _of_container(), _of_limit()) if amount is not None]
    return max(0, min(known)) if known else None


def require_memory(needed: int, what: str, instead: str) -> None:
    """Check that memory is free before allocating it.

    Args:
        needed: bytes of main memory.
        what: what needs the memory, for the message.
        instead: advice, for the message.

    Raises:
        CostError: less memory is free.
    """
    if needed < _TOO_LITTLE_TO_ASK:
        return
    free = free_memory()
    if free is not None and needed > free:
        raise CostError(f"{what} takes {needed / 1e9:.3g} GB of memory, but {free / 1e9:.3g} GB are free; {instead}")


def _of_container() -> int | None:
    """Free memory in Linux control groups of version 2 or 1; cached files count as free."""
    for folder, most, used, cached in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):  # no control group, or no limit
            allowed, taken = (int(Path(folder, name).read_text(encoding="ascii")) for name in (most, used))
            numbers = dict(
                line.split() for line in Path(folder, "memory.stat").read_text(encoding="ascii").splitlines()
            )
            return allowed - taken + int(numbers.get(cached, 0))
    return None


def _of_limit() -> int | None:
    with suppress(ImportError, OSError, ValueError):
        import resource  # not available on Windows

        allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
        if allowed != resource.RLIM_INFINITY:
            taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            return allowed - taken * resource.getpagesize()
    return None


def vector_instructions() -> bool:
    """Whether the CPU auction may use vector instructions; the environment variable RSM_PROBE_SIMD=0 disables them."""
    return os.environ.get("RSM_PROBE_SIMD", "1") != "0"


def find_device(device: str | torch.device | None, error: type[RsmProbeError] = CostError) -> torch.device:
    """Find a device by name and check that it works.

    Args:
        device: "auto" for a GPU if there is one, else the CPU; or "cpu", "cuda", "cuda:1", "mps". "cuda" means the
            current device of the thread that uses it, and None the CPU.
        error: class of the error to raise.

    Raises:
        RsmProbeError: the device is not available, or the name is not valid; of the class `error`.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if isinstance(device, bool) or not isinstance(device, str | int | torch.device | None):
            raise RuntimeError(f"a device must be a name or a torch.device, found {type(device).__name__}")
        checked = torch.device("cpu" if device is None else device)
        if checked.type == "meta":
            raise RuntimeError("meta tensors have no values")
        torch.zeros(1, device=checked)
    except (RuntimeError, AssertionError, ValueError, OverflowError) as problem:
        reason = str(problem).splitlines()[0][:300]
        raise error(
            f'cannot run on device {brief(str(device))}; use "cpu", or "auto" to select an available device: {reason}'
        ) from problem
    return checked


def block_bytes(device: torch.device) -> int:
    """Bytes of one block of affinities on a device that matches them itself.

    Two blocks take a quarter of the memory that PyTorch may use, which `torch.cuda.set_per_process_memory_fraction`
    sets.
    """
    return min(_LARGEST_BLOCK, int(_SHARE * allowed_bytes(device)) // 2)


def token_bytes(device: torch.device) -> int:
    """Bytes of tokens that may stay on a device: half of the memory that PyTorch may use."""
    return int(_TOKEN_SHARE * allowed_bytes(device)) if device.type == "cuda" else block_bytes(device)


def allowed_bytes(device: torch.device) -> float:
    """Bytes of memory that PyTorch may use on a device."""
    if device.type != "cuda":
        return _SHARED_MEMORY
    number = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.get_device_properties(number).total_memory * torch.cuda.get_per_process_memory_fraction(number)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute matrix products in full float32, as bounds require, whatever precision a program uses for its training.

    Disables TF32 and autocast, under which reducers may run within the forward pass of a model.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        with _switching:  # the setting is global; work launched under it may finish after it is reset
            before = torch.backends.cuda.matmul.fp32_precision
            torch.backends.cuda.matmul.fp32_precision = "ieee"
            try:
                yield
            finally:
                torch.backends.cuda.matmul.fp32_precision = before


def in_halves(work: Callable[[int, int], _Part], count: int, wait: Callable[[], bool] = bool) -> Iterator[_Part]:
    """Work on many items at once; when a device runs out of memory, halve the work, recursively.

    Each part is yielded before the next starts, so that its memory can be freed.

    Args:
        work: computes a part, from the indices of its start and stop.
        count: number of items.
        wait: called before halving; waits for other work to free memory, and returns whether any was freed.

    Yields:
        The result for each part, in order.

    Raises:
        CostError: the memory is too small for a single item.
    """
    waiting, done = [(0, count)], []
    while waiting:
        start, stop = waiting.pop()
        try:
            done.append(work(start, stop))
        except torch.OutOfMemoryError as problem:
            reason = str(problem).splitlines()[0]
        if done:
            yield done.pop()  # popped, so that no reference keeps its memory alive
            continue
        torch.cuda.empty_cache()
        if wait():
            waiting.append((start, stop))
            continue
        if stop - start < 2:
            raise CostError(f"the device's memory is too small even for one pair of images: {reason}")
        middle = (start + stop) // 2
        warnings.warn(
            f"the device is out of memory: splitting a block of {stop - start} pairs of images in two", stacklevel=3
        )
        waiting += [(middle, stop), (start, middle)]
