"""The page of the translation experiment: separation by layer, distributions, and crops with matched locations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rsm_probe.paper.by_matching import distinct
from rsm_probe.paper.page_charts import curve_chart, interval_chart
from rsm_probe.paper.page_parts import (
    MOST_LINES,
    TABLES_NOTE,
    VALUE,
    by_measure,
    cost_text,
    differences_section,
    result_table,
    setting_of,
)
from rsm_probe.paper.page_words import rule_titles, rule_words, semantic_answer
from rsm_probe.paper.shown import ShownModel
from rsm_probe.report.page import Chart, Group, Page, Part, Picture, Pictures, Section, Table
from rsm_probe.report.thumbnails import joining_lines
from rsm_probe.runs.tables import Row, TableResult, kernel_title

# Shares of pairs at which the distributions of similarities are stored.
_SHARES = np.linspace(0, 1, 21)
# The AUROC against a kind of crops, and how the page calls it.
_AGAINST = {
    ("auroc", "low", "high"): "against crops of different photographs",
    ("apart", "apart_low", "apart_high"): "against crops of the same photograph",
}


# Fewer rows or columns of locations do not tell right matches from wrong ones.
_SMALLEST_GRID = 4


def distribution(similarities: np.ndarray, **where: Any) -> dict[str, Any]:
    """Quantiles of similarities, as a run stores them.

    Args:
        similarities: values of any number of pairs.
        where: what they belong to.
    """
    values = np.quantile(similarities, _SHARES).tolist() if similarities.size else []
    return {**where, "pairs": int(similarities.size), "values": values}


def matched_crops(
    layer: str,
    matching: str,
    grid: tuple[int, ...],
    permutation: np.ndarray,
    affinities: np.ndarray,
    shift: float | None,
) -> dict[str, Any]:
    """The matched locations of an upper and a lower crop, as a run stores them.

    Args:
        layer: name of the layer.
        matching: name of the matching.
        grid: (rows, columns) of the locations.
        permutation: partner in the lower crop of each location of the upper one, (S,), -1 for none.
        affinities: what each location adds to the product, (S,).
        shift: by how many rows the content of the upper crop lies higher in the lower one; None if it is not known.

    Returns:
        With `shared` and `right`: how many locations of the upper crop lie in the lower one, too, and how many of these
        are matched to where their content is, to within a location.
    """
    crops: dict[str, Any] = {"layer": layer, "matching": matching, "grid": list(grid)}
    crops["lines"] = joining_lines(permutation, affinities, (grid, grid), MOST_LINES)
    # In a small grid, every location is next to every other.
    if shift is not None and min(grid) >= _SMALLEST_GRID:
        rows, columns = np.divmod(np.arange(len(permutation)), grid[1])
        wanted = rows - shift
        there = wanted > -0.5
        partner_rows, partner_columns = np.divmod(permutation, grid[1])
        near = (np.abs(partner_rows - wanted) <= 1) & (np.abs(partner_columns - columns) <= 1) & (permutation >= 0)
        crops |= {"shared": int(there.sum()), "right": int((there & near).sum())}
    return crops


def translation_page(result: TableResult, shown: Mapping[str, ShownModel]) -> Page:
    """Lay out the page of a finished run."""
    settings, level = result.settings, result.settings["level"]
    rows = [{**row, "kernel_name": kernel_title(row["kernel"])} for row in result.table]
    layered = len(distinct(rows, "layer")) > 1
    tick = "layer" if layered else "model"
    menus = ({"model": "model "} if layered else {}) | {"kernel_name": "kernel "}
    edge, crop = settings["edge"], settings["crop"]
    setting = (
        f"{settings['batches']} mini-batches of {settings['batch']} images of the set {settings['images']['source']}; "
        f"each image of {edge} x {edge} pixels gives two crops of {crop} x {crop}, which share {2 * crop - edge} x "
        f"{crop} pixels; {setting_of(settings, rows)}. AUROC: how often two overlapping crops are more similar than "
        "two crops of different photographs; 0.5 is chance."
    )
    measures = {"difference": (f"AUROC {_AGAINST['auroc', 'low', 'high']}", False)}
    if not all(math.isnan(row["apart"]) for row in rows):
        measures["apart_difference"] = (f"AUROC {_AGAINST['apart', 'apart_low', 'apart_high']}", False)
    sections = [
        _separation(result, rows, tick, menus, level),
        differences_section(rows, result, measures, tick, menus, level),
    ]
    if curves := [_curve for title, one in shown.items() for _curve in _curves(title, one)]:
        sections.append(_distributions(curves))
    if parts := [_crops(title, one) for title, one in shown.items() if one.facts.get("crops")]:
        sections.append(
            Section(
                "Which location was matched to which",
                "The upper and the lower crop of an image, as the network sees them, with the strongest matched "
                "locations joined. Equal locations would give horizontal lines; the content of the upper crop lies "
                "higher in the lower one. The first images of the run are shown; nothing was selected.",
                parts,
            )
        )
    return Page(
        "Translation sensitivity",
        "Does a model consider two overlapping crops of an image similar although their content is shifted, and does "
        "it help to match locations before crops are compared?",
        setting,
        semantic_answer(
            rows, ("auroc", "low", "high"), "difference", "the AUROC", level,
            kernel="rbf" if "rbf" in settings["kernels"] else settings["kernels"][0],
        ),
        sections,
        command="",
        provenance=cost_text(settings["batches"] * settings["batch"] * (2 * settings["batch"] - 1)),
        notes=[TABLES_NOTE],
    )  # fmt: skip


def _separation(result: TableResult, rows: Sequence[Row], tick: str, menus: Mapping[str, str], level: float) -> Section:
    both = by_measure(rows, {f"AUROC {against}": keys for keys, against in _AGAINST.items()})
    chart = interval_chart(
        both, tick, VALUE, "AUROC", rule_titles(rows),
        menus={"measure": "measure ", **menus},
        hover={"locations": "locations", "overlapping_pairs": "overlapping pairs"}, reference=0.5,
    )  # fmt: skip
    columns = ["model", "layer", "locations", "kernel", "matching", *(key for keys in _AGAINST for key in keys)]
    columns += ["d_prime", "partner_first", "partner_rank"]
    return Section(
        "Separation by layer",
        "Crops of different photographs are easy to tell apart; crops of different parts of one photograph share "
        "texture and light, but no pixels (where the images are parts of photographs). partner_first: how often the "
        "partner is the most similar crop of its mini-batch; partner_rank: its mean rank.",
        [
            Chart(
                "separation",
                chart,
                f"AUROC with its {level:.0%} interval from drawing photographs with replacement; the dashed line is "
                "chance. Click on the legend, or tap it, to single out a rule.",
                result_table("separation", result, columns),
            )
        ],
    )


def _curves(title: str, shown: ShownModel) -> list[Row]:
    """Points of the cumulative distributions of a model."""
    return [
        {
            "model": title, "layer": one["layer"], "kernel": kernel_title(one["kernel"]),
            "rule": rule_words(one["matching"]), "kind": one["kind"], "similarity": value, "share": float(share),
        }
        for one in shown.facts.get("distributions", ())
        for share, value in zip(_SHARES, one["values"], strict=False)
    ]  # fmt: skip


def _distributions(curves: Sequence[Row]) -> Section:
    menus = {"model": "model ", "layer": "layer ", "rule": "compared by ", "kernel": "kernel "}
    chart = curve_chart(
        curves, ("similarity", "similarity"), ("share", "share of pairs at most that similar"), "kind", menus=menus
    )
    columns = ["model", "layer", "kernel", "rule", "kind", "share", "similarity"]
    table = Table("distributions", columns, [[row[key] for key in columns] for row in curves], digits=4)
    return Section(
        "Distributions of similarities",
        "The further apart the curves, the better are overlapping crops told from others. Curves run through 21 "
        "quantiles over all mini-batches.",
        [
            Chart(
                "distributions",
                chart,
                "Cumulative distributions of the similarity of pairs of crops, as in Figure 2 of Wald et al. 2024.",
                table,
            )
        ],
    )


def _crops(title: str, shown: ShownModel) -> Part:
    """Crops of a model with their matched locations."""
    pictures, lines = [], []
    for one in shown.facts["crops"]:
        pair = [shown.images[f"{part}{one['pair']}"] for part in ("upper", "lower")]
        caption = f"{one['layer']}, {rule_words(one['matching'])}"
        if "right" in one:
            caption += f": {one['right']} of {one['shared']} shared locations are matched to where their content is"
        pictures.append(Picture(pair, caption, [tuple(ends) for ends in one["lines"]]))
        lines.append(
            [pair[0].name, one["layer"], rule_words(one["matching"]), math.prod(one["grid"]), one.get("shared"),
             one.get("right")]
        )  # fmt: skip
    columns = ["upper crop", "layer", "matched by", "locations", "shared locations", "matched to the same content"]
    text = (
        "A shared location of the upper crop is one whose centre also lies in the lower crop; it counts as matched to "
        "its content if its partner is at most one location away from it."
    )
    table = Table(f"crops-{title}", columns, lines, text)
    return Group(title, [Pictures(f"crops-{title}", pictures, text, table, width=120)], unfolded=True)
