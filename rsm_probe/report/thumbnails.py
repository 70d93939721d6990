"""Small copies of images, for pages."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from rsm_probe.errors import ImageError
from rsm_probe.figures import displayed
from rsm_probe.report.page import Thumbnail
from rsm_probe.sources.images.clips import Clip

# Longer side in pixels. Smaller images stay as they are.
SIDE = 112
_QUALITY = 82


def thumbnail(image: Any, name: str, label: str = "", side: int = SIDE) -> Thumbnail:
    """A small copy of an image, as PNG or JPEG, whichever is smaller.

    Args:
        image: what `rsm_probe.figures.displayed` takes, or a `Clip`, of which the first frame is shown.
        name: id of the image.
        label: label of the image.
        side: longer side in pixels, at most.

    Raises:
        ImageError: not an image that can be shown, such as a volume.
    """
    values = displayed(image.frames[0] if isinstance(image, Clip) else image)
    if 0 in values.shape:
        raise ImageError(f"image {name!r} has no pixels")
    small = Image.fromarray(np.round(255 * values).astype(np.uint8))
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    encoded = [io.BytesIO(), io.BytesIO()]
    small.save(encoded[0], "PNG", optimize=True)
    small.save(encoded[1], "JPEG", quality=_QUALITY, optimize=True)
    return Thumbnail(min((one.getvalue() for one in encoded), key=len), small.size, name, label)


def joining_lines(
    permutation: np.ndarray,
    affinities: np.ndarray,
    grids: tuple[Sequence[int] | None, Sequence[int] | None],
    most: int = 12,
) -> list[tuple[float, float, float, float, float]]:
    """Lines between the matched locations of two images, for `Picture.lines`.

    Args:
        permutation: for each location of the first image its partner in the second, (S,), -1 for unmatched ones.
        affinities: the affinity of each matched pair, (S,).
        grids: (rows, columns) of the locations of each image; no lines are drawn without a grid.
        most: number of lines, at most; those of the largest affinities are drawn.
    """
    first, second = (None if grid is None or len(grid) != 2 else grid for grid in grids)
    if first is None or second is None or first[0] * first[1] != len(permutation):
        return []
    matched = np.flatnonzero(permutation >= 0)
    drawn = matched[np.argsort(-affinities[matched], kind="stable")][:most]
    largest = max(float(affinities[drawn].max(initial=0.0)), np.finfo(float).tiny)
    return [
        (
            *_centre(int(location), first),
            *_centre(int(permutation[location]), second),
            round(float(np.clip(affinities[location] / largest, 0, 1)), 3),
        )
        for location in drawn
    ]


def _centre(location: int, grid: Sequence[int]) -> tuple[float, float]:
    """Centre of a location as shares of width and height."""
    row, column = divmod(location, grid[1])
    return round((column + 0.5) / grid[1], 4), round((row + 0.5) / grid[0], 4)
