"""Parts that the pages of several experiments have: the setting, result tables, differences from each baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rsm_probe.paper.by_matching import distinct
from rsm_probe.paper.page_charts import interval_chart
from rsm_probe.paper.page_words import differences, rule_titles, rule_words, verdict_counts
from rsm_probe.paper.shown import ShownModel
from rsm_probe.report.page import Chart, Group, Part, Section, Table, Text
from rsm_probe.runs.model_config import ModelConfig
from rsm_probe.runs.tables import Row, TableResult, kernel_title
from rsm_probe.storage.files import load_json

NOTHING_SHOWN = (
    "This page has no pictures: the run stored none, because a version before pages made it. Run it again into the "
    "same folder; it computes nothing but the pictures."
)
TABLES_NOTE = "All cells of a run share images, so they are not independent evidence."
# Pixels of the longer side of thumbnails whose locations are joined, and most lines between two of them.
SIDE, MOST_LINES = 128, 14
# Keys of the value and of the ends of its interval in rows with one measure each.
VALUE = ("value", "value_low", "value_high")


def setting_of(settings: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Models, layers, kernels and rules of a run, as the end of a sentence."""
    models, layers = distinct(rows, "model"), distinct(rows, "layer")
    parts = [
        counted(models, "model"), counted(layers, "layer"),
        counted([kernel_title(kernel) for kernel in distinct(rows, "kernel")], "kernel"),
        counted([rule_words(name) for name in distinct(rows, "matching")], "rule"),
    ]  # fmt: skip
    return f"compared by {'; '.join(parts)}; {centred_text(settings)}"


def centred_text(settings: Mapping[str, Any]) -> str:
    """How representations are centred before they are compared."""
    centred = {"location-mean": "centred per location", "channel-mean": "centred per channel", None: "not centred"}
    return f"representations {centred[settings['centering']]}"


def models_text(entries: Sequence[ModelConfig]) -> str:
    """The models of a study and where their weights come from."""
    texts = []
    for entry in entries:
        origin = "trained by a recipe" if entry.recipe is not None else entry.source or "checkpoints"
        if entry.recipe is None and entry.weights != "default":
            origin += ", random weights" if entry.weights is None else f", weights {entry.weights}"
        texts.append(f"{', '.join(entry.titles())}: {origin}")
    return "; ".join(texts)


def images_text(folder: Path) -> dict[str, str]:
    """The images of a run, under "Images"; {} for runs of versions that did not store them.

    Raises:
        StorageError: `provenance.json` is damaged.
    """
    file = folder / "provenance.json"
    stored = load_json(file).get("images") if file.is_file() else None
    if not isinstance(stored, list):
        return {}
    listed = [
        f"{one['images']:,} of {one['of']}"
        + (f" ({one['skipped']} unreadable files left out)" if one["skipped"] else "")
        for one in stored
    ]
    return {"Images": "; ".join(dict.fromkeys(listed))}


def cost_text(*pairs: int) -> dict[str, str]:
    """How many pairs of images were compared, under "Cost"; several numbers are those of different models."""
    return {"Cost": f"{' or '.join(f'{count:,}' for count in pairs)} pairs of images in each layer, by each rule"}


def certificates_text(shown: Mapping[str, ShownModel]) -> dict[str, str]:
    """What is proven about the matchings of a run, under "Certificate"; {} if nothing is stored."""
    gaps: dict[str, float] = {}
    for of_model in shown.values():
        for name, gap in of_model.facts.get("gaps", {}).items():
            gaps[name] = max(gaps.get(name, 0.0), gap)
    if not gaps:
        return {}
    listed = ", ".join(f"{rule_words(name)} {gap:.1e}" for name, gap in gaps.items())
    return {"Certificate": f"largest possible distance of a product from the optimum, as a share of |x| |y|: {listed}"}


def counted(names: Sequence[Any], what: str, most: int = 6) -> str:
    """Number and names of things, such as "2 layers (a, b)"; many names are cut short."""
    listed = ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")
    return f"{len(names)} {what}{'s' if len(names) != 1 else ''} ({listed})"


def share_of(sizes: Sequence[int]) -> str:
    """Sizes of databases in words."""
    return f"a database of {' or '.join(f'{size:,}' for size in sizes)}"


def by_measure(rows: Sequence[Row], measures: Mapping[str, Sequence[str]]) -> list[Row]:
    """Rows with one measure each, as `measure`, and its value and interval under the keys of `VALUE`.

    Args:
        rows: rows of a result; those without a value are left out.
        measures: title -> keys of a value and of the lower and upper end of its interval.
    """
    return [
        {**row, "measure": title, **dict(zip(VALUE, (row[key] for key in keys), strict=True))}
        for title, keys in measures.items()
        for row in rows
        if not math.isnan(row[keys[0]])
    ]


def result_table(name: str, result: TableResult, keys: Sequence[str], rows: Sequence[Row] | None = None) -> Table:
    """The rows of a result with some of their keys, in words."""
    rows = result.table if rows is None else rows
    keys = [key for key in keys if key in rows[0]]
    words = {"kernel": kernel_title, "matching": rule_words}
    return Table(name, keys, [[words.get(key, _same)(row[key]) for key in keys] for row in rows])


def differences_section(
    table: Sequence[Row],
    result: TableResult,
    measures: Mapping[str, tuple[str, bool]],
    tick: str,
    menus: Mapping[str, str],
    level: float,
) -> Section:
    """How the semantic RSM differs from every baseline, drawn, counted and listed.

    Args:
        table: rows of the result, with the keys of `menus`.
        result: the result.
        measures: key of a difference -> what is compared, and whether lower values are better.
        tick: key of the ticks.
        menus: see `interval_chart`.
        level: level of the intervals.
    """
    rows = [
        row
        for key, (what, lower) in measures.items()
        for row in by_measure(differences(table, key, lower), {what: (key, f"{key}_low", f"{key}_high")})
    ]
    heading = "The semantic RSM against each baseline"
    if not rows:
        return Section(heading, "This run has no semantic RSM, or no baseline to compare it with.")
    where = ["model", "layer", "locations", *(["database"] if "database" in rows[0] else []), "kernel", "matching"]
    columns = ["measure", *where, *VALUE, "verdict"]
    chart = interval_chart(
        rows, tick, VALUE, "semantic RSM minus baseline",
        rule_titles([row for row in table if row["matching"] != row["semantic"]]),
        menus={"measure": "measure ", **menus}, hover={"locations": "locations"}, reference=0.0,
        verdicts={"verdict": "by the interval"},
    )  # fmt: skip
    lower = any(lower for _, lower in measures.values())
    text = (
        f"Differences are the semantic RSM minus the baseline, with the {level:.0%} interval from the same draws for "
        f"both. {'Negative differences are in favour of the semantic RSM. ' if lower else ''}Hollow points are "
        f"undecided: their interval contains 0. By chance alone, about {1 - level:.0%} of the cells without a "
        "difference are decided."
    )
    parts: list[Part] = [
        Chart(
            "differences", chart,
            "Differences with their intervals; the dashed line marks 0. Click on the legend, or tap it, to single out "
            "a baseline.",
            result_table("differences", result, columns, rows),
        ),
        Group("Counted by measure, baseline and kernel", [
            Table(
                "verdicts", ["measure", "networks", "baseline", "kernel", "cells", "semantic better", "baseline better",
                             "undecided"],
                verdict_counts(rows),
                "Number of cells in which the interval excludes 0, and of those in which it does not.",
            ),
        ]),
        Text(TABLES_NOTE),
    ]  # fmt: skip
    return Section(heading, text, parts)


def _same(value: Any) -> Any:
    return value
