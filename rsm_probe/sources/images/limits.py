"""Sizes that are refused from the options alone, before any memory is taken."""

from __future__ import annotations

from typing import Any

from rsm_probe.checks import brief, require_seed, require_whole
from rsm_probe.errors import ImageError

# An image of this edge takes 0.8 GB as a model's input: three channels of four bytes.
MOST_PIXELS = 8192
# Sets that are drawn keep about 2 kB per image.
MOST_DRAWN = 10**6


def require_edge(size: Any, name: str = "size") -> None:
    """Refuse an edge of square images that would not fit into memory.

    Args:
        size: in pixels.
        name: of the argument.

    Raises:
        ImageError: not a whole number, below 1, or more than 8 192.
    """
    require_whole(size, name, 1, ImageError)
    if size > MOST_PIXELS:
        raise ImageError(
            f"{name} must be at most {MOST_PIXELS} pixels: an image of {brief(size)} x {brief(size)} takes "
            f"{in_bytes(12 * int(size) ** 2)} in a model's input"
        )


def require_drawn(count: Any, name: str = "count") -> None:
    """Refuse a number of images to draw that would not fit into memory.

    Args:
        count: of images.
        name: of the argument.

    Raises:
        ImageError: not a whole number, below 1, or more than a million.
    """
    require_whole(count, name, 1, ImageError)
    if count > MOST_DRAWN:
        raise ImageError(
            f"{name} must be at most {MOST_DRAWN} images to draw: what is in {brief(count)} images takes "
            f"{in_bytes(2000 * int(count))}; draw several sets with seeds of their own"
        )


def require_drawing(size: Any, count: Any, seed: Any) -> None:
    """Refuse options of a set that is drawn: its edge, its number of images, its seed.

    Raises:
        ImageError: see `require_edge`, `require_drawn` and `require_seed`.
    """
    require_edge(size)
    require_drawn(count)
    require_seed(seed, "seed", ImageError)


def in_bytes(count: int) -> str:
    """Write a number of bytes with a unit."""
    if count >= 10**24:
        return "more than all machines have"
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB")):
        if count >= 10**power:
            return f"{count // 10**power} {unit}"
    return f"{count // 1000} kB"
