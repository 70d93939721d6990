"""Heatmaps: CKA between layers or over training, differences in CKA, and RSMs, with colour bars as high as a panel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import FuncFormatter, NullFormatter
from matplotlib.transforms import Bbox

from rsm_probe.figures.style import font_points
from rsm_probe.figures.ticks import name_layers, thinned

SEQUENTIAL = "viridis"
DIVERGING = "RdBu_r"
# Font sizes of class labels in points: with more labels, they shrink, and below the smallest size they are thinned.
_LARGEST, _SMALLEST = 9.0, 5.0
# Points of one side of a panel that labels may take.
_SIDE = 110


def cka_heatmap(
    ax: Axes,
    grid: xr.DataArray,
    title: str = "",
    lowest: float = 0.0,
    bar: bool = True,
    *,
    norm: Normalize | None = None,
) -> Axes:
    """Draw CKA between layers, with the first layer at the lower left (paper, Figures 15-17), or over training steps.

    Args:
        ax: Axes to draw on.
        grid: two dimensions whose coordinates name rows and columns, such as (layer_a, layer_b) or (layer, step);
            values up to 1; undefined values are grey. Steps have equal widths, whatever lies between them.
        title: title of the panel.
        lowest: value of the darkest colour.
        bar: draw a colour bar beside the panel; panels of the same scale can share one.
        norm: the scale of the colours, for panels that share one; by default from `lowest` to 1.
    """
    norm = Normalize(lowest, 1.0) if norm is None else norm
    return _heatmap(ax, grid, title, SEQUENTIAL, norm, "CKA" if bar else None)


def difference_heatmap(
    ax: Axes,
    grid: xr.DataArray,
    title: str = "",
    limit: float | None = None,
    bar: bool = True,
    *,
    norm: Normalize | None = None,
) -> Axes:
    """Draw differences in CKA, white at 0 (paper, Figures 16 and 17, right).

    Args:
        ax: Axes to draw on.
        grid: as for `cka_heatmap`.
        title: title of the panel.
        limit: value of the strongest colours; by default the largest difference.
        bar: draw a colour bar beside the panel.
        norm: the scale of the colours, for panels that share one; by default from `-limit` to `limit`.
    """
    norm = symmetric([grid] if limit is None else [], limit or 0.0) if norm is None else norm
    return _heatmap(ax, grid, title, DIVERGING, norm, "difference in CKA" if bar else None)


def symmetric(grids: Sequence[xr.DataArray], least: float = 0.0) -> Normalize:
    """The scale of differences, with 0 in its middle; it includes all values and `least`."""
    limit = max((float(np.nanmax(np.abs(grid.values), initial=0.0)) for grid in grids), default=0.0)
    limit = max(limit, least) or 1e-6
    return Normalize(-limit, limit)


def rsm_heatmap(
    ax: Axes,
    values: np.ndarray,
    labels: Sequence[str],
    title: str = "",
    *,
    norm: Normalize | None = None,
    bar: bool = True,
    meaning: str = "similarity",
    columns: Sequence[str] | None = None,
) -> Axes:
    """Draw one RSM, whose images are sorted by label, with a tick in the middle of each run of equal labels.

    Args:
        ax: Axes to draw on.
        values: similarities, (N, N); or (N, M) of two sets of images.
        labels: N sorted labels; may be empty texts. If not all fit, some get no tick, but never the first and last.
        title: title of the panel.
        norm: the scale of the colours, for panels that share one; see `rsm_scale`.
        bar: draw a colour bar beside the panel.
        meaning: label of the colour bar.
        columns: M sorted labels of the images in the columns, if they are not those in the rows.
    """
    if norm is None:
        norm = rsm_scale([values]) if columns is None else Normalize(float(np.nanmin(values)), float(np.nanmax(values)))
    ax.imshow(values, cmap=SEQUENTIAL, norm=norm, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    _name_runs(ax.yaxis, labels)
    _name_runs(ax.xaxis, labels if columns is None else columns)
    ax.set_title(title)
    if bar:
        colour_bar(ax, meaning, extend=beyond([values], norm))
    return ax


def _name_runs(axis: XAxis | YAxis, labels: Sequence[str]) -> None:
    """Name the runs of equal labels along one axis of an RSM, with lines between them."""
    starts = [k for k, label in enumerate(labels) if k == 0 or label != labels[k - 1]]
    ends = [*starts[1:], len(labels)]
    if not any(labels) or len(starts) < 2:
        return
    runs = thinned(list(zip(starts, ends, strict=True)), int(_SIDE / _SMALLEST))
    names = [labels[a] for a, _ in runs]
    size = min(font_points("xtick.labelsize"), _LARGEST, _SIDE / len(names))
    # A letter is about 0.6 times as wide as it is high.
    upright = axis.axis_name == "x" and sum(map(len, names)) * 0.6 * size >= _SIDE
    axis.set_ticks([(a + b - 1) / 2 for a, b in runs], names, rotation=90 if upright else 0, fontsize=size)
    axis.set_tick_params(length=0)
    for edge in starts[1:]:
        line = axis.axes.axvline if axis.axis_name == "x" else axis.axes.axhline
        line(edge - 0.5, color="white", linewidth=0.4)


def rsm_scale(rsms: Sequence[np.ndarray]) -> Normalize:
    """The scale of RSMs (N, N) side by side, from the least to the greatest similarity of two different images.

    The diagonals compare images with themselves and would use up most of the scale.
    """
    others = [values[~np.eye(len(values), dtype=bool)] for values in rsms]
    every = np.concatenate([values[np.isfinite(values)] for values in others]) if others else np.zeros(0)
    return Normalize(float(every.min()), float(every.max())) if every.size else Normalize(0.0, 1.0)


def colour_bar(ax: Axes, meaning: str, *, extend: str = "neither") -> Axes:
    """Draw the colour bar of the last image or collection of a panel beside it, as high as the panel.

    Args:
        ax: a panel; others of the same scale may stand to its left.
        meaning: label of the values.
        extend: "min", "max" or "both" if colours stand for values beyond the scale.
    """
    return _bar(ax, ax.inset_axes((1.04, 0.0, 0.06, 1.0)), meaning, extend)


def tall_bar(panels: Sequence[Axes], beside: Axes, meaning: str, *, extend: str = "neither") -> Axes:
    """Draw one colour bar for panels one above the other, from the upper end of the first to the lower end of the last.

    Args:
        panels: panels of the same scale, from top to bottom.
        beside: Axes for the bar, in a column of their own.
        meaning: label of the values.
        extend: as for `colour_bar`.
    """

    def between(_: Any, __: Any) -> Bbox:
        column = beside.get_position(original=True)
        return Bbox.from_extents(column.x0, panels[-1].get_position().y0, column.x1, panels[0].get_position().y1)

    # Panels with square cells are smaller than their part of the figure. The bar makes room for its own extensions.
    beside.set_axes_locator(between)
    return _bar(panels[0], beside, meaning, extend)


def _bar(ax: Axes, beside: Axes, meaning: str, extend: str) -> Axes:
    drawn = (ax.images or ax.collections)[-1]
    # Extensions within the height of the panel.
    options: dict[str, Any] = {} if extend == "neither" else {"extend": extend, "extendfrac": 0.04}
    if isinstance(drawn.norm, LogNorm):
        # Matplotlib's own labels are math text, which `names_as_written` disables.
        options["format"] = FuncFormatter(lambda value, _: f"{value:g}")
    ax.figure.colorbar(drawn, cax=beside, label=meaning, **options)
    beside.yaxis.set_minor_formatter(NullFormatter())
    return beside


def beyond(values: Sequence[np.ndarray], norm: Normalize) -> str:
    """Which values, of any shape, lie beyond a scale: "neither", "min", "max" or "both"; see `colour_bar`."""
    assert norm.vmin is not None
    assert norm.vmax is not None
    below = any((np.nan_to_num(part, nan=norm.vmin) < norm.vmin).any() for part in values)
    above = any((np.nan_to_num(part, nan=norm.vmax) > norm.vmax).any() for part in values)
    return "both" if below and above else "min" if below else "max" if above else "neither"


def _heatmap(ax: Axes, grid: xr.DataArray, title: str, colours: str, norm: Normalize, meaning: str | None) -> Axes:
    ax.set_facecolor("lightgrey")
    # Square cells where rows and columns are of one kind, as in (layer_a, layer_b); else a square panel.
    alike = len({str(dimension).removesuffix("_a").removesuffix("_b") for dimension in grid.dims}) == 1
    ax.imshow(
        grid.values,
        cmap=colours,
        norm=norm,
        origin="lower",
        interpolation="nearest",
        aspect="equal" if alike else "auto",
    )
    if not alike:
        ax.set_box_aspect(1)
    rows, columns = ([str(name) for name in grid[dimension].values] for dimension in grid.dims)
    name_layers(ax.xaxis, columns, rotation=90)
    name_layers(ax.yaxis, rows)
    ax.set_title(title)
    if meaning is not None:
        colour_bar(ax, meaning)
    return ax
