"""Figures 5 and 6 of the paper, from our measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from rsm_probe.figures import interval_plot, joint_density, names_as_written, spreads, thinned
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


@names_as_written()
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
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    quality, cost = figure.subplots(1, 2)
    # Methods that appear in both panels come first, so that each has one colour.
    methods = sorted(distinct(rows, "method"), key=lambda label: label in exact)
    lines, times = {}, {}
    for label in methods:
        mine = [row for row in rows if row["method"] == label]
        times[label] = [(row["milliseconds"], row["milliseconds"], row["milliseconds"]) for row in mine]
        if label not in exact:
            lines[label] = [(row["share"], row["low"], row["high"]) for row in mine]
    interval_plot(quality, layers, lines, f"{model}: share of the optimum", "ratio of sums")
    interval_plot(cost, layers, times, "time per pair on one core", "ms")
    cost.set_yscale("log")
    # Matplotlib's default labels of a log axis are math text, which `names_as_written` disables.
    cost.yaxis.set_major_formatter(LogFormatter())
    cost.yaxis.set_minor_formatter(LogFormatter())
    quality.legend(fontsize=6)
    cost.legend(fontsize=6, ncols=2)
    return figure


def _anisotropy(model: PicturedShares) -> Figure:
    """Draw spatio-semantic against semantic products of the same pairs, and the spread of their ratio (Figure 6)."""
    layers = thinned(list(model.products), _MOST_LAYERS)
    figure = Figure(figsize=(2.5 * (len(layers) + 1), 2.9), layout="constrained")
    axes = figure.subplots(1, len(layers) + 1)
    ratios = {}
    for ax, layer in zip(axes, layers, strict=False):
        optimal, identity = (model.products[layer][method] for method in ("optimal", "identity"))
        joint_density(ax, optimal, identity, layer, ("optimal", "identity"), line=True)
        known = optimal > 0
        ratios[layer] = identity[known] / optimal[known]
    spreads(axes[-1], ratios, "ratio of each pair", "identity / optimal")
    figure.suptitle(model.title)
    return figure
