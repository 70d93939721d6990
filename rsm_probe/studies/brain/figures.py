"""The figures of a study of brains: bars against the noise ceiling, and differences of the two notions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsm_probe.figures import ceiling_bars, common_legend, interval_plot, lettered, print_style, rule_styles
from rsm_probe.paper.by_matching import distinct
from rsm_probe.studies.brain.result import NOTIONS_COMPARED, BrainResult
from rsm_probe.studies.brain.words import counted_subjects, measure_title, notion_words

# Inches of a page's width and of its column, of a bar, and of the height of a panel without the names of its layers.
_PAGE, _COLUMN, _BAR, _HEIGHT = 7.0, 3.4, 0.11, 1.9
_NOTHING = (math.nan, math.nan, math.nan)


def brain_figures(result: BrainResult) -> dict[str, Figure]:
    """Draw all models, with a figure per kernel, and the differences of the notions of similarity."""
    figures, kernels = {}, distinct(result.table, "kernel")
    for kernel in kernels:
        ending = f"-{kernel}" if len(kernels) > 1 else ""
        figures[f"explained{ending}"] = _explained(result, kernel)
        if any(row["kernel_a"] == kernel for row in result.compared(NOTIONS_COMPARED)):
            figures[f"differences{ending}"] = _differences(result, kernel)
    return figures


@print_style()
def _explained(result: BrainResult, kernel: str) -> Figure:
    rows = [row for row in result.table if row["kernel"] == kernel]
    names = distinct(rows, "model")
    figure, axes = _panels(names, max(_bars_of(rows, name) for name in names))
    meaning = measure_title(result.evaluation.attrs["measure"])
    best = next((row["rsm"] for row in rows if row["best"]), None)
    tied = {row["rsm"] for row in rows if row["tied_with_best"]}
    evaluation = result.evaluation
    titles = {name: notion_words(name) for name in distinct(rows, "matching")}
    for ax, name in zip(axes.flat, names, strict=False):
        mine = (evaluation["model"].values == name) & (evaluation["kernel"].values == kernel)
        left = ax in axes[:, 0]
        ceiling_bars(
            ax, evaluation.isel(rsm=np.flatnonzero(mine)), name, meaning if left else "",
            titles=titles, best=best, tied=tied,
        )  # fmt: skip
    _same_limits(list(axes.flat[: len(names)]))
    return _finished(result, figure, axes, kernel)


@print_style()
def _differences(result: BrainResult, kernel: str) -> Figure:
    rows = [row for row in result.compared(NOTIONS_COMPARED) if row["kernel_a"] == kernel]
    names, matchings = distinct(rows, "model_a"), distinct(rows, "matching_a")
    every = [row for row in result.table if row["kernel"] == kernel]
    figure, axes = _panels(names, max(_bars_of(every, name) for name in names))
    titles = {name: f"{notion_words(name)} minus spatio-semantic" for name in matchings}
    styles = {titles[name]: style for name, style in rule_styles(matchings).items()}
    for ax, name in zip(axes.flat, names, strict=False):
        mine = [row for row in rows if row["model_a"] == name]
        layers = distinct(mine, "layer_a")
        lines = {}
        for matching in matchings:
            points = {
                row["layer_a"]: (row["difference"], row["low"], row["high"])
                for row in mine
                if row["matching_a"] == matching
            }
            lines[titles[matching]] = [points.get(layer, _NOTHING) for layer in layers]
        meaning = "difference of the means" if ax in axes[:, 0] else ""
        interval_plot(ax, layers, lines, name, meaning, 0.0, styles=styles, joined=False)
    shown = list(axes.flat[: len(names)])
    _same_limits(shown)
    for ax, name in zip(shown, names, strict=True):
        decided = {row["layer_a"]: False for row in rows if row["model_a"] == name}
        decided |= {row["layer_a"]: True for row in rows if row["model_a"] == name and row["decided"]}
        _mark_decided(ax, list(decided.values()))
    return _finished(result, figure, axes, kernel)


def _mark_decided(ax: Axes, decided: Sequence[bool]) -> None:
    """Put a dot at the top of layers where a difference is decided."""
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top + 0.1 * (top - bottom))
    where = np.flatnonzero(decided)
    if len(where):
        ax.scatter(
            where, np.full(len(where), 0.95), 6, "black", marker="o", transform=ax.get_xaxis_transform(),
            linewidths=0.3, label="differ after correction",
        )  # fmt: skip


def _bars_of(rows: Sequence[dict], model: str) -> int:
    return sum(row["model"] == model for row in rows)


def _panels(names: Sequence[str], bars: int) -> tuple[Figure, np.ndarray]:
    """A panel per model: side by side where their bars fit into columns, and otherwise one above the other."""
    needed = 0.5 + _BAR * bars
    columns = 1 if len(names) == 1 or needed > _COLUMN else 2
    width = min(max(needed, _COLUMN), _PAGE) if columns == 1 else _PAGE
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(width, lines * (_HEIGHT + 0.5) + 0.5), dpi=150, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    return figure, axes


def _same_limits(panels: Sequence[Axes]) -> None:
    """Give all panels the widest limits, so that their bars can be compared."""
    ends = np.array([ax.get_ylim() for ax in panels])
    for ax in panels:
        ax.set_ylim(ends[:, 0].min(), ends[:, 1].max())


def _finished(result: BrainResult, figure: Figure, axes: np.ndarray, kernel: str) -> Figure:
    attributes = result.evaluation.attrs
    panels = [ax for ax in axes.flat if ax.axison]
    if len(panels) > 1:
        lettered(panels)
    count, images = result.evaluation.sizes["subject"], attributes["images"]
    figure.suptitle(
        f"{counted_subjects(count, result.facts['dimension'])}, {images:,} images, {kernel} kernel, "
        f"{100 * attributes['level']:.4g}% intervals"
    )
    return common_legend(figure)
