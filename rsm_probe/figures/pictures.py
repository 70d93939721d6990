"""Images, and which of their locations answer to each other."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection


def matched_locations(
    ax: Axes,
    images: tuple[np.ndarray, np.ndarray],
    grids: tuple[tuple[int, int], tuple[int, int]],
    permutation: np.ndarray,
    affinities: np.ndarray,
    most: int = 60,
    title: str = "",
) -> Axes:
    """Two images side by side, with lines between locations that answer to each other (paper, Figure 1).

    Args:
        ax: where to draw.
        images: two pictures, (H, W, 3) or (H, W), of any size.
        grids: (rows, columns) of the locations of each, row by row.
        permutation: (S,), the partner of every location of the first image, -1 where it has none.
        affinities: (S,), what each pair adds to the similarity; it colours the line.
        most: how many lines to draw at most: those of the largest affinities.
        title: above the panel.
    """
    sizes = [picture.shape[:2] for picture in images]
    gap = 0.06 * max(width for _, width in sizes)
    offset = sizes[0][1] + gap
    shades: dict[str, Any] = {"cmap": "gray"} if images[0].ndim == 2 else {}
    for picture, (height, width), left in zip(images, sizes, (0.0, offset), strict=True):
        ax.imshow(picture, extent=(left, left + width, height, 0), interpolation="nearest", **shades)
    matched = np.flatnonzero(permutation >= 0)
    # The strongest are drawn last, above the others.
    shown = matched[np.argsort(affinities[matched], kind="stable")][-most:]
    ends = [_centres(grid, size) for grid, size in zip(grids, sizes, strict=True)]
    segments = np.stack([ends[0][shown], ends[1][permutation[shown]] + [offset, 0]], axis=1)
    lines = LineCollection(list(segments), cmap="plasma", linewidths=1.1, alpha=0.85, array=affinities[shown])
    ax.add_collection(lines)
    points = segments.reshape(-1, 2)
    ax.scatter(points[:, 0], points[:, 1], s=5, c=np.repeat(affinities[shown], 2), cmap="plasma", zorder=3)
    ax.set_xlim(0, offset + sizes[1][1])
    ax.set_ylim(max(height for height, _ in sizes), 0)
    ax.set_axis_off()
    ax.set_title(title)
    ax.figure.colorbar(lines, ax=ax, fraction=0.025, pad=0.02, label="affinity")
    return ax


def picture(ax: Axes, image: np.ndarray, title: str = "", framed: bool = False) -> Axes:
    """One image, framed where it is the one in question.

    Args:
        ax: where to draw.
        image: (H, W, 3) or (H, W).
        title: above it.
        framed: draw a frame.
    """
    ax.imshow(image, cmap="gray" if image.ndim == 2 else None, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    for side in ax.spines.values():
        side.set_visible(framed)
        side.set_color("tab:orange")
        side.set_linewidth(2)
    ax.set_title(title, fontsize=7)
    return ax


def _centres(grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Where the locations of a grid lie in a picture: (S, 2), x and y in pixels."""
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    x, y = (columns + 0.5) * size[1] / grid[1], (rows + 0.5) * size[0] / grid[0]
    return np.stack([x.ravel(), y.ravel()], axis=1)
