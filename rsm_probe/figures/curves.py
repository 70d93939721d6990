"""Values by layer or by number of locations, with what is known of their spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsm_probe.figures.ticks import layer_ticks

# More places than this are layers, whose ticks may be thinned out.
_MOST_NAMES = 20


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
    ax.set_xticks(*layer_ticks(layers, ax), rotation=90)
    lowest = [float(np.nanmin(part.values, initial=0.0)) for part in (values, control) if part is not None]
    ax.set_ylim(min(ax.get_ylim()[0] if len(ax.lines) > 2 else 0.0, *lowest), 1.02)
    ax.set_ylabel("CKA, semantic against spatio-semantic")
    ax.grid(alpha=0.3)
    ax.set_title(title)
    return ax


def interval_plot(
    ax: Axes,
    places: Sequence[str],
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    title: str = "",
    meaning: str = "",
    chance: float | None = None,
) -> Axes:
    """Values with their intervals, side by side at each place (paper, Figure 3).

    Args:
        ax: where to draw.
        places: names along the x-axis, such as layers or numbers of locations.
        lines: name -> for each place the value and the ends of its interval, NaN where there is none.
        title: above the panel.
        meaning: of the values.
        chance: what nothing but chance gives; a dashed line.
    """
    for number, (name, points) in enumerate(lines.items()):
        values = np.array(points, dtype=np.float64).reshape(-1, 3)
        # Intervals of one place lie beside each other.
        at = np.arange(len(places)) + (number - (len(lines) - 1) / 2) * 0.6 / max(len(lines), 1)
        spread = np.abs(values[:, 1:] - values[:, :1]).T
        ax.errorbar(at, values[:, 0], yerr=spread, marker="o", markersize=3, linewidth=0.8, capsize=1.5, label=name)
    if chance is not None:
        ax.axhline(chance, color="grey", linestyle="--", linewidth=0.8)
    upright = 90 if max(map(len, places), default=0) > 4 else 0
    if len(places) > _MOST_NAMES:
        ax.set_xticks(*layer_ticks(places, ax), rotation=upright)
    else:  # models are in no order that a reader could continue
        ax.set_xticks(range(len(places)), list(places), rotation=upright, fontsize=8)
    ax.set_ylabel(meaning)
    ax.grid(alpha=0.3)
    ax.set_title(title)
    return ax


def common_legend(figure: Figure) -> Figure:
    """One legend below all panels, of the first panel's lines; the others have the same."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=7)
    return figure


def panel_letter(ax: Axes, letter: str) -> Axes:
    """A bold letter before the upper left corner of a panel, by which a text can name it."""
    ax.set_title(letter, loc="left", fontweight="bold", x=-0.03, ha="right")
    return ax
