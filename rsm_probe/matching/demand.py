"""The memory that matching a pair needs, whether it is free, and the method that needs less."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from rsm_probe.errors import CostError
from rsm_probe.execution.amounts import format_bytes, format_seconds
from rsm_probe.execution.devices import free_memory
from rsm_probe.matching.matching import Locations, Matching, Pairs, solve_both_ways
from rsm_probe.matching.registry import METHODS

# Smaller amounts are not checked: asking the system takes longer than the allocation.
_TOO_LITTLE_TO_ASK = 256 << 20
# Copies of the tokens of both images, in float64, that methods without an affinity hold at most.
_COPIES = 4
# Work that needs more is mentioned before it starts.
LONG, LARGE = 60.0, 4_000_000_000
# Locations of the parts that are timed.
_SAMPLE, _LARGE_SAMPLE = 1024, 4096


def pair_bytes(method: Matching, rows: int, columns: int, itemsize: int, copies: int = 1) -> int:
    """Bytes that a method needs at least to match one pair of images, beyond their tokens; 0 without an affinity.

    Args:
        method: any matching.
        rows: locations of one image, S.
        columns: locations of the other image, T.
        itemsize: bytes of an entry.
        copies: copies of the affinity that are still to be made; 0 if it exists already.
    """
    if not method.needs_affinity:
        return 0
    # Solving the reverse direction of an asymmetric method takes a copy.
    affinities = rows * columns * itemsize * (copies + (not method.symmetric))
    return affinities + method.scratch_bytes(rows, columns, itemsize)


def demanded_bytes(method: Matching, rows: int, columns: int, channels: int, itemsize: int) -> int:
    """Bytes for matching one pair: of its affinity and solver, or at most of copies of its tokens."""
    return pair_bytes(method, rows, columns, itemsize) or _COPIES * (rows + columns) * channels * 8


def require_room(method: Matching, rows: int, columns: int, channels: int, itemsize: int, copies: int = 1) -> None:
    """Refuse pairs whose affinity does not fit into memory, if the method needs one.

    Args:
        method: any matching.
        rows: locations of one image, S.
        columns: locations of the other image, T.
        channels: channels of a token; 0 if only the affinity is known.
        itemsize: bytes of an entry.
        copies: copies of the affinity that are still to be made; 0 if it exists already.

    Raises:
        CostError: the message gives the bytes needed and free, and a method that fits.
    """
    needed = pair_bytes(method, rows, columns, itemsize, copies)
    if needed < _TOO_LITTLE_TO_ASK:
        return
    free = free_memory()
    if free is not None and needed > free:
        raise CostError(
            f"matching {rows} x {columns} locations by {method.name!r}, which needs their affinity, takes "
            f"{needed / 1e9:.3g} GB of memory, but {free / 1e9:.3g} GB are free; "
            f"{way_out(method, rows, columns, channels, itemsize, free)}"
        )


def way_out(method: Matching, rows: int, columns: int, channels: int, itemsize: int, free: int | None) -> str:
    """Advice for pairs that do not fit: a method that does, or how many locations would.

    Args:
        method: the method that does not fit.
        rows: locations of one image, S.
        columns: locations of the other image, T.
        channels: channels of a token; 0 if only the affinity is known.
        itemsize: bytes of an entry.
        free: bytes of memory; None if unknown.
    """
    for other in _alternatives(method):
        needed = demanded_bytes(other, rows, columns, channels, itemsize)
        if free is not None and needed > free:
            continue
        if other.exact:
            return f"matching={other.name!r} is exact as well and takes {format_bytes(needed)}"
        if not channels:
            return f"match(x, y, {other.name!r}) takes the tokens of two images and needs no affinity"
        return f"matching={other.name!r} needs no affinity and takes at most {format_bytes(needed)}"
    most = math.isqrt(rows * columns)
    while most > 1 and pair_bytes(method, most, most, itemsize) > (free or 0):
        most = most * 15 // 16
    return f"pool the locations to at most {most} per image, or take a layer with fewer"


def remark(work: str, seconds: float, needed: int, advice: str = "", about: str = "about") -> str | None:
    """What to say of work that takes more than a minute or some GB of memory, before it starts; None if it does not."""
    if seconds < LONG and needed < LARGE:
        return None
    time = f"{about} {format_seconds(seconds)} and " if seconds else ""
    free = free_memory()
    return (
        f"{work} takes {time}{format_bytes(needed)} of memory"
        + (f" ({format_bytes(free)} are free)" if free is not None else "")
        + advice
    )


def pair_seconds(method: Matching, x: Locations, y: Locations, on_device: bool = False) -> float:
    """Seconds of one pair, x[0] with y[0], from a part of its locations.

    Args:
        method: any matching; 0 for those that solve all pairs at once, in a time linear in the locations.
        x: images (N, S, C).
        y: images (M, T, C).
        on_device: whether the device solves the pair.
    """
    size = max(x.count, y.count)
    if method.at_once or not size:
        return 0.0
    seconds = 0.0
    # A first and small part compiles. Affinities that exceed the caches are timed where they are a small share.
    for most in (_SAMPLE, _LARGE_SAMPLE if size >= 8 * _LARGE_SAMPLE else _SAMPLE):
        parts = [Locations(side.tokens[:1, :: -(-size // most)].contiguous()) for side in (x, y)]
        prepared = method.prepare(parts[0]), method.prepare(parts[1])
        start = time.perf_counter()
        affinity: Tensor | np.ndarray | None = parts[0].tokens @ parts[1].tokens.mT if method.needs_affinity else None
        if isinstance(affinity, Tensor) and not on_device:
            affinity = affinity.cpu().numpy()
        first = np.zeros(1, int)
        solve_both_ways(method, Pairs(first, first, parts[0], parts[1], affinity, prepared, on_device))
        seconds = (time.perf_counter() - start) * (size / max(part.count for part in parts)) ** method.growth
    return seconds


def _alternatives(method: Matching) -> Iterator[Matching]:
    """Methods that may need less memory: an exact one in place of an exact one, then those without an affinity."""
    if method.exact and method.name != "optimal":
        yield METHODS["optimal"]
    without = [other for other in METHODS.values() if not (other.needs_affinity or other.at_once)]
    yield from sorted(without, key=lambda other: other.name != "rewindowed")  # the closest to the optimum
