"""The page of the retrieval experiment: scores, differences from each baseline, and queries with their neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rsm_probe.paper.by_matching import distinct
from rsm_probe.paper.page_charts import interval_chart
from rsm_probe.paper.page_parts import (
    MOST_LINES,
    SIDE,
    TABLES_NOTE,
    VALUE,
    by_measure,
    cost_text,
    differences_section,
    result_table,
    setting_of,
    share_of,
)
from rsm_probe.paper.page_words import rule_titles, rule_words, semantic_answer
from rsm_probe.paper.retrieval.figures import MatchedImages, PicturedNeighbours, compared_objects, counted_objects
from rsm_probe.paper.shown import ShownModel
from rsm_probe.report.page import Box, Chart, Group, Page, Part, Picture, Pictures, Section, Table, Thumbnail
from rsm_probe.report.thumbnails import joining_lines, thumbnail
from rsm_probe.runs.model_config import DILATED, base_title
from rsm_probe.runs.tables import TableResult, kernel_title
from rsm_probe.sources.models.view.region import Region

# Queries with the largest gains and losses that are shown besides those that were asked for.
_EXTREMES = 3
_SIGNS = (
    "Of a neighbour: ✓ the same objects as the query, ≈ some of them, ✗ none. Of its objects: ✓ also in the query, ✗ "
    "more than the query has, – fewer than it has."
)
_BOXES = (
    "Boxes: blue, objects of the query; solid green, objects of its classes; dotted orange, objects of other classes; "
    "dotted grey, objects that do not count."
)
_WHAT = {"f1": "F1", "iou": "IoU"}


def chosen_queries(pictured: Sequence[int], scores: Mapping[str, np.ndarray]) -> dict[int, str]:
    """Choose the queries to show, with the reason for each.

    Args:
        pictured: queries that the configuration names.
        scores: matching -> score of the nearest image of each query; at most the identity and a semantic matching.
    """
    reasons = dict.fromkeys(pictured, "named in the configuration (pictured:)")
    names = [name for name in scores if name != "identity"]
    if "identity" not in scores or not names:
        return reasons
    gains = scores[names[0]] - scores["identity"]
    known = np.flatnonzero(~np.isnan(gains))
    order = known[np.argsort(-gains[known], kind="stable")]
    for number in order[:_EXTREMES]:
        if gains[number] > 0:
            reasons.setdefault(int(number), "among those that gain most from matching")
    for number in order[::-1][:_EXTREMES]:
        if gains[number] < 0:
            reasons.setdefault(int(number), "among those that lose most from matching")
    return reasons


def shown_neighbours(
    pictured: PicturedNeighbours,
    reasons: Mapping[int, str],
    seen: Mapping[str, np.ndarray],
    regions: Mapping[str, Region],
) -> ShownModel:
    """Convert queries and their nearest images to what a run stores.

    Args:
        pictured: the queries and their nearest images.
        reasons: query -> why it is shown.
        seen: `q<index>` or `d<index>` -> the image as the model sees it.
        regions: the same keys -> the part of the image that it sees, in pixels of the image; images without one have
            no boxes.
    """
    images, boxes = {}, {}
    for key, picture in seen.items():
        of, index = "queries" if key[0] == "q" else "database", int(key[1:])
        images[key] = thumbnail(picture, pictured.images[of].ids[index], str(pictured.images[of].labels[index]), SIDE)
        if key in regions:
            every, counted = pictured.images[of].annotations[index], pictured.objects[of][index]
            boxes[key] = _boxes(every.get("boxes", ()), counted.get("boxes", ()), regions[key])
    lines = []
    for (query, name), numbers in pictured.neighbours.items():
        counts = pictured.objects["queries"][query]["counts"]
        similarities = pictured.similarities.get((query, name))
        matched = pictured.matched[query, name]
        lines.append(
            {
                "query": query, "why": reasons[query], "matching": name,
                "classes": sorted(map(str, counts)),
                "objects": [counted_objects(count, kind, pictured.score) for kind, count in sorted(counts.items())],
                "neighbours": [
                    {
                        "index": int(index), "score": float(pictured.scores[query, name][rank]),
                        "similarity": None if similarities is None else float(similarities[rank]),
                        "objects": compared_objects(
                            counts, pictured.objects["database"][int(index)]["counts"], pictured.score
                        ),
                    }
                    for rank, index in enumerate(numbers)
                    if index >= 0
                ],
                "lines": [] if matched is None else _lines(matched),
            }
        )  # fmt: skip
    facts = {"layer": pictured.layer, "kernel": pictured.kernel, "queries": lines, "boxes": boxes}
    return ShownModel(facts, images)


def _boxes(every: Sequence[Sequence[Any]], counted: Sequence[Sequence[Any]], region: Region) -> list[list[Any]]:
    """The boxes of an image within what is shown of it, as shares, each with its class and whether it counts."""
    shown = []
    for box in every:
        if region.share(box[1:]) > 0:
            left, top, right, bottom = region.cut(box[1:])
            across = ((left - region.left) / region.width, (right - region.left) / region.width)
            down = ((top - region.top) / region.height, (bottom - region.top) / region.height)
            ends = (across[0], down[0], across[1], down[1])
            shown.append([*(round(float(end), 4) for end in ends), str(box[0]), box in counted])
    return shown


def _lines(matched: MatchedImages) -> list[tuple[float, float, float, float, float]]:
    return joining_lines(matched.permutation, matched.affinities, matched.grids, MOST_LINES)


def retrieval_page(result: TableResult, shown: Mapping[str, ShownModel]) -> Page:
    """Lay out the page of a finished run."""
    settings, rows = result.settings, result.table
    what, level = f"{_WHAT[settings['score']]}@1", settings["level"]
    apart = settings["query_images"] is None
    setting = (
        f"{settings['queries']} queries {'from outside the database' if apart else 'from another part of the data'} "
        f"and {share_of(settings['database_sizes'])} images of the set {settings['images']['source']}, "
        f"{setting_of(settings, rows)}. {what} compares the objects of a query with those of its nearest image."
    )
    layered = len(distinct(rows, "layer")) > 1
    tick = "layer" if layered else "model"
    menus = {"model": "model "} if layered else {}
    menus |= {"kernel_name": "kernel ", "database": "images in the database "}
    # The largest database comes first in the menus.
    ordered = sorted(rows, key=lambda row: -row["database"])
    table = [{**row, "kernel_name": kernel_title(row["kernel"])} for row in ordered]
    measures = {"score": what, "best": f"best of {settings['top']}"}
    both = by_measure(
        table, {measures["score"]: ("score", "low", "high"), measures["best"]: ("best", "best_low", "best_high")}
    )
    scores = Chart(
        "scores",
        interval_chart(
            both, tick, VALUE, "score", rule_titles(rows),
            menus={"measure": "measure ", **menus}, hover={"locations": "locations", "queries": "queries"},
        ),
        f"Mean score with its {level:.0%} interval over queries, by rule of comparison, as in Figure 3 of Wald et al. "
        "2024. Click on the legend, or tap it, to single out a rule.",
        result_table("scores", result, [*_WHERE, "score", "low", "high", "best", "best_low", "best_high", "queries"]),
    )  # fmt: skip
    sections = [
        Section(
            "Scores by rule",
            f"{what}: mean {_WHAT[settings['score']]} between the objects of a query and those of its nearest image. "
            f"Best of {settings['top']}: the largest among the nearest {settings['top']}. Intervals come from drawing "
            f"whole scenes or videos, because their frames are not independent. {_objects(rows)}",
            [scores],
        ),
        differences_section(
            table,
            result,
            {"difference": (what, False), "best_difference": (measures["best"], False)},
            tick,
            menus,
            level,
        ),
    ]
    if any(DILATED in row["model"] for row in rows):
        sections.append(_by_locations(result, what))
    if parts := [_neighbours(title, of_model, settings) for title, of_model in shown.items()]:
        sections.append(
            Section(
                "Queries and their nearest images",
                "Each query, as the network sees it, beside its nearest images under one rule, as in Figure 4 of Wald "
                "et al. 2024. Lines join locations "
                "of the query with their matches in the nearest image; the strongest are drawn. Queries are those "
                "that the configuration names, and those whose score changes most with matching, in both directions: "
                f"these are extremes, not typical queries. {_SIGNS}{_explained(shown)}",
                parts,
            )
        )
    return Page(
        "Retrieval",
        "Do the images that a model considers most similar to a query show the same objects, and does it help to match "
        "locations before images are compared?",
        setting,
        semantic_answer(rows, ("score", "low", "high"), "difference", what, level),
        sections,
        command="",
        provenance=cost_text(settings["queries"] * max(settings["database_sizes"])),
        notes=[TABLES_NOTE],
    )


_WHERE = ("model", "layer", "locations", "database", "kernel", "matching")


def _explained(shown: Mapping[str, ShownModel]) -> str:
    """Say what boxes mean, where there are any."""
    return f" {_BOXES}" if any(any(of.facts.get("boxes", {}).values()) for of in shown.values()) else ""


def _objects(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say which objects count, where this depends on what a model sees."""
    said = {row["model"]: row.get("objects", "") for row in rows}
    listed = "; ".join(f"{model}: {text}" for model, text in said.items() if text)
    return f"Objects that count: {listed}." if listed else ""


def _by_locations(result: TableResult, what: str) -> Section:
    """Scores of networks whose last stages are dilated: more locations at the same depth and weights."""
    size = max(result.settings["database_sizes"])
    rows = []
    for row in result.select(database=size):
        network = base_title(row["model"])
        last = [r for r in result.select(database=size) if base_title(r["model"]) == network][-1]["layer"]
        if row["layer"] == last:
            rows.append({**row, "network": network, "kernel_name": kernel_title(row["kernel"])})
    rows.sort(key=lambda row: row["locations"])
    chart = interval_chart(
        rows, "locations", ("score", "low", "high"), what, rule_titles(rows),
        menus={"network": "network ", "kernel_name": "kernel "}, hover={"layer": "layer"},
    )  # fmt: skip
    return Section(
        "Scores by the number of locations",
        "The last stages of a network are dilated, so that its last block has more locations at the same depth and "
        "with the same weights.",
        [Chart("scores-by-locations", chart, f"{what} by the number of locations of the last block.")],
    )


def _neighbours(title: str, shown: ShownModel, settings: Mapping[str, Any]) -> Part:
    """The queries of a model with their nearest images."""
    queries: dict[int, list[Part]] = {}
    titles, lines, what = {}, [], _WHAT[settings["score"]]
    for line in shown.facts["queries"]:
        number, rule, listed = line["query"], rule_words(line["matching"]), ", ".join(line["objects"]) or "no objects"
        query, pictures = shown.images[f"q{number}"], []
        for rank, neighbour in enumerate(line["neighbours"], start=1):
            image = shown.images[f"d{neighbour['index']}"]
            first = [Thumbnail(query.content, query.size, query.name, listed)] if rank == 1 else []
            joining = [tuple(ends) for ends in line["lines"]] if rank == 1 else []
            text = _caption(rank, neighbour, what)
            known = shown.facts.get("boxes", {})
            boxes = [_kinds(known.get(f"d{neighbour['index']}", ()), line.get("classes", ()), "shared")]
            boxes[:0] = [_kinds(known.get(f"q{number}", ()), line.get("classes", ()), "asked")] if first else []
            images = [*first, Thumbnail(image.content, image.size, image.name)]
            pictures.append(Picture(images, text, joining, boxes))
            lines.append(
                [
                    number, query.name, listed, rule, rank, image.name, neighbour["score"], neighbour["similarity"],
                    ", ".join(neighbour["objects"]), line["why"],
                ]
            )  # fmt: skip
        titles[number] = f"Query {number} ({listed}): {line['why']}"
        name = f"{title}-query-{number}-{line['matching']}"
        queries.setdefault(number, []).append(Pictures(name, pictures, f"Nearest by {rule}", width=96))
    columns = [
        "query",
        "id",
        "objects",
        "compared by",
        "rank",
        "neighbour",
        what,
        "similarity",
        "compared objects",
        "why",
    ]
    size = max(settings["database_sizes"])
    about = f"{shown.facts['layer']}, {kernel_title(shown.facts['kernel'])}, database of {size} images"
    table = Table(f"neighbours-{title}", columns, lines, f"{title}, {about}: queries and their nearest images.")
    parts = [Group(titles[number], rules, unfolded=True) for number, rules in queries.items()]
    return Group(f"{title}: {about}", [*parts, table], unfolded=True)


def _kinds(boxes: Sequence[Sequence[Any]], classes: Sequence[str], shared: str) -> list[Box]:
    """The boxes of an image by kind: of classes of the query, of other classes, and those that do not count."""
    return [
        (*ends, "uncounted" if not counts else shared if name in classes else "other") for *ends, name, counts in boxes
    ]


def _caption(rank: int, neighbour: Mapping[str, Any], what: str) -> str:
    """What is said of a neighbour."""
    text = f"{rank}. {_sign(neighbour['score'])} {what} {neighbour['score']:.2f}"
    if neighbour["similarity"] is not None and not math.isnan(neighbour["similarity"]):
        text += f", similarity {neighbour['similarity']:.3g}"
    return f"{text}: {', '.join(neighbour['objects'])}"


def _sign(score: float) -> str:
    return "✓" if score == 1 else "≈" if score > 0 else "✗"
