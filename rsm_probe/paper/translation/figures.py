"""The paper's Figures 2 and 7: RSMs of overlapping crops, similarities by kind, and separation by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsm_probe.figures import (
    beyond,
    boxes,
    common_legend,
    distributions,
    interval_plot,
    lettered,
    picture,
    print_style,
    rsm_heatmap,
    rsm_scale,
    short_names,
    tall_bar,
    thinned,
)
from rsm_probe.paper.by_matching import distinct, lines_by_matching, styles_by_title
from rsm_probe.paper.similarity_rules import matching_title
from rsm_probe.runs.tables import Row, TableResult, kernel_title, with_interval

# Keys of an AUROC and its interval, and the crops it compares with.
_AGAINST = (
    (("auroc", "low", "high"), "other photographs"),
    (("apart", "apart_low", "apart_high"), "the same photograph"),
)
# Number of layers that fit side by side; more are thinned evenly.
_MOST_LAYERS = 6
# Kernels whose similarities have one range in all layers.
_BOUNDED = ("cosine", "rbf")
_SHARED = "#D55E00"

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class PicturedCrops:
    """The data of one model in Figure 2.

    Attributes:
        title: title of the model.
        kernel: kernel of the similarities.
        rsms: (layer, matching) -> RSM of one mini-batch, (2 n, 2 n).
        kinds: (layer, matching) -> kind of pairs -> similarities over all mini-batches.
        pair: the upper and the lower crop of the first image.
        shared: the pixels that each of the two shares with the other: left, top, right and bottom.
    """

    title: str
    kernel: str
    rsms: Mapping[tuple[str, str], np.ndarray]
    kinds: Mapping[tuple[str, str], Mapping[str, np.ndarray]]
    pair: tuple[np.ndarray, np.ndarray]
    shared: tuple[Box, Box]


@print_style()
def translation_figures(result: TableResult) -> dict[str, Figure]:
    """Draw Figure 2 for every model, and the separation by layer for each kernel."""
    figures = {f"figure2-{crops.title}": _figure2(result, crops) for crops in result.pictured}
    kernels = distinct(result.table, "kernel")
    return figures | {f"separation-{kernel}": _separation(result, kernel) for kernel in kernels}


def _figure2(result: TableResult, crops: PicturedCrops) -> Figure:
    """Draw two crops, RSMs of one mini-batch, and the distributions over all of them, with a column per layer."""
    matchings = list(dict.fromkeys(matching for _, matching in crops.rsms))
    layers = thinned(list(dict.fromkeys(layer for layer, _ in crops.rsms)), _MOST_LAYERS)
    count = len(matchings)
    figure = Figure(figsize=(1.45 * (len(layers) + 1) + 0.9, 1.5 * 2 * count + 0.8), layout="constrained")
    grid = figure.add_gridspec(2 * count, len(layers) + 2, width_ratios=[1.0] * (len(layers) + 1) + [0.06])
    pictured = [figure.add_subplot(grid[:count, 0]), figure.add_subplot(grid[count:, 0])]
    lines = [[figure.add_subplot(grid[row, k + 1]) for k in range(len(layers))] for row in range(2 * count)]
    lettered([*pictured, *(line[0] for line in lines)])
    _crops(pictured, crops, result.select(model=crops.title)[0])
    short, shared = short_names(layers)
    similarity = f"{kernel_title(crops.kernel)} similarity"
    one_scale = rsm_scale([crops.rsms[layer, name] for layer in layers for name in matchings])
    bounded = crops.kernel in _BOUNDED
    for k, (layer, name) in enumerate(zip(layers, short, strict=True)):
        norm = one_scale if bounded else rsm_scale([crops.rsms[layer, matching] for matching in matchings])
        for matching, above, below in zip(matchings, lines, lines[count:], strict=False):
            first = layer == layers[0]
            rsm_heatmap(
                above[k],
                crops.rsms[layer, matching],
                _halves(crops.rsms[layer, matching]),
                name if above is lines[0] else "",
                norm=norm,
                bar=not bounded,
                meaning="",
            )
            above[k].tick_params(labelleft=first, labelbottom=above is lines[count - 1])
            distributions(below[k], crops.kinds[layer, matching], _auroc(result, crops, layer, matching), "")
            below[k].set(xlabel=similarity if below is lines[-1] else "", ylabel="")
            if first:
                above[k].set_ylabel(f"{_rsm_title(matching)}\ncrop")
                below[k].set_ylabel(f"{_rsm_title(matching)}\ndensity")
    if bounded:
        ends = beyond(list(crops.rsms.values()), one_scale)
        tall_bar([line[-1] for line in lines[:count]], figure.add_subplot(grid[:count, -1]), similarity, extend=ends)
    for ax in lines[count - 1]:
        ax.set_xlabel("crop")
    for column in zip(*lines[count:], strict=True):
        _share_x(column)
    what = f"{crops.title}: RSMs of one mini-batch, densities of all mini-batches"
    figure.suptitle(what + (f", … = {shared}" if shared else ""))
    return common_legend(figure)


def _crops(panels: Sequence[Axes], crops: PicturedCrops, row: Row) -> None:
    """Draw the two crops, and mark what they share; say what of it the network sees, if that is known."""
    for ax, name, image, box in zip(panels, ("upper", "lower"), crops.pair, crops.shared, strict=True):
        picture(ax, image, f"{name} crop")
        boxes(ax, [box], _SHARED, "--", fill=0.2)
        ax.set_xlabel(f"marked: shared,\n{box[2] - box[0]:g} x {box[3] - box[1]:g} pixels")
    seen = [row.get(key, math.nan) for key in ("seen_width", "seen_shared")]
    if not any(map(math.isnan, seen)):
        panels[-1].set_xlabel(f"{panels[-1].get_xlabel()};\nthe network sees\n{seen[0]:g} x {seen[1]:g}")


def _halves(rsm: np.ndarray) -> list[str]:
    """The part of each crop in an RSM: upper ones come first."""
    return ["upper"] * (len(rsm) // 2) + ["lower"] * (len(rsm) // 2)


def _rsm_title(matching: str) -> str:
    return "spatio-semantic" if matching == "identity" else f"semantic ({matching_title(matching)})"


def _auroc(result: TableResult, crops: PicturedCrops, layer: str, matching: str) -> str:
    row = result.only(model=crops.title, kernel=crops.kernel, layer=layer, matching=matching)
    return f"AUROC {with_interval(row, 'auroc', digits=2)}".replace(" [", "\n[")


def _share_x(panels: Sequence[Axes]) -> None:
    """Give panels the same limits of the x-axis."""
    ends = [ax.get_xlim() for ax in panels]
    for ax in panels:
        ax.set_xlim(min(low for low, _ in ends), max(high for _, high in ends))


def _separation(result: TableResult, kernel: str) -> Figure:
    """Draw how well overlapping crops are separated from others, by layer, with a row per model."""
    models = distinct(result.table, "model")
    # Only parts of photographs have crops of the same photograph that do not overlap.
    known = [pair for pair in _AGAINST if not all(math.isnan(row[pair[0][0]]) for row in result.select(kernel=kernel))]
    against = known or [_AGAINST[0]]
    size = 3.3 * len(against) + 0.4, 1.9 * len(models) + 0.9
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(models), len(against), squeeze=False, sharey=True)
    lettered(axes.flat)
    for line, model in zip(axes, models, strict=True):
        rows = result.select(model=model, kernel=kernel)
        layers, matchings = distinct(rows, "layer"), distinct(rows, "matching")
        short, shared = short_names(layers)
        for ax, (values, others) in zip(line, against, strict=True):
            lines = lines_by_matching(rows, [(name,) for name in layers], ["layer"], matchings, values)
            interval_plot(
                ax,
                short,
                lines,
                f"{model}: against {others}",
                "AUROC" if ax is line[0] else "",
                0.5,
                styles=styles_by_title(matchings),
            )
            ax.set_xlabel("layer" + (f", … = {shared}" if shared else "") if line is axes[-1] or shared else "")
    figure.suptitle(f"{kernel_title(kernel)}; dashed: chance")
    return common_legend(figure)
