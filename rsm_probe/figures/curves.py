"""Values per layer or per number of locations, with their spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsm_probe.figures.style import labelled
from rsm_probe.figures.ticks import layer_ticks

# With more names than this along an axis, take them for layers, whose ticks may be thinned.
_MOST_NAMES = 20


def diagonal_plot(
    ax: Axes, values: xr.DataArray, title: str = "", label: str = "", control: xr.DataArray | None = None
) -> Axes:
    """Plot a value per layer: the mean over models and a band from minimum to maximum (paper, Figure 15, right).

    Args:
        ax: Axes to draw on; further calls add lines.
        values: dimensions (model, layer).
        title: title of the panel.
        label: name of the line in the legend.
        control: values of an untrained network, (layer,); drawn as a dashed line.
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
    ax.set_xticks(*layer_ticks(layers, ax), rotation=90)
    lowest = [float(np.nanmin(part.values, initial=0.0)) for part in (values, control) if part is not None]
    ax.set_ylim(min(ax.get_ylim()[0] if len(ax.lines) > 2 else 0.0, *lowest), 1.02)
    ax.grid(alpha=0.3)
    return labelled(ax, title, y="CKA, semantic against spatio-semantic")


def interval_plot(
    ax: Axes,
    positions: Sequence[str],
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    title: str = "",
    meaning: str = "",
    chance: float | None = None,
) -> Axes:
    """Plot values with their intervals, side by side at each position (paper, Figure 3).

    Args:
        ax: Axes to draw on.
        positions: names along the x-axis, such as layers or numbers of locations.
        lines: for each name, the value and the ends of its interval at each position; NaN if undefined.
        title: title of the panel.
        meaning: label of the values.
        chance: value expected by chance; drawn as a dashed line.
    """
    for number, (name, points) in enumerate(lines.items()):
        values = np.array(points, dtype=np.float64).reshape(-1, 3)
        # Offset the lines, so that their intervals do not overlap.
        x = np.arange(len(positions)) + (number - (len(lines) - 1) / 2) * 0.6 / max(len(lines), 1)
        spread = np.abs(values[:, 1:] - values[:, :1]).T
        ax.errorbar(x, values[:, 0], yerr=spread, marker="o", markersize=3, linewidth=0.8, capsize=1.5, label=name)
    if chance is not None:
        ax.axhline(chance, color="grey", linestyle="--", linewidth=0.8)
    rotation = 90 if max(map(len, positions), default=0) > 4 else 0
    if len(positions) > _MOST_NAMES:
        ax.set_xticks(*layer_ticks(positions, ax), rotation=rotation)
    else:  # show every model: readers cannot infer missing names
        ax.set_xticks(range(len(positions)), list(positions), rotation=rotation, fontsize=8)
    ax.grid(alpha=0.3)
    return labelled(ax, title, y=meaning)


def common_legend(figure: Figure) -> Figure:
    """Draw one legend below all panels, with the lines of the first panel, which all panels share."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=7)
    return figure


def panel_letter(ax: Axes, letter: str) -> Axes:
    """Put a bold letter at the upper left of a panel, so that a text can refer to it."""
    ax.set_title(letter, loc="left", fontweight="bold", x=-0.03, ha="right")
    return ax
