"""The paper's Figures 3, 4 and 8 to 14, and the score against the number of locations at fixed depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsm_probe.figures import common_legend, interval_plot, matched_locations, names_as_written, picture
from rsm_probe.matching.matches import match
from rsm_probe.pairs.token_sets import centred_tokens
from rsm_probe.paper.experiment import Subject
from rsm_probe.paper.similarity_rules import SEMANTIC, title
from rsm_probe.runs.entries import DILATED, base_title
from rsm_probe.runs.tables import TableResult, kernel_title

if TYPE_CHECKING:
    from rsm_probe.paper.retrieval.study import RetrievalConfig

# More neighbours than this do not fit side by side.
_MOST_NEIGHBOURS = 10


@names_as_written()
def retrieval_figures(config: RetrievalConfig, result: TableResult, out: Path) -> dict[str, Figure]:
    """All figures of a finished run by name."""
    what = {"f1": "F1@1", "iou": "IoU@1"}[config.score]
    size = max(config.database_sizes)
    figures = {"figure3": _scores(result, size, what)}
    if any(DILATED in row["model"] for row in result.table):
        figures["locations"] = _by_locations(result, size, what)
    names = [name for name in config.matchings if name == "identity" or name in SEMANTIC][:2]
    if not (names and config.pictured):
        return figures
    subjects = config.subjects(out)
    for subject in subjects:
        figures[f"neighbours-{subject.title}"] = _neighbours(config, subject, names)
    # Models that see the same images.
    same = [subject for subject in subjects if subject.images is subjects[0].images]
    if len(same) > 1:
        figures["models"] = _models(config, same, names)
    return figures


def _scores(result: TableResult, size: int, what: str) -> Figure:
    """Models and layers side by side, a panel for each kernel (paper, Figure 3)."""
    rows = result.select(database=size)
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    figure = Figure(figsize=(3.4 * len(kernels), 3.6), layout="constrained")
    names = list(dict.fromkeys(row["matching"] for row in rows))
    several = len({row["layer"] for row in rows}) > 1
    for ax, kernel in zip(figure.subplots(1, len(kernels), sharey=True, squeeze=False)[0], kernels, strict=True):
        mine = [row for row in rows if row["kernel"] == kernel]
        places = list(dict.fromkeys((row["model"], row["layer"]) for row in mine))
        shown = [f"{model}, {layer}" if several else model for model, layer in places]
        interval_plot(ax, shown, _lines(mine, places, ("model", "layer"), names), kernel_title(kernel), what)
        for line in ax.lines:
            line.set_linestyle("none")
    common_legend(figure)
    return figure


def _by_locations(result: TableResult, size: int, what: str) -> Figure:
    """Networks whose last stages are dilated in place of strided: the same depth and weights, more locations."""
    rows = [{**row, "network": base_title(row["model"])} for row in result.select(database=size)]
    matchings = list(dict.fromkeys(row["matching"] for row in rows))
    networks, kernels = (list(dict.fromkeys(row[key] for row in rows)) for key in ("network", "kernel"))
    figure = Figure(figsize=(2.9 * len(kernels), 2.4 * len(networks)), layout="constrained")
    axes = figure.subplots(len(networks), len(kernels), squeeze=False, sharex=True, sharey=True)
    for line, network in zip(axes, networks, strict=True):
        for ax, kernel in zip(line, kernels, strict=True):
            mine = [row for row in rows if (row["network"], row["kernel"]) == (network, kernel)]
            last = mine[-1]["layer"]
            mine = sorted((row for row in mine if row["layer"] == last), key=lambda row: row["locations"])
            places = list(dict.fromkeys((row["locations"],) for row in mine))
            lines = _lines(mine, places, ("locations",), matchings)
            counts = [str(place[0]) for place in places]
            interval_plot(ax, counts, lines, f"{network}, {kernel_title(kernel)}", what if ax is line[0] else "")
            ax.set_xlabel("locations of the last block" if ax in axes[-1] else "")
    common_legend(figure)
    return figure


def _lines(
    rows: list[dict[str, Any]], places: list[tuple[Any, ...]], keys: tuple[str, ...], names: list[str]
) -> dict[str, list[tuple[float, float, float]]]:
    """Matching -> value and interval at each place; those that do not go with a kernel keep their colour."""
    nothing = (np.nan, np.nan, np.nan)
    found: dict[str, dict[tuple[Any, ...], tuple[float, float, float]]] = {title(name): {} for name in names}
    for row in rows:
        place = tuple(row[key] for key in keys)
        found[title(row["matching"])][place] = (row["score"], row["low"], row["high"])
    return {name: [values.get(place, nothing) for place in places] for name, values in found.items()}


def _neighbours(config: RetrievalConfig, subject: Subject, names: Sequence[str]) -> Figure:
    """Some queries and their nearest images, with and without matching, and how the best one is matched (Figure 4)."""
    place = len(subject.layers["queries"]) - 1
    found, kernel = config.neighbours(subject, place, False), _kernel(config)
    size = max(config.database_sizes)
    rows = [(query, name) for query in config.pictured for name in names]
    top = min(config.top, _MOST_NEIGHBOURS)
    figure = Figure(figsize=(1.25 * (top + 1) + 3.2, 1.45 * len(rows)), layout="constrained")
    grid = figure.add_gridspec(len(rows), top + 3)
    for row, (query, name) in enumerate(rows):
        nearest = found[name, kernel][size][query]
        axes = [figure.add_subplot(grid[row, column]) for column in range(top + 1)]
        _line(axes, subject, query, nearest, f"query {query}, {title(name)}")
        _matched(figure.add_subplot(grid[row, top + 1 :]), config, subject, query, int(nearest[0]), name)
    figure.suptitle(f"{subject.title}, {list(subject.layers['queries'])[place]}, {kernel_title(kernel)}", fontsize=9)
    return figure


def _models(config: RetrievalConfig, subjects: Sequence[Subject], names: Sequence[str]) -> Figure:
    """The nearest images of the same queries for all models (paper, Figures 13 and 14)."""
    kernel, size = _kernel(config), max(config.database_sizes)
    rows = [(query, subject, name) for query in config.pictured for subject in subjects for name in names]
    top = min(config.top, _MOST_NEIGHBOURS)
    figure = Figure(figsize=(1.3 * (top + 1), 1.45 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), top + 1, squeeze=False)
    found = {s.title: config.neighbours(s, len(s.layers["queries"]) - 1, False) for s in subjects}
    for line, (query, subject, name) in zip(axes, rows, strict=True):
        nearest = found[subject.title][name, kernel][size][query]
        _line(list(line), subject, query, nearest, f"{subject.title}, {title(name)}")
    figure.suptitle(kernel_title(kernel), fontsize=9)
    return figure


def _kernel(config: RetrievalConfig) -> str:
    return "cosine" if "cosine" in config.kernels else config.kernels[0]


def _line(axes: Sequence[Axes], subject: Subject, query: int, nearest: np.ndarray, about: str) -> None:
    """A query and its nearest images; places without a candidate stay empty."""
    picture(axes[0], subject.images["queries"][query], about, framed=True)
    for rank, (ax, index) in enumerate(zip(axes[1:], nearest, strict=False), start=1):
        if index >= 0:
            picture(ax, subject.images["database"][int(index)], str(rank))
    for ax in axes:
        ax.set_axis_off() if not ax.images else None


def _matched(ax: Axes, config: RetrievalConfig, subject: Subject, query: int, index: int, matching: str) -> None:
    """Which locations of a query and of its nearest image answer to each other, drawn on what the model sees."""
    layer, other = (list(subject.layers[name].values())[-1] for name in ("queries", "database"))
    ax.set_axis_off()
    if index < 0 or layer.grid is None or other.grid is None:
        return
    tokens = [
        centred_tokens(images, slice(place, place + 1), other, config.centering)[0]
        for images, place in ((layer, query), (other, index))
    ]
    found = match(tokens[0], tokens[1], matching)
    seen = config.seen(subject)
    if found.permutation is None or found.affinities is None or f"d{index}" not in seen:
        return
    pictures, grids = (seen[f"q{query}"], seen[f"d{index}"]), ((*layer.grid,), (*other.grid,))
    matched_locations(ax, pictures, grids, found.permutation, found.affinities, most=12)  # type: ignore[arg-type]
