"""Table 5 and Figures 5 and 6 of the paper, as measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from rsm_probe.figures import interval_plot, joint_density, names_as_written, spreads
from rsm_probe.runs.tables import TableResult, accuracy_line, escaped, markdown, shown, with_interval

if TYPE_CHECKING:
    from rsm_probe.paper.approximation.study import ApproximationConfig

_INTRODUCTION = """# Approximation quality (paper, section 4.4 and appendix F; Figures 5 and 6, Table 5)

Random pairs of images, representations {centred}. *share*: what a matching reaches of the optimum, as a ratio of sums
over pairs, with the interval ({level:.0%}) over pairs; *5 % to 95 %*: from pair to pair. *ms*: the median time of a
pair on one core, from the affinity to the matching; methods that read no affinity compute what they need of it within
that time, and methods that are not symmetric run both ways. Exact solvers of others are timed on the first
{solver_pairs} pairs.
"""
# Layers that fit on a figure.
_MOST_LAYERS = 6


def approximation_report(config: ApproximationConfig, result: TableResult, accuracies: Mapping[str, float]) -> str:
    """One table for each model: layers and methods in rows."""
    centred = "as they are" if config.centering is None else "less the mean of each channel"
    parts = [
        _INTRODUCTION.format(centred=centred, level=config.level, solver_pairs=config.solver_pairs),
        accuracy_line(accuracies),
    ]
    stated = any(not math.isnan(row["paper_share"]) for row in result.table)
    for model in dict.fromkeys(row["model"] for row in result.table):
        lines = []
        for row in result.select(model=model):
            share = with_interval(row, "share", digits=4)
            line = [
                row["layer"],
                row["locations"],
                row["method"],
                share,
                "-" if math.isnan(row["share_5"]) else f"{row['share_5']:.3f} to {row['share_95']:.3f}",
            ]
            line += [f"{row['milliseconds']:.3g}", row["pairs"]]
            paper = [shown(row["paper_share"]), "-" if math.isnan(ms := row["paper_milliseconds"]) else f"{ms:.3g}"]
            lines.append(line + (paper if stated else []))
        headings = ["layer", "S", "matching", "share", "5 % to 95 %", "ms", "pairs"]
        parts += [
            f"## {escaped(model)}\n",
            markdown(headings + (["paper, share", "paper, ms"] if stated else []), lines),
        ]
    if stated:
        parts.append(
            "*paper*: Table 5, means over pairs of the ratio and of the time, of a ResNet-101 on another processor, "
            "for layers of so many locations."
        )
    else:
        parts.append(
            "Model and images are not those of the paper's Table 5, so that its numbers do not stand beside these."
        )
    return "\n".join(part for part in parts if part) + "\n"


@names_as_written()
def approximation_figures(config: ApproximationConfig, result: TableResult, out: Path) -> dict[str, Figure]:
    """Figures 5 and 6 for every model."""
    figures = {}
    for subject in config.subjects(out):
        figures[f"figure5-{subject.title}"] = _shares(config, result, subject.title)
        layers = list(subject.layers["images"].values())
        shown_ones = layers if len(layers) <= _MOST_LAYERS else [
            layers[k] for k in np.linspace(0, len(layers) - 1, _MOST_LAYERS).astype(int)
        ]  # fmt: skip
        values = {layer.name: config.measured(subject, layers.index(layer), layer, False)[0] for layer in shown_ones}
        if "identity" in config.matchings:
            figures[f"figure6-{subject.title}"] = _anisotropy(values, subject.title)
    return figures


def _shares(config: ApproximationConfig, result: TableResult, model: str) -> Figure:
    """Shares of the optimum and times, layer by layer (paper, Figure 5)."""
    rows = result.select(model=model)
    layers, exact = list(dict.fromkeys(row["layer"] for row in rows)), ("optimal", *config.solvers)
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    quality, cost = figure.subplots(1, 2)
    # First those of both panels, so that a method has one colour.
    methods = sorted(dict.fromkeys(row["method"] for row in rows), key=lambda label: label in exact)
    lines, times = {}, {}
    for label in methods:
        mine = [row for row in rows if row["method"] == label]
        times[label] = [(row["milliseconds"], row["milliseconds"], row["milliseconds"]) for row in mine]
        if label not in exact:
            lines[label] = [(row["share"], row["low"], row["high"]) for row in mine]
    interval_plot(quality, layers, lines, f"{model}: share of the optimum", "ratio of sums")
    interval_plot(cost, layers, times, "time of a pair on one core", "ms")
    cost.set_yscale("log")
    # Matplotlib's own numbers of such an axis are mathematics, which names are not drawn as.
    cost.yaxis.set_major_formatter(LogFormatter())
    cost.yaxis.set_minor_formatter(LogFormatter())
    quality.legend(fontsize=6)
    cost.legend(fontsize=6, ncols=2)
    return figure


def _anisotropy(values: Mapping[str, Mapping[str, np.ndarray]], model: str) -> Figure:
    """Spatio-semantic against semantic products of the same pairs, and the spread of their ratio (paper, Figure 6)."""
    figure = Figure(figsize=(2.5 * (len(values) + 1), 2.9), layout="constrained")
    axes = figure.subplots(1, len(values) + 1)
    ratios = {}
    for ax, (layer, found) in zip(axes, values.items(), strict=False):
        joint_density(ax, found["optimal"], found["identity"], layer, ("optimal", "identity"), line=True)
        known = found["optimal"] > 0
        ratios[layer] = found["identity"][known] / found["optimal"][known]
    spreads(axes[-1], ratios, "ratio, pair by pair", "identity / optimal")
    figure.suptitle(model)
    return figure
