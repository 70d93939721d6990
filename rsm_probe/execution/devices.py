"""Where things are computed: devices by name, their memory, and what is done when it is too little."""

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
# Of the memory that PyTorch may use on a device, the share for the affinities of two blocks: one that is being matched,
# and one that is being computed.
_SHARE = 0.25
# The share for tokens that are kept there, as they will be asked for again.
_TOKEN_SHARE = 0.5
# Larger blocks gain nothing: this one holds programs for any device many times over.
_LARGEST_BLOCK = 4 << 30
_switching = threading.RLock()
# Less main memory than this is not asked about: the question takes longer than an allocation.
_TOO_LITTLE_TO_ASK = 256 << 20
# What a device whose memory is the CPU's may use.
_SHARED_MEMORY = 512 << 20


def free_memory() -> int | None:
    """Bytes of main memory that this process can still take, under the limits that are set for it.

    Returns:
        The least of what the system has, what a container leaves, and what `ulimit -v` allows; None where nothing is
        known.
    """
    known = [amount for amount in (available_bytes(), _of_container(), _of_limit()) if amount is not None]
    return max(0, min(known)) if known else None


def require_memory(needed: int, what: str, instead: str) -> None:
    """Refuses to allocate what cannot be there, before anything is allocated.

    Args:
        needed: bytes of main memory.
        what: takes them, for the message.
        instead: what to do.

    Raises:
        CostError: more than is free.
    """
    if needed < _TOO_LITTLE_TO_ASK:
        return
    free = free_memory()
    if free is not None and needed > free:
        raise CostError(f"{what} takes {needed / 1e9:.3g} GB of memory, and {free / 1e9:.3g} GB are free; {instead}")


def _of_container() -> int | None:
    """By the control groups of Linux, of both versions; files that are cached count as free."""
    for folder, most, used, cached in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):  # no such group, or one without a limit
            allowed, taken = (int(Path(folder, name).read_text(encoding="ascii")) for name in (most, used))
            numbers = dict(
                line.split() for line in Path(folder, "memory.stat").read_text(encoding="ascii").splitlines()
            )
            return allowed - taken + int(numbers.get(cached, 0))
    return None


def _of_limit() -> int | None:
    with suppress(ImportError, OSError, ValueError):
        import resource  # which Windows lacks

        allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
        if allowed != resource.RLIM_INFINITY:
            taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            return allowed - taken * resource.getpagesize()
    return None


def vector_instructions() -> bool:
    """Whether the auction on CPUs may use vector instructions; the environment variable RSM_PROBE_SIMD=0 forbids it."""
    return os.environ.get("RSM_PROBE_SIMD", "1") != "0"


def find_device(device: str | torch.device | None, error: type[RsmProbeError] = CostError) -> torch.device:
    """The device of a name, which is there.

    Args:
        device: "auto" for a GPU where there is one and the CPU elsewhere; or "cpu", "cuda", "cuda:1", "mps". "cuda" is
            the current device of the thread that uses it. None is the CPU.
        error: what to raise.

    Raises:
        RsmProbeError: it is not there, or its name is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if isinstance(device, bool) or not isinstance(device, str | int | torch.device | None):
            raise RuntimeError(f"a device is a name or a torch.device, found {type(device).__name__}")
        checked = torch.device("cpu" if device is None else device)
        if checked.type == "meta":
            raise RuntimeError("it holds no values")
        torch.zeros(1, device=checked)
    except (RuntimeError, AssertionError, ValueError, OverflowError) as problem:
        reason = str(problem).splitlines()[0][:300]
        raise error(
            f'cannot run on device {brief(str(device))}; give "cpu", or "auto" for what is there: {reason}'
        ) from problem
    return checked


def block_bytes(device: torch.device) -> int:
    """Bytes of the affinities that a device computes at a time, where they are to stay there.

    Two such blocks are a quarter of what PyTorch may use: `torch.cuda.set_per_process_memory_fraction` sets that.
    """
    return min(_LARGEST_BLOCK, int(_SHARE * allowed_bytes(device)) // 2)


def token_bytes(device: torch.device) -> int:
    """Bytes of the tokens that are kept on a device: half of what PyTorch may use."""
    return int(_TOKEN_SHARE * allowed_bytes(device))


def allowed_bytes(device: torch.device) -> float:
    """Bytes of a device's memory that PyTorch may use."""
    if device.type != "cuda":
        return _SHARED_MEMORY
    number = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.get_device_properties(number).total_memory * torch.cuda.get_per_process_memory_fraction(number)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products in float32 as they are, whatever a program allows for its training: bounds are of float32.

    Neither autocast, in which a layer may be taken up within the forward pass of its model, nor TF32.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        with _switching:  # one switch for all threads; what is started under it need not end under it
            before = torch.backends.cuda.matmul.fp32_precision
            torch.backends.cuda.matmul.fp32_precision = "ieee"
            try:
                yield
            finally:
                torch.backends.cuda.matmul.fp32_precision = before


def in_halves(work: Callable[[int, int], _Part], count: int, wait: Callable[[], bool] = bool) -> Iterator[_Part]:
    """Does work on many things at once; where a device runs out of memory, on halves of them, and so on.

    Each part is given away before the next is begun, so that its memory is free again if nobody else holds it.

    Args:
        work: takes where a part starts and stops.
        count: of the things.
        wait: waits until others give memory back, and says whether any did: before anything is halved.

    Yields:
        What the work gave for each part, in order.

    Raises:
        CostError: the memory is too small for one.
    """
    waiting, done = [(0, count)], []
    while waiting:
        start, stop = waiting.pop()
        try:
            done.append(work(start, stop))
        except torch.OutOfMemoryError as problem:
            reason = str(problem).splitlines()[0]
        if done:
            yield done.pop()  # nothing here holds it any more
            continue
        torch.cuda.empty_cache()
        if wait():
            waiting.append((start, stop))
            continue
        if stop - start < 2:
            raise CostError(f"the device's memory is too small even for one pair of images: {reason}")
        middle = (start + stop) // 2
        warnings.warn(f"the device is out of memory: {stop - start} pairs of images become two halves", stacklevel=3)
        waiting += [(middle, stop), (start, middle)]
