"""Limits on sizes and counts, checked before any memory is allocated."""

from __future__ import annotations

from typing import Any

from rsm_probe.checks import brief, require_seed, require_whole
from rsm_probe.errors import ImageError

# As a model's input, an image of this edge takes 0.8 GB: three channels of four bytes.
MOST_PIXELS = 8192
# Generated sets hold about 2 kB per image.
MOST_DRAWN = 10**6


def require_edge(size: Any, name: str = "size") -> None:
    """Refuse an edge at which square images would not fit into memory.

    Args:
        size: edge in pixels.
        name: name of the argument, for error messages.

    Raises:
        ImageError: the edge is not a whole number from 1 to 8 192.
    """
    require_whole(size, name, 1, ImageError)
    if size > MOST_PIXELS:
        raise ImageError(
            f"{name} must be at most {MOST_PIXELS} pixels: an image of {brief(size)} x {brief(size)} takes "
            f"{in_bytes(12 * int(size) ** 2)} in a model's input"
        )


def require_drawn(count: Any, name: str = "count") -> None:
    """Refuse a number of generated images whose descriptions would not fit into memory.

    Args:
        count: number of images.
        name: name of the argument, for error messages.

    Raises:
        ImageError: the count is not a whole number from 1 to a million.
    """
    require_whole(count, name, 1, ImageError)
    if count > MOST_DRAWN:
        raise ImageError(
            f"{name} must be at most {MOST_DRAWN} images: the layouts of {brief(count)} images take "
            f"{in_bytes(2000 * int(count))}; draw several sets with different seeds"
        )


def require_drawing(size: Any, count: Any, seed: Any) -> None:
    """Check the options of a generated set: edge, number of images and seed.

    Raises:
        ImageError: see `require_edge`, `require_drawn` and `require_seed`.
    """
    require_edge(size)
    require_drawn(count)
    require_seed(seed, "seed", ImageError)


def in_bytes(count: int) -> str:
    """Format a number of bytes with a unit."""
    if count >= 10**24:
        return "more than all machines have"
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB")):
        if count >= 10**power:
            return f"{count // 10**power} {unit}"
    return f"{count // 1000} kB"
