"""The paper's Figures 2 and 7: RSMs of overlapping crops, similarities by kind, and separation by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from rsm_probe.figures import common_legend, distributions, interval_plot, names_as_written, rsm_heatmap, thinned
from rsm_probe.paper.by_matching import distinct, lines_by_matching
from rsm_probe.paper.similarity_rules import matching_title
from rsm_probe.runs.tables import TableResult, kernel_title

# Keys of an AUROC and its interval, and the crops it compares with.
_AGAINST = (
    (("auroc", "low", "high"), "other photographs"),
    (("apart", "apart_low", "apart_high"), "the same photograph"),
)
# Number of layers that fit side by side; more are thinned evenly.
_MOST_LAYERS = 6


@dataclass(frozen=True)
class PicturedCrops:
    """The data of one model in Figure 2.

    Attributes:
        title: title of the model.
        kernel: kernel of the similarities.
        rsms: (layer, matching) -> RSM of one mini-batch, (2 n, 2 n).
        kinds: (layer, matching) -> kind of pairs -> similarities over all mini-batches.
    """

    title: str
    kernel: str
    rsms: Mapping[tuple[str, str], np.ndarray]
    kinds: Mapping[tuple[str, str], Mapping[str, np.ndarray]]


@names_as_written()
def translation_figures(result: TableResult) -> dict[str, Figure]:
    """Draw Figure 2 for every model, and the separation by layer for each kernel."""
    figures = {f"figure2-{crops.title}": _figure2(crops) for crops in result.pictured}
    kernels = distinct(result.table, "kernel")
    return figures | {f"separation-{kernel}": _separation(result, kernel) for kernel in kernels}


def _figure2(crops: PicturedCrops) -> Figure:
    """Draw RSMs of one mini-batch above the distributions over all of them, with a column per layer (Figure 2)."""
    matchings = list(dict.fromkeys(matching for _, matching in crops.rsms))
    layers = thinned(list(dict.fromkeys(layer for layer, _ in crops.rsms)), _MOST_LAYERS)
    figure = Figure(figsize=(2.6 * len(layers) + 0.4, 4.4 * len(matchings)), layout="constrained")
    axes = figure.subplots(2 * len(matchings), len(layers), squeeze=False)
    for layer, column in zip(layers, axes.T, strict=True):
        for matching, above, below in zip(matchings, column, column[len(matchings) :], strict=False):
            name = f"{layer}, {matching_title(matching)}"
            rsm_heatmap(above, crops.rsms[layer, matching], [], name).set(xticks=[], yticks=[])
            distributions(below, crops.kinds[layer, matching], name, kernel_title(crops.kernel))
    axes[len(matchings), 0].legend(fontsize=7)
    return figure


def _separation(result: TableResult, kernel: str) -> Figure:
    """Draw how well overlapping crops are separated from others, by layer, with a row per model."""
    models = distinct(result.table, "model")
    figure = Figure(figsize=(8.0, 2.4 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), 2, squeeze=False, sharex=True, sharey=True)
    for line, model in zip(axes, models, strict=True):
        rows = result.select(model=model, kernel=kernel)
        layers = distinct(rows, "layer")
        for ax, (values, against) in zip(line, _AGAINST, strict=True):
            lines = lines_by_matching(rows, [(name,) for name in layers], ["layer"], distinct(rows, "matching"), values)
            interval_plot(ax, layers, lines, "", "AUROC" if ax is line[0] else "", 0.5)
            ax.set_title(f"{model}: against {against}", fontsize=9)
    common_legend(figure)
    figure.suptitle(kernel_title(kernel))
    return figure
