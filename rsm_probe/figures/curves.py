"""Values per layer or per number of locations, with their spread."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from matplotlib.transforms import ScaledTranslation

from rsm_probe.figures.line_styles import RuleStyle
from rsm_probe.figures.style import font_points, labelled
from rsm_probe.figures.ticks import name_layers, thinned

# With more names than this along an axis, take them for layers, whose ticks may be thinned.
_MOST_NAMES = 20
# Points between the intervals of two lines at the same position, and the share of the distance between two positions
# that all lines together may take.
_APART, _SHARE = 3.0, 0.6
# Markers of the lines of a panel, to tell them apart in grey print.
_MARKERS = "os^Dv"


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
    marker = _MARKERS[len(ax.lines) % len(_MARKERS)]
    (line,) = ax.plot(positions, values.mean("model").values, marker=marker, markersize=3, label=label)
    if len(values) > 1:
        low, high = values.min("model").values, values.max("model").values
        ax.fill_between(positions, low, high, alpha=0.25, linewidth=0, color=line.get_color())
    if control is not None:
        name = f"{label}, untrained" if label else "untrained"
        ax.plot(positions, control.values, linestyle="--", linewidth=1, color=line.get_color(), label=name)
    name_layers(ax.xaxis, layers, rotation=90)
    lowest = [float(np.nanmin(part.values, initial=0.0)) for part in (values, control) if part is not None]
    ax.set_ylim(min(ax.get_ylim()[0] if len(ax.lines) > 2 else 0.0, *lowest), 1.02)
    ax.grid(alpha=0.3)
    return labelled(ax, title, y="CKA, semantic against spatio-semantic")


def interval_plot(
    ax: Axes,
    positions: Sequence[str] | Sequence[float],
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    title: str = "",
    meaning: str = "",
    chance: float | None = None,
    *,
    styles: Mapping[str, RuleStyle] | None = None,
    joined: bool = True,
) -> Axes:
    """Plot values with their intervals at each position (paper, Figures 3 and 5).

    All lines have their points at the same coordinates. They are drawn a few points apart, so that their intervals do
    not hide each other.

    Args:
        ax: Axes to draw on.
        positions: names along the x-axis, such as layers, with equal distances; or positive numbers, such as numbers
            of locations, on a logarithmic axis.
        lines: for each name, the value and the ends of its interval at each position; NaN if undefined.
        title: title of the panel.
        meaning: label of the values.
        chance: value expected by chance; drawn as a dashed line.
        styles: name of a line -> its colour and marker; by default, Matplotlib's colours.
        joined: connect the points of a line; for positions that have an order.
    """
    numbers = [float(position) for position in positions if not isinstance(position, str)]
    x = np.array(numbers) if numbers else np.arange(len(positions))
    if numbers:
        ax.set_xscale("log", base=2)
    apart = _points_apart(ax, len(positions), len(lines))
    for number, (name, points) in enumerate(lines.items()):
        values = np.array(points, dtype=np.float64).reshape(-1, 3)
        spread = np.abs(values[:, 1:] - values[:, :1]).T
        inches = (number - (len(lines) - 1) / 2) * apart / 72
        options = styles[name].options() if styles else {"marker": _MARKERS[number % len(_MARKERS)]}
        line, caps, bars = ax.errorbar(
            x,
            values[:, 0],
            yerr=spread,
            linestyle="-" if joined else "none",
            linewidth=0.8,
            elinewidth=0.8,
            capsize=1.5,
            markersize=3.5,
            label=name,
            **options,
        )
        # Afterwards, because Matplotlib finds no limits of the axes for lines with an offset.
        aside = ScaledTranslation(inches, 0, ax.figure.dpi_scale_trans)
        for part in (line, *caps, *bars):
            part.set_transform(part.get_transform() + aside)
    if chance is not None:
        ax.axhline(chance, color="grey", linestyle="--", linewidth=0.8, zorder=0)
    _name_positions(ax, positions, x)
    ax.grid(alpha=0.3)
    return labelled(ax, title, y=meaning)


def _points_apart(ax: Axes, positions: int, lines: int) -> float:
    """The distance of two lines in points, such that all lines of a position stay nearer to it than to the next."""
    width = ax.get_window_extent().width / ax.figure.dpi * 72
    return min(_APART, _SHARE * width / max(positions, 1) / max(lines, 1))


def _name_positions(ax: Axes, positions: Sequence[str] | Sequence[float], x: np.ndarray) -> None:
    """Set the ticks and the ends of the x-axis."""
    names = [position if isinstance(position, str) else f"{position:g}" for position in positions]
    rotation = 90 if max(map(len, names), default=0) > 4 else 0
    numeric = any(not isinstance(position, str) for position in positions)
    if len(names) > _MOST_NAMES and not numeric:
        name_layers(ax.xaxis, names, rotation)
    else:  # show every model: readers cannot infer missing names
        ticks = thinned(list(range(len(names))), _MOST_NAMES)
        ax.set_xticks(x[ticks], [names[k] for k in ticks], rotation=rotation, fontsize=font_points("xtick.labelsize"))
    ax.xaxis.set_minor_locator(NullLocator())
    if len(x):
        # Half a step beside the first and the last position, where the lines of a position spread.
        ends = (x.min() / 2**0.5, x.max() * 2**0.5) if numeric else (-0.5, len(x) - 0.5)
        ax.set_xlim(*ends)


def common_legend(figure: Figure) -> Figure:
    """Draw one legend below all panels, with the lines of all of them; names that do not fit in a row begin another."""
    named = {name: handle for ax in figure.axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    if named:
        # A letter is about 0.55 times as wide as it is high, and a handle takes about seven letters.
        letters = sum(len(name) + 7 for name in named)
        rows = math.ceil(letters * 0.55 * font_points("legend.fontsize") / (72 * figure.get_size_inches()[0]))
        columns = math.ceil(len(named) / max(1, rows))
        figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=columns)
    return figure
