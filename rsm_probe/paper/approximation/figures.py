"""Figures 5 and 6 of the paper, from our measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from rsm_probe.figures import (
    colour_bar,
    common_legend,
    interval_plot,
    joint_density,
    lettered,
    print_style,
    rule_styles,
    share_counts,
    short_names,
    spreads,
    thinned,
)
from rsm_probe.paper.by_matching import distinct
from rsm_probe.runs.tables import TableResult

# Layers that fit into one figure.
_MOST_LAYERS = 6


@dataclass(frozen=True)
class PicturedShares:
    """The data of one model in Figure 6.

    Attributes:
        title: title of the model.
        products: layer -> method -> matched products of all pairs, shape (pairs,).
    """

    title: str
    products: Mapping[str, Mapping[str, np.ndarray]]


@print_style()
def approximation_figures(result: TableResult) -> dict[str, Figure]:
    """Draw Figures 5 and 6 for every model."""
    figures = {}
    for model in result.pictured:
        figures[f"figure5-{model.title}"] = _shares(result, model.title)
        if "identity" in result.settings["matchings"]:
            figures[f"figure6-{model.title}"] = _anisotropy(model)
    return figures


def _shares(result: TableResult, model: str) -> Figure:
    """Draw shares of the optimum and times by layer (paper, Figure 5)."""
    rows = result.select(model=model)
    layers, exact = distinct(rows, "layer"), ("optimal", *result.settings["solvers"])
    locations = {row["layer"]: row["locations"] for row in rows}
    short, shared = short_names(layers)
    ticks = [f"{name} ({locations[layer]})" for name, layer in zip(short, layers, strict=True)]
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    quality, cost = figure.subplots(1, 2)
    lettered((quality, cost))
    # Methods that appear in both panels come first in the legend.
    methods = sorted(distinct(rows, "method"), key=lambda label: label in exact)
    lines, times, styles = {}, {}, rule_styles(methods)
    for label in methods:
        mine = {row["layer"]: row for row in rows if row["method"] == label}
        times[label] = [(mine[layer]["milliseconds"],) * 3 for layer in layers]
        if label not in exact:
            lines[label] = [tuple(mine[layer][key] for key in ("share", "low", "high")) for layer in layers]
    interval_plot(quality, ticks, lines, "matched product", "share of the optimum (ratio of sums)", styles=styles)
    interval_plot(cost, ticks, times, "one core, without affinities", "time per pair (ms)", styles=styles)
    _log_axis(cost)
    for ax in (quality, cost):
        ax.set_xlabel("layer (locations)" + (f", … = {shared}" if shared else ""))
    figure.suptitle(model)
    return common_legend(figure)


def _log_axis(ax: Axes) -> None:
    """A logarithmic y-axis with plain numbers: Matplotlib's own are math text, which `print_style` disables."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    # Decades alone say little where there is at most one.
    steps = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)
    ax.yaxis.set_major_locator(LogLocator(subs=steps))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _anisotropy(model: PicturedShares) -> Figure:
    """Draw spatio-semantic against semantic products of the same pairs, and the spread of their ratio (Figure 6)."""
    layers = thinned(list(model.products), _MOST_LAYERS)
    figure = Figure(figsize=(1.9 * (len(layers) + 1) + 0.5, 2.5), layout="constrained")
    axes = figure.subplots(1, len(layers) + 1)
    lettered(axes)
    short, shared = short_names(layers)
    ratios = {}
    for ax, layer, name in zip(axes, layers, short, strict=False):
        optimal, identity = (model.products[layer][method] for method in ("optimal", "identity"))
        meanings = "semantic product", "spatio-semantic product" if ax is axes[0] else ""
        joint_density(ax, optimal, identity, name, meanings, line=True)
        ax.xaxis.set_major_locator(MaxNLocator(3))  # long numbers stand side by side
        known = optimal > 0
        ratios[name] = identity[known] / optimal[known]
    share_counts(axes[:-1])
    colour_bar(axes[-2], "pairs per hexagon")
    spreads(axes[-1], ratios, "ratio of each pair", "spatio-semantic / semantic")
    axes[-1].set_box_aspect(1)
    axes[-1].set_xlabel("layer")
    figure.suptitle(model.title + (f", … = {shared}" if shared else ""))
    return figure
