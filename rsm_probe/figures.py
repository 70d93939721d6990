"""Results -> matplotlib Axes.

Nothing here computes or saves; every function draws on the Axes it is given and returns it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.font_manager import FontProperties

SEQUENTIAL = "viridis"
DIVERGING = "RdBu_r"
# More labels of classes than this overlap.
_MOST_TICKS = 40


def cka_heatmap(ax: Axes, grid: xr.DataArray, title: str = "", lowest: float = 0.0, bar: bool = True) -> Axes:
    """CKA of layers against layers, first layer at the lower left (paper, Figures 15-17).

    Args:
        ax: where to draw.
        grid: dimensions (layer_a, layer_b), values up to 1; undefined ones stay grey.
        title: above the panel.
        lowest: value of the darkest colour.
        bar: draw a colour bar beside the panel; several panels of one scale can share one.
    """
    return _layer_heatmap(ax, grid, title, SEQUENTIAL, (lowest, 1.0), "CKA" if bar else None)


def difference_heatmap(
    ax: Axes, grid: xr.DataArray, title: str = "", limit: float | None = None, bar: bool = True
) -> Axes:
    """Differences of CKA of layers against layers, white at 0 (paper, Figures 16 and 17, right).

    Args:
        ax: where to draw.
        grid: dimensions (layer_a, layer_b).
        title: above the panel.
        limit: value of the strongest colours; the largest difference where left out.
        bar: draw a colour bar beside the panel.
    """
    if limit is None:
        limit = float(np.nanmax(np.abs(grid.values), initial=0.0))
    limit = limit or 1e-6
    return _layer_heatmap(ax, grid, title, DIVERGING, (-limit, limit), "difference in CKA" if bar else None)


def diagonal_plot(
    ax: Axes, values: xr.DataArray, title: str = "", label: str = "", control: xr.DataArray | None = None
) -> Axes:
    """A value per layer: the mean over models, and a band from the smallest to the largest (paper, Figure 15, right).

    Args:
        ax: where to draw; further calls draw further lines.
        values: dimensions (model, layer).
        title: above the panel.
        label: name of the line in a legend.
        control: (layer,), of an untrained network; dashed.
    """
    layers = [str(name) for name in values["layer"].values]
    positions = np.arange(len(layers))
    label = label or ("mean" if len(values) > 1 else "")
    (line,) = ax.plot(positions, values.mean("model").values, marker="o", markersize=3, label=label)
    if len(values) > 1:
        low, high = values.min("model").values, values.max("model").values
        ax.fill_between(positions, low, high, alpha=0.25, linewidth=0, color=line.get_color())
    if control is not None:
        name = f"{label}, untrained" if label else "untrained"
        ax.plot(positions, control.values, linestyle="--", linewidth=1, color=line.get_color(), label=name)
    ax.set_xticks(*_ticks(layers, ax), rotation=90)
    lowest = [float(np.nanmin(part.values, initial=0.0)) for part in (values, control) if part is not None]
    ax.set_ylim(min(ax.get_ylim()[0] if len(ax.lines) > 2 else 0.0, *lowest), 1.02)
    ax.set_ylabel("CKA, semantic against spatio-semantic")
    ax.grid(alpha=0.3)
    ax.set_title(title)
    return ax


def panel_letter(ax: Axes, letter: str) -> Axes:
    """A bold letter before the upper left corner of a panel, by which a text can name it."""
    ax.set_title(letter, loc="left", fontweight="bold", x=-0.03, ha="right")
    return ax


def rsm_heatmap(ax: Axes, values: np.ndarray, labels: Sequence[str], title: str = "") -> Axes:
    """One RSM, with a tick in the middle of every run of equal labels; the images come sorted by label.

    Args:
        ax: where to draw.
        values: similarities, (N, N).
        labels: N labels, sorted; may be empty texts.
        title: above the panel.
    """
    # The diagonal holds each image with itself and would take most of the colour scale.
    others = values[~np.eye(len(values), dtype=bool)]
    low, high = (float(others.min()), float(others.max())) if others.size else (0.0, 1.0)
    image = ax.imshow(values, cmap=SEQUENTIAL, vmin=low, vmax=high, interpolation="nearest")
    starts = [k for k, label in enumerate(labels) if k == 0 or label != labels[k - 1]]
    ends = [*starts[1:], len(labels)]
    if any(labels) and 1 < len(starts) <= _MOST_TICKS:
        middles = [(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)]
        names = [labels[k] for k in starts]
        size = min(9.0, 110 / len(names))  # many names are written small
        ax.set_xticks(middles, names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=size)
        ax.set_yticks(middles, names, fontsize=size)
        ax.tick_params(length=0)
        for edge in starts[1:]:
            ax.axhline(edge - 0.5, color="white", linewidth=0.4)
            ax.axvline(edge - 0.5, color="white", linewidth=0.4)
    ax.set_title(title)
    ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.04)
    return ax


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


def _centres(grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Where the locations of a grid lie in a picture: (S, 2), x and y in pixels."""
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    x, y = (columns + 0.5) * size[1] / grid[1], (rows + 0.5) * size[0] / grid[0]
    return np.stack([x.ravel(), y.ravel()], axis=1)


def _layer_heatmap(
    ax: Axes, grid: xr.DataArray, title: str, colours: str, limits: tuple[float, float], meaning: str | None
) -> Axes:
    ax.set_facecolor("lightgrey")
    image = ax.imshow(
        grid.values,
        cmap=colours,
        vmin=limits[0],
        vmax=limits[1],
        origin="lower",
        interpolation="nearest",
        aspect="equal",
    )
    ax.set_xticks(*_ticks([str(name) for name in grid["layer_b"].values], ax), rotation=90)
    ax.set_yticks(*_ticks([str(name) for name in grid["layer_a"].values], ax))
    ax.set_title(title)
    if meaning is not None:
        ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.04, label=meaning)
    return ax


def _ticks(names: Sequence[str], ax: Axes) -> tuple[list[int], list[str]]:
    """Positions and names of axis ticks, thinned out where they would overlap."""
    width = ax.get_window_extent().width / ax.figure.dpi * 72
    room = max(2, int(width / (1.25 * _tick_points())))
    step = -(-len(names) // room)
    return list(range(0, len(names), step)), list(names[::step])


def _tick_points() -> float:
    return FontProperties(size=rcParams["xtick.labelsize"]).get_size_in_points()
