"""The paper's Figures 3, 4 and 8 to 14, and the score against the number of locations at fixed depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsm_probe.figures import common_legend, interval_plot, matched_locations, names_as_written, picture
from rsm_probe.paper.by_matching import distinct, lines_by_matching, panels_by_kernel
from rsm_probe.paper.similarity_rules import matching_title
from rsm_probe.runs.model_config import DILATED, base_title
from rsm_probe.runs.tables import Row, TableResult, kernel_title
from rsm_probe.sources.images.image_set import ImageSet

# Number of neighbours that fit side by side.
_MOST_NEIGHBOURS = 10
# Keys of the score and of its interval.
_SCORE = ("score", "low", "high")


@dataclass(frozen=True)
class MatchedImages:
    """Two images as a model sees them, and their matched locations; see `matched_locations`."""

    pictures: tuple[np.ndarray, np.ndarray]
    grids: tuple[tuple[int, ...], tuple[int, ...]]
    permutation: np.ndarray
    affinities: np.ndarray


@dataclass(frozen=True)
class PicturedNeighbours:
    """The data of one model in figures: some queries and their nearest images.

    Attributes:
        title: title of the model.
        layer: the layer whose representations are compared.
        kernel: kernel of the similarities.
        images: the image sets "queries" and "database".
        top: number of neighbours searched.
        neighbours: (query, matching) -> indices of the nearest images; -1 if there are fewer.
        matched: (query, matching) -> matched locations of the query and its nearest image; None if they cannot be
            drawn.
    """

    title: str
    layer: str
    kernel: str
    images: Mapping[str, ImageSet]
    top: int
    neighbours: Mapping[tuple[int, str], np.ndarray]
    matched: Mapping[tuple[int, str], MatchedImages | None]


@names_as_written()
def retrieval_figures(result: TableResult) -> dict[str, Figure]:
    """Draw all figures of a finished run."""
    settings = result.settings
    what = {"f1": "F1@1", "iou": "IoU@1"}[settings["score"]]
    rows = result.select(database=max(settings["database_sizes"]))
    keys = ["model", "layer"] if len(distinct(rows, "layer")) > 1 else ["model"]
    figures = {"figure3": panels_by_kernel(rows, keys, _SCORE, what)}
    if any(DILATED in row["model"] for row in rows):
        figures["locations"] = _by_locations(rows, what)
    if not settings["pictured"]:
        return figures
    models = list(result.pictured)
    for model in models:
        figures[f"neighbours-{model.title}"] = _neighbours(model)
    # Only models that see the same images can be compared.
    same = [model for model in models if model.images is models[0].images]
    if len(same) > 1:
        figures["models"] = _models(same)
    return figures


def _by_locations(table: Sequence[Row], what: str) -> Figure:
    """Draw the score of networks with dilated last stages, which have more locations at the same depth and weights."""
    rows = [{**row, "network": base_title(row["model"])} for row in table]
    matchings, networks, kernels = (distinct(rows, key) for key in ("matching", "network", "kernel"))
    figure = Figure(figsize=(2.9 * len(kernels), 2.4 * len(networks)), layout="constrained")
    axes = figure.subplots(len(networks), len(kernels), squeeze=False, sharex=True, sharey=True)
    for line, network in zip(axes, networks, strict=True):
        for ax, kernel in zip(line, kernels, strict=True):
            mine = [row for row in rows if (row["network"], row["kernel"]) == (network, kernel)]
            last = mine[-1]["layer"]
            mine = sorted((row for row in mine if row["layer"] == last), key=lambda row: row["locations"])
            counts = distinct(mine, "locations")
            lines = lines_by_matching(mine, [(count,) for count in counts], ["locations"], matchings, _SCORE)
            interval_plot(
                ax,
                [str(count) for count in counts],
                lines,
                f"{network}, {kernel_title(kernel)}",
                what if ax is line[0] else "",
            )
            ax.set_xlabel("locations of the last block" if ax in axes[-1] else "")
    common_legend(figure)
    return figure


def _neighbours(model: PicturedNeighbours) -> Figure:
    """Draw queries, their nearest images with and without matching, and the matched locations (paper, Figure 4)."""
    top = min(model.top, _MOST_NEIGHBOURS)
    figure = Figure(figsize=(1.25 * (top + 1) + 3.2, 1.45 * len(model.neighbours)), layout="constrained")
    grid = figure.add_gridspec(len(model.neighbours), top + 3)
    for row, (query, name) in enumerate(model.neighbours):
        axes = [figure.add_subplot(grid[row, column]) for column in range(top + 1)]
        _line(axes, model, query, name, f"query {query}, {matching_title(name)}")
        ax = figure.add_subplot(grid[row, top + 1 :])
        ax.set_axis_off()
        if (pair := model.matched[query, name]) is not None:
            matched_locations(ax, pair.pictures, pair.grids, pair.permutation, pair.affinities, most=12)  # type: ignore[arg-type]
    figure.suptitle(f"{model.title}, {model.layer}, {kernel_title(model.kernel)}", fontsize=9)
    return figure


def _models(models: Sequence[PicturedNeighbours]) -> Figure:
    """Draw the nearest images of the same queries for all models (paper, Figures 13 and 14)."""
    queries = dict.fromkeys(query for query, _ in models[0].neighbours)
    rows = [(query, model, name) for query in queries for model in models for q, name in model.neighbours if q == query]
    top = min(models[0].top, _MOST_NEIGHBOURS)
    figure = Figure(figsize=(1.3 * (top + 1), 1.45 * len(rows)), layout="constrained")
    for line, (query, model, name) in zip(figure.subplots(len(rows), top + 1, squeeze=False), rows, strict=True):
        _line(list(line), model, query, name, f"{model.title}, {matching_title(name)}")
    figure.suptitle(kernel_title(models[0].kernel), fontsize=9)
    return figure


def _line(axes: Sequence[Axes], model: PicturedNeighbours, query: int, name: str, title: str) -> None:
    """Draw a query and its nearest images in a row; axes without a neighbour stay empty."""
    picture(axes[0], model.images["queries"][query], title, framed=True)
    for rank, (ax, index) in enumerate(zip(axes[1:], model.neighbours[query, name], strict=False), start=1):
        if index >= 0:
            picture(ax, model.images["database"][int(index)], str(rank))
    for ax in axes:
        ax.set_axis_off() if not ax.images else None
