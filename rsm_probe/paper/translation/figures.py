"""The paper's Figures 2 and 7: RSMs of overlapping crops, their similarities by kind, and the separation by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rsm_probe.figures import common_legend, distributions, interval_plot, names_as_written, rsm_heatmap
from rsm_probe.paper.similarity_rules import title
from rsm_probe.runs.tables import TableResult, kernel_title

# Keys of a value and its interval, and what it is measured against.
_AGAINST = (("auroc", "low", "high", "other photographs"), ("apart", "apart_low", "apart_high", "the same photograph"))
# More layers than this do not fit side by side; some are then passed over, evenly.
_MOST_LAYERS = 6


@names_as_written()
def figure2(panels: Mapping[str, Mapping[str, Mapping[str, Any]]], kernel: str) -> Figure:
    """RSMs of one mini-batch and the distributions over all of them, a layer a column (paper, Figure 2).

    Args:
        panels: layer -> matching -> `rsm`, (2 n, 2 n), and `kinds`, name -> similarities.
        kernel: of the similarities.
    """
    layers = list(panels)
    if len(layers) > _MOST_LAYERS:
        layers = [layers[k] for k in np.linspace(0, len(layers) - 1, _MOST_LAYERS).astype(int)]
    matchings = list(panels[layers[0]])
    figure = Figure(figsize=(2.6 * len(layers) + 0.4, 4.4 * len(matchings)), layout="constrained")
    axes = figure.subplots(2 * len(matchings), len(layers), squeeze=False)
    for column, layer in enumerate(layers):
        for row, matching in enumerate(matchings):
            panel = panels[layer][matching]
            rsm_heatmap(axes[row, column], panel["rsm"], [], f"{layer}, {title(matching)}")
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
            ax = distributions(
                axes[len(matchings) + row, column], panel["kinds"], f"{layer}, {title(matching)}", kernel_title(kernel)
            )
            if column == 0 and row == 0:
                ax.legend(fontsize=7)
    return figure


@names_as_written()
def separation_figure(result: TableResult, kernel: str, models: list[str]) -> Figure:
    """How well overlapping crops are told from others, layer by layer, a model a row.

    Args:
        result: of the study.
        kernel: of the similarities.
        models: rows of the figure.
    """
    figure = Figure(figsize=(8.0, 2.4 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), 2, squeeze=False, sharex=True, sharey=True)
    for line, model in zip(axes, models, strict=True):
        rows = result.select(model=model, kernel=kernel)
        layers = list(dict.fromkeys(row["layer"] for row in rows))
        names = list(dict.fromkeys(row["matching"] for row in rows))
        for ax, (value, low, high, against) in zip(line, _AGAINST, strict=True):
            lines = {
                title(name): [tuple(row[key] for key in (value, low, high)) for row in rows if row["matching"] == name]
                for name in names
            }
            interval_plot(ax, layers, lines, "", "AUROC" if ax is line[0] else "", 0.5)
            ax.set_title(f"{model}: against {against}", fontsize=9)
    common_legend(figure)
    figure.suptitle(kernel_title(kernel))
    return figure
