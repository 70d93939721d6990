"""Results -> matplotlib Axes.

Nothing here computes or saves; every function draws on the Axes it is given and returns it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

SEQUENTIAL = "viridis"
DIVERGING = "RdBu_r"
# More tick labels than this overlap at print size.
_MOST_TICKS = 40


def cka_heatmap(ax: Axes, grid: xr.DataArray, title: str = "", lowest: float = 0.0) -> Axes:
    """CKA of layers against layers, first layer at the lower left (paper, Figures 15-17).

    Args:
        ax: where to draw.
        grid: dimensions (layer_a, layer_b), values up to 1.
        title: above the panel.
        lowest: value of the darkest colour.
    """
    return _layer_heatmap(ax, grid, title, SEQUENTIAL, (lowest, 1.0), "CKA")


def difference_heatmap(ax: Axes, grid: xr.DataArray, title: str = "", limit: float | None = None) -> Axes:
    """Differences of CKA of layers against layers, white at 0 (paper, Figures 16 and 17, right).

    Args:
        ax: where to draw.
        grid: dimensions (layer_a, layer_b).
        title: above the panel.
        limit: value of the strongest colours; the largest difference where left out.
    """
    if limit is None:
        limit = float(np.nanmax(np.abs(grid.values), initial=0.0))
    limit = limit or 1e-6
    return _layer_heatmap(ax, grid, title, DIVERGING, (-limit, limit), "difference in CKA")


def diagonal_plot(ax: Axes, values: xr.DataArray, title: str = "", label: str = "") -> Axes:
    """A value per layer: one thin line a model, a thick one for their mean (paper, Figure 15, right).

    Args:
        ax: where to draw.
        values: dimensions (model, layer).
        title: above the panel.
        label: name of the mean in a legend.
    """
    layers = [str(name) for name in values["layer"].values]
    positions = np.arange(len(layers))
    (line,) = ax.plot(positions, values.mean("model").values, linewidth=2, marker="o", label=label or "mean")
    for row in values.values:
        ax.plot(positions, row, linewidth=0.8, alpha=0.5, color=line.get_color())
    ax.set_xticks(*_ticks(layers), rotation=90)
    ax.set_ylim(min(0.0, float(np.nanmin(values.values, initial=0.0))), 1.02)
    ax.set_ylabel("CKA, semantic against spatio-semantic")
    ax.grid(alpha=0.3)
    ax.set_title(title)
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
        ax.set_xticks(middles, names, rotation=90 if max(map(len, names)) > 2 else 0)
        ax.set_yticks(middles, names)
        ax.tick_params(length=0)
        for edge in starts[1:]:
            ax.axhline(edge - 0.5, color="white", linewidth=0.5)
            ax.axvline(edge - 0.5, color="white", linewidth=0.5)
    ax.set_title(title)
    ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.04)
    return ax


def _layer_heatmap(
    ax: Axes, grid: xr.DataArray, title: str, colours: str, limits: tuple[float, float], meaning: str
) -> Axes:
    image = ax.imshow(
        grid.values,
        cmap=colours,
        vmin=limits[0],
        vmax=limits[1],
        origin="lower",
        interpolation="nearest",
        aspect="equal",
    )
    ax.set_xticks(*_ticks([str(name) for name in grid["layer_b"].values]), rotation=90)
    ax.set_yticks(*_ticks([str(name) for name in grid["layer_a"].values]))
    ax.set_title(title)
    ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.04, label=meaning)
    return ax


def _ticks(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Positions and names of axis ticks, thinned out where they would overlap."""
    step = -(-len(names) // _MOST_TICKS)
    return list(range(0, len(names), step)), list(names[::step])
