"""Heatmaps: CKA between layers or over training, differences in CKA, and RSMs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from rsm_probe.figures.ticks import layer_ticks

SEQUENTIAL = "viridis"
DIVERGING = "RdBu_r"
# More class labels would overlap.
_MOST_TICKS = 40


def cka_heatmap(ax: Axes, grid: xr.DataArray, title: str = "", lowest: float = 0.0, bar: bool = True) -> Axes:
    """Draw CKA between layers, with the first layer at the lower left (paper, Figures 15-17), or over training steps.

    Args:
        ax: Axes to draw on.
        grid: two dimensions whose coordinates name rows and columns, such as (layer_a, layer_b) or (layer, step);
            values up to 1; undefined values are grey. Steps have equal widths, whatever lies between them.
        title: title of the panel.
        lowest: value of the darkest colour.
        bar: draw a colour bar beside the panel; panels of the same scale can share one.
    """
    return _heatmap(ax, grid, title, SEQUENTIAL, (lowest, 1.0), "CKA" if bar else None)


def difference_heatmap(
    ax: Axes, grid: xr.DataArray, title: str = "", limit: float | None = None, bar: bool = True
) -> Axes:
    """Draw differences in CKA, white at 0 (paper, Figures 16 and 17, right).

    Args:
        ax: Axes to draw on.
        grid: as for `cka_heatmap`.
        title: title of the panel.
        limit: value of the strongest colours; by default the largest difference.
        bar: draw a colour bar beside the panel.
    """
    if limit is None:
        limit = float(np.nanmax(np.abs(grid.values), initial=0.0))
    limit = limit or 1e-6
    return _heatmap(ax, grid, title, DIVERGING, (-limit, limit), "difference in CKA" if bar else None)


def rsm_heatmap(ax: Axes, values: np.ndarray, labels: Sequence[str], title: str = "") -> Axes:
    """Draw one RSM, whose images are sorted by label, with a tick in the middle of each run of equal labels.

    Args:
        ax: Axes to draw on.
        values: similarities, (N, N).
        labels: N sorted labels; may be empty texts.
        title: title of the panel.
    """
    # The diagonal compares images with themselves and would use up most of the colour scale.
    others = values[~np.eye(len(values), dtype=bool)]
    low, high = (float(others.min()), float(others.max())) if others.size else (0.0, 1.0)
    image = ax.imshow(values, cmap=SEQUENTIAL, vmin=low, vmax=high, interpolation="nearest")
    starts = [k for k, label in enumerate(labels) if k == 0 or label != labels[k - 1]]
    ends = [*starts[1:], len(labels)]
    if any(labels) and 1 < len(starts) <= _MOST_TICKS:
        middles = [(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)]
        names = [labels[k] for k in starts]
        size = min(9.0, 110 / len(names))  # many names need a small font
        ax.set_xticks(middles, names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=size)
        ax.set_yticks(middles, names, fontsize=size)
        ax.tick_params(length=0)
        for edge in starts[1:]:
            ax.axhline(edge - 0.5, color="white", linewidth=0.4)
            ax.axvline(edge - 0.5, color="white", linewidth=0.4)
    ax.set_title(title)
    ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.04)
    return ax


def _heatmap(
    ax: Axes, grid: xr.DataArray, title: str, colours: str, limits: tuple[float, float], meaning: str | None
) -> Axes:
    ax.set_facecolor("lightgrey")
    # Square cells where rows and columns are of one kind, as in (layer_a, layer_b); else a square panel.
    alike = len({str(dimension).removesuffix("_a").removesuffix("_b") for dimension in grid.dims}) == 1
    image = ax.imshow(
        grid.values,
        cmap=colours,
        vmin=limits[0],
        vmax=limits[1],
        origin="lower",
        interpolation="nearest",
        aspect="equal" if alike else "auto",
    )
    if not alike:
        ax.set_box_aspect(1)
    rows, columns = ([str(name) for name in grid[dimension].values] for dimension in grid.dims)
    ax.set_xticks(*layer_ticks(columns, ax), rotation=90)
    ax.set_yticks(*layer_ticks(rows, ax))
    ax.set_title(title)
    if meaning is not None:
        ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.04, label=meaning)
    return ax
