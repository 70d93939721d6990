"""The paper's Figures 3, 4 and 8 to 14, and the score against the number of locations at fixed depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsm_probe.figures import (
    COLOURS,
    boxes,
    common_legend,
    interval_plot,
    lettered,
    matched_locations,
    picture,
    print_style,
)
from rsm_probe.paper.by_matching import distinct, lines_by_matching, panels_by_kernel, styles_by_title
from rsm_probe.paper.similarity_rules import matching_title
from rsm_probe.runs.model_config import DILATED, base_title
from rsm_probe.runs.tables import Row, TableResult, kernel_title
from rsm_probe.sources.images.image_set import ImageSet

# Number of neighbours that fit side by side.
_MOST_NEIGHBOURS = 10
# Keys of the score and of its interval.
_SCORE = ("score", "low", "high")
_SCORES = {"f1": "F1", "iou": "IoU"}
# Colour, line and sign of what a neighbour shares with its query: all, something, nothing. Readers who do not tell the
# colours apart have the signs.
_BLUE, _RED, _GREEN, _ORANGE = (COLOURS[k] for k in (0, 1, 2, 4))
_ALL, _PART, _NONE = (_GREEN, "-", "✓"), (_ORANGE, "--", "≈"), (_RED, (0, (1.5, 1)), "✗")
_MISSING = "–"
# Boxes of objects that do not count, because the network does not see them.
_UNCOUNTED = ("#777777", (0, (1, 2)))
# Letters that fit below a picture, and lines of them.
_LETTERS, _LINES = 27, 4


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
        objects: "queries" and "database" -> the annotations of their images, with the objects that count; see
            `ImageSet`.
        top: number of neighbours searched.
        neighbours: (query, matching) -> indices of the nearest images; -1 if there are fewer.
        matched: (query, matching) -> matched locations of the query and its nearest image; None if they cannot be
            drawn.
        score: "f1" or "iou".
        scores: (query, matching) -> the scores of the nearest images, (top,).
        similarities: (query, matching) -> their similarities, (top,); without those of rules whose pairs were not all
            matched.
    """

    title: str
    layer: str
    kernel: str
    images: Mapping[str, ImageSet]
    objects: Mapping[str, Sequence[Mapping[str, Any]]]
    top: int
    neighbours: Mapping[tuple[int, str], np.ndarray]
    matched: Mapping[tuple[int, str], MatchedImages | None]
    score: str
    scores: Mapping[tuple[int, str], np.ndarray]
    similarities: Mapping[tuple[int, str], np.ndarray]


@print_style()
def retrieval_figures(result: TableResult) -> dict[str, Figure]:
    """Draw all figures of a finished run."""
    settings = result.settings
    what = f"{_SCORES[settings['score']]}@1"
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
    size = 2.1 * len(kernels) + 0.5, 1.7 * len(networks) + 0.8
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(networks), len(kernels), squeeze=False, sharey=True)
    lettered(axes.flat)
    for line, network in zip(axes, networks, strict=True):
        for ax, kernel in zip(line, kernels, strict=True):
            mine = [row for row in rows if (row["network"], row["kernel"]) == (network, kernel)]
            last = mine[-1]["layer"]
            mine = sorted((row for row in mine if row["layer"] == last), key=lambda row: row["locations"])
            counts = distinct(mine, "locations")
            lines = lines_by_matching(mine, [(count,) for count in counts], ["locations"], matchings, _SCORE)
            interval_plot(
                ax,
                counts,
                lines,
                f"{network}, {kernel_title(kernel)}",
                what if ax is line[0] else "",
                styles=styles_by_title(matchings),
            )
            ax.set_xlabel("locations of the last block" if ax in axes[-1] else "")
    return common_legend(figure)


def _neighbours(model: PicturedNeighbours) -> Figure:
    """Draw queries, their nearest images with and without matching, and the matched locations (paper, Figure 4)."""
    top = min(model.top, _MOST_NEIGHBOURS)
    figure = Figure(figsize=(1.35 * (top + 1) + 3.4, 1.85 * len(model.neighbours) + 0.6), layout="constrained")
    grid = figure.add_gridspec(len(model.neighbours), top + 3)
    for row, (query, name) in enumerate(model.neighbours):
        axes = [figure.add_subplot(grid[row, column]) for column in range(top + 1)]
        _line(axes, model, query, name, f"query {query}\n{matching_title(name)}")
        ax = figure.add_subplot(grid[row, top + 1 :])
        ax.set_axis_off()
        if (pair := model.matched[query, name]) is not None:
            title = "matched locations of the query and 1,\nas the network sees them"
            matched_locations(ax, pair.pictures, pair.grids, pair.permutation, pair.affinities, 12, title)  # type: ignore[arg-type]
    figure.suptitle(f"{model.title}, {model.layer}, {kernel_title(model.kernel)}")
    return _explained(figure, model)


def _models(models: Sequence[PicturedNeighbours]) -> Figure:
    """Draw the nearest images of the same queries for all models (paper, Figures 13 and 14)."""
    queries = dict.fromkeys(query for query, _ in models[0].neighbours)
    rows = [(query, model, name) for query in queries for model in models for q, name in model.neighbours if q == query]
    top = min(models[0].top, _MOST_NEIGHBOURS)
    figure = Figure(figsize=(1.4 * (top + 1), 1.85 * len(rows) + 0.6), layout="constrained")
    for line, (query, model, name) in zip(figure.subplots(len(rows), top + 1, squeeze=False), rows, strict=True):
        _line(list(line), model, query, name, f"{model.title}\n{matching_title(name)}")
    figure.suptitle(kernel_title(models[0].kernel))
    return _explained(figure, models[0])


def _line(axes: Sequence[Axes], model: PicturedNeighbours, query: int, name: str, title: str) -> None:
    """Draw a query and its nearest images in a row; axes without a neighbour stay empty."""
    objects = model.objects["queries"][query]["counts"]
    picture(axes[0], model.images["queries"][query], title, framed=True, colour=_BLUE)
    _draw_boxes(axes[0], model, "queries", query, objects, (_BLUE, "-"))
    axes[0].set_xlabel(
        _lines([counted_objects(count, kind, model.score) for kind, count in sorted(objects.items())]), fontsize=5.5
    )
    shown = model.neighbours[query, name]
    scores = model.scores[query, name]
    similarities = model.similarities.get((query, name), np.full(len(shown), math.nan))
    for rank, (ax, index) in enumerate(zip(axes[1:], shown, strict=False), start=1):
        if index < 0:
            continue
        score, similarity = float(scores[rank - 1]), float(similarities[rank - 1])
        colour, line, sign = _ALL if score == 1 else _PART if score > 0 else _NONE
        title = f"{rank}  {sign} {_SCORES[model.score]} {score:.2f}"
        title += "" if math.isnan(similarity) else f"\nsimilarity {similarity:.3g}"
        picture(ax, model.images["database"][int(index)], title, framed=True, colour=colour, line=line)
        _draw_boxes(ax, model, "database", int(index), objects, _ALL[:2])
        ax.set_xlabel(
            _lines(compared_objects(objects, model.objects["database"][int(index)]["counts"], model.score)),
            fontsize=5.5,
        )
    for ax in axes:
        ax.set_axis_off() if not ax.images else None


def _draw_boxes(
    ax: Axes, model: PicturedNeighbours, of: str, index: int, objects: Mapping[str, int], shared: tuple[str, Any]
) -> None:
    """Draw the boxes of an image, if its annotation has them: of classes of the query, other classes, not counted."""
    every, counted = (
        list(note.get("boxes", ())) for note in (model.images[of].annotations[index], model.objects[of][index])
    )
    kinds: dict[tuple[str, Any], list[tuple[float, float, float, float]]] = {}
    for box in every:
        kind, left, top, right, bottom = box
        style = _UNCOUNTED if box not in counted else shared if str(kind) in objects else _NONE[:2]
        kinds.setdefault(style, []).append((float(left), float(top), float(right), float(bottom)))
    for (colour, line), corners in kinds.items():
        boxes(ax, corners, colour, line)


def compared_objects(query: Mapping[str, int], image: Mapping[str, int], score: str) -> list[str]:
    """The objects of an image, each class marked as shared with the query or not, and those that it lacks."""
    entries = {_ALL[2]: [], _NONE[2]: [], _MISSING: []}  # type: dict[str, list[str]]
    for kind in sorted({*query, *image}):
        # For presence, one object is as good as many.
        asked, there = (min(of.get(kind, 0), 1) if score == "iou" else of.get(kind, 0) for of in (query, image))
        for sign, count in ((_ALL[2], min(asked, there)), (_NONE[2], there - asked), (_MISSING, asked - there)):
            if count > 0:
                entries[sign].append(f"{sign} {counted_objects(count, kind, score)}")
    return [entry for listed in entries.values() for entry in listed]


def counted_objects(count: int, kind: str, score: str) -> str:
    """The objects of a class in an image: its name, with their number where it counts."""
    return kind if score == "iou" or count == 1 else f"{kind} ×{count}"


def _lines(entries: Sequence[str]) -> str:
    """Set entries in lines below a picture; what does not fit is counted."""
    # Spaces within an entry must not break it.
    lines = wrap(", ".join(entry.replace(" ", "\u00a0") for entry in entries), _LETTERS)
    if len(lines) > _LINES:
        shown = " ".join(lines[: _LINES - 1]).rstrip(",").count(", ") + 1
        lines = [*lines[: _LINES - 1], f"and {len(entries) - shown} more"]
    return "\n".join(lines)


def _explained(figure: Figure, model: PicturedNeighbours) -> Figure:
    """Say below a figure what its signs and frames mean."""
    of = "objects" if model.score == "f1" else "classes"
    frames = (
        f"frames: {_ALL[2]} solid, the same {of} as the query; {_PART[2]} dashed, some of them; {_NONE[2]} dotted, none"
    )
    below = f"below: {_ALL[2]} {of} of the query, {_NONE[2]} not of the query, {_MISSING} of the query, but not here"
    drawn = "boxes: solid if the query has an object of the class, else dotted; grey if the object does not count"
    figure.supxlabel(f"{frames}. {below[0].upper()}{below[1:]}. {drawn[0].upper()}{drawn[1:]}.", fontsize=6)
    return figure
