"""Images of any kind, and the matched locations of two images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from rsm_probe.checks import require_whole
from rsm_probe.errors import ComparisonError, ImageError

# Colour map of grey images; ignored for colour images.
_SHADES: dict[str, Any] = {"cmap": "gray", "vmin": 0.0, "vmax": 1.0}


def displayed(image: Any) -> np.ndarray:
    """Convert an image to displayable values.

    8-bit and 16-bit unsigned integers are divided by the maximum of their type. Other values are kept if all lie in
    [0, 1]; otherwise they are stretched from the minimum to the maximum of the image. Non-finite values become black.
    One channel is shown in grey; two channels as red and green; of four or more channels, the first three are shown.
    Transparent pixels of PIL images are drawn over white.

    Args:
        image: a tensor (C, H, W) or (H, W); a PIL image of any mode; or an array (H, W), (H, W, C) with at most four
            channels, or (C, H, W).

    Returns:
        Shape (H, W) or (H, W, 3), float64 in [0, 1].

    Raises:
        ImageError: wrong shape, or values that are not real numbers.
    """
    if isinstance(image, Tensor):
        # NumPy lacks bfloat16.
        plain = image.detach().cpu()
        values = (plain.float() if plain.is_floating_point() else plain).numpy()
        values = np.moveaxis(values, 0, -1) if values.ndim == 3 else values
    elif isinstance(image, Image.Image):
        values = _pixels(image)
    else:
        values = np.asarray(image)
        if values.ndim == 3 and values.shape[2] > 4:
            values = np.moveaxis(values, 0, -1)
    if values.ndim not in (2, 3) or not values.size or values.dtype.kind not in "buif":
        raise ImageError(
            f"an image to show has shape (C, H, W) or (H, W) and real numbers, found {np.shape(values)} of "
            f"{values.dtype}"
        )
    return _channels(_unit_range(values))


def _pixels(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode in ("I", "F"):
        return np.asarray(image)
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    if image.mode == "LAB":  # PIL cannot convert LAB colours
        return np.asarray(image.getchannel("L"))
    image = image.convert("LA") if image.mode == "La" else image
    if {"A", "a"} & set(image.getbands()) or "transparency" in image.info:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return np.asarray(Image.alpha_composite(white, opaque).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _unit_range(values: np.ndarray) -> np.ndarray:
    if values.dtype in (np.uint8, np.uint16):
        return values / np.iinfo(values.dtype).max
    shown = values.astype(np.float64)
    finite = np.isfinite(shown)
    low, high = (float(shown[finite].min()), float(shown[finite].max())) if finite.any() else (0.0, 1.0)
    if low < 0 or high > 1:
        # Halve first: the full range could overflow.
        spread = high / 2 - low / 2
        shown = (np.where(finite, shown, low) / 2 - low / 2) / (spread or 1.0)
    return np.where(finite, shown, 0.0)


def _channels(values: np.ndarray) -> np.ndarray:
    if values.ndim == 2:
        return values
    if values.shape[2] == 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=2)
    return values[..., 0] if values.shape[2] == 1 else values[..., :3]


def matched_locations(
    ax: Axes,
    images: tuple[np.ndarray, np.ndarray],
    grids: tuple[tuple[int, int], tuple[int, int]],
    permutation: np.ndarray,
    affinities: np.ndarray,
    most: int = 60,
    title: str = "",
) -> Axes:
    """Draw two images side by side, with lines between matched locations (paper, Figure 1).

    Args:
        ax: Axes to draw on.
        images: two images of any size; see `displayed`.
        grids: (rows, columns) of the locations of each image, in row-major order.
        permutation: for each location of the first image its partner in the second, (S,), -1 for unmatched locations.
        affinities: the affinity of each matched pair, (S,), which colours its line.
        most: maximal number of lines; those of the largest affinities are drawn.
        title: title of the panel.

    Raises:
        ComparisonError: `permutation` or `affinities` do not fit the grids, or `most` is negative.
        ImageError: see `displayed`.
    """
    require_whole(most, "most", 0, ComparisonError)
    permutation, affinities = np.asarray(permutation), np.asarray(affinities)
    locations = [int(np.prod(grid)) for grid in grids]
    if permutation.shape != (locations[0],) or affinities.shape != permutation.shape:
        raise ComparisonError(
            f"a grid of {grids[0]} has {locations[0]} locations; permutation has shape {permutation.shape}, and "
            f"affinities have {affinities.shape}"
        )
    if permutation.dtype.kind not in "iu" or not ((permutation >= -1) & (permutation < locations[1])).all():
        raise ComparisonError(f"permutation must hold numbers of {locations[1]} locations, and -1 for unmatched ones")
    pictures = [displayed(image) for image in images]
    sizes = [picture.shape[:2] for picture in pictures]
    gap = 0.06 * max(width for _, width in sizes)
    offset = sizes[0][1] + gap
    for shown, (height, width), left in zip(pictures, sizes, (0.0, offset), strict=True):
        ax.imshow(shown, extent=(left, left + width, height, 0), **_SHADES)
    matched = np.flatnonzero(permutation >= 0)
    # Draw the strongest last, on top of the others.
    drawn = matched[np.argsort(affinities[matched], kind="stable")][max(0, len(matched) - most) :]
    ends = [_centres(grid, size) for grid, size in zip(grids, sizes, strict=True)]
    segments = np.stack([ends[0][drawn], ends[1][permutation[drawn]] + [offset, 0]], axis=1)
    lines = LineCollection(list(segments), cmap="plasma", linewidths=1.1, alpha=0.85, array=affinities[drawn])
    ax.add_collection(lines)
    points = segments.reshape(-1, 2)
    ax.scatter(points[:, 0], points[:, 1], s=5, c=np.repeat(affinities[drawn], 2), cmap="plasma", zorder=3)
    ax.set(xlim=(0, offset + sizes[1][1]), ylim=(max(height for height, _ in sizes), 0))
    ax.set_axis_off()
    ax.set_title(title)
    beside = ax.inset_axes((1.02, 0.0, 0.03, 1.0))
    ax.figure.colorbar(lines, cax=beside, label="affinity")
    return ax


def picture(
    ax: Axes,
    image: Any,
    title: str = "",
    framed: bool = False,
    *,
    colour: str = "tab:orange",
    line: Any = "-",
) -> Axes:
    """Draw one image, with an optional frame to make it stand out.

    Args:
        ax: Axes to draw on.
        image: see `displayed`.
        title: title above the image.
        framed: draw a frame.
        colour: colour of the frame.
        line: style of its lines, as Matplotlib names it.

    Raises:
        ImageError: see `displayed`.
    """
    ax.imshow(displayed(image), **_SHADES)
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set(visible=framed, color=colour, linewidth=2, linestyle=line)
    ax.set_title(title, fontsize=7)
    return ax


def boxes(
    ax: Axes, corners: Sequence[tuple[float, float, float, float]], colour: str, line: Any = "-", fill: float = 0.0
) -> Axes:
    """Draw boxes on a picture, such as those of its objects.

    Args:
        ax: Axes with a picture.
        corners: left, top, right and bottom of each box, in pixels from the upper left corner of the picture; parts
            outside of it are not drawn.
        colour: colour of the lines.
        line: their style, as Matplotlib names it.
        fill: how much of the picture the colour covers within a box, from 0 to 1.
    """
    for left, top, right, bottom in corners:
        # Pixels have their centres at whole numbers.
        corner, size = (left - 0.5, top - 0.5), (right - left, bottom - top)
        if fill:
            ax.add_patch(Rectangle(corner, *size, facecolor=colour, alpha=fill, linewidth=0))
        # A white line below tells the box from a picture of its colour.
        ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=2.0, alpha=0.5))
        ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=1.3, linestyle=line))
    return ax


def _centres(grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Pixel coordinates (x, y) of the centres of a grid's locations, (S, 2)."""
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    x, y = (columns + 0.5) * size[1] / grid[1], (rows + 0.5) * size[0] / grid[0]
    return np.stack([x.ravel(), y.ravel()], axis=1)
