"""Parts that the pages of several experiments have: the setting, result tables, differences from each baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rsm_probe.paper.by_matching import distinct
from rsm_probe.paper.page_charts import interval_chart
from rsm_probe.paper.page_words import differences, rule_titles, rule_words, verdict_counts
from rsm_probe.report.page import Chart, Part, Section, Table, Text
from rsm_probe.runs.tables import Row, TableResult, kernel_title

TABLES_NOTE = "All cells of a run share images, so they are not independent evidence."
# Most lines between the locations of two images.
_MOST_LINES = 14


def setting_of(settings: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Models, layers, kernels and rules of a run, as the end of a sentence."""
    models, layers = distinct(rows, "model"), distinct(rows, "layer")
    parts = [
        counted(models, "model"), counted(layers, "layer"),
        counted([kernel_title(kernel) for kernel in distinct(rows, "kernel")], "kernel"),
        counted([rule_words(name) for name in distinct(rows, "matching")], "rule"),
    ]  # fmt: skip
    centred = {"location-mean": "centred per location", "channel-mean": "centred per channel", None: "not centred"}
    return f"compared by {'; '.join(parts)}; representations {centred[settings['centering']]}"


def counted(names: Sequence[Any], what: str, most: int = 6) -> str:
    """Number and names of things, such as "2 layers (a, b)"; many names are cut short."""
    listed = ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")
    return f"{len(names)} {what}{'s' if len(names) != 1 else ''} ({listed})"


def share_of(sizes: Sequence[int]) -> str:
    """Sizes of databases in words."""
    return f"a database of {' or '.join(f'{size:,}' for size in sizes)}"


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
        {**row, "measure": what, "value": row[key], "value_low": row[f"{key}_low"], "value_high": row[f"{key}_high"]}
        for key, (what, lower) in measures.items()
        for row in differences(table, key, lower)
    ]
    heading = "The semantic RSM against each baseline"
    if not rows:
        return Section(heading, "This run has no semantic RSM, or no baseline to compare it with.")
    where = ["model", "layer", "locations", *(["database"] if "database" in rows[0] else []), "kernel", "matching"]
    columns = ["measure", *where, "value", "value_low", "value_high", "verdict"]
    chart = interval_chart(
        rows, tick, ("value", "value_low", "value_high"), "semantic RSM minus baseline",
        rule_titles([row for row in table if row["matching"] != row["semantic"]]),
        menus={"measure": "measure ", **menus}, hover={"locations": "locations"}, reference=0.0,
        verdicts={"verdict": "by the interval"},
    )  # fmt: skip
    lower = any(lower for _, lower in measures.values())
    text = (
        f"Differences are the semantic RSM minus the baseline, with the {level:.0%} interval from the same draws for both. "
        f"{'Negative differences are in favour of the semantic RSM. ' if lower else ''}"
        f"Hollow points are undecided: their interval contains 0. By chance alone, about {1 - level:.0%} of the cells "
        f"without a difference are decided."
    )
    parts: list[Part] = [
        Chart(
            "differences", chart,
            "Differences with their intervals; the dashed line is no difference. Choose with the menus; click on the legend "
            "to single out a baseline.",
            result_table("differences", result, columns, rows),
        ),
        Table(
            "verdicts", ["measure", "networks", "baseline", "kernel", "cells", "semantic better", "baseline better",
                         "undecided"],
            verdict_counts(rows),
            "Number of cells in which the interval excludes 0, and of those in which it does not.",
        ),
        Text(TABLES_NOTE),
    ]  # fmt: skip
    return Section(heading, text, parts)


def joined(
    grids: tuple[tuple[int, ...], tuple[int, ...]], permutation: np.ndarray, affinities: np.ndarray
) -> list[tuple[float, float, float, float, float]]:
    """Lines between the strongest matched locations of two images.

    Args:
        grids: (rows, columns) of the locations of each image.
        permutation: partner of each location of the first image, (S,), -1 for none.
        affinities: what each location adds to the product, (S,).

    Returns:
        (x, y, x, y, strength) of each line, each between 0 and 1; weakest first.
    """
    matched = np.flatnonzero(permutation >= 0)
    order = matched[np.argsort(affinities[matched], kind="stable")][-_MOST_LINES:]
    largest = float(np.abs(affinities[order]).max(initial=0.0)) or 1.0
    return [
        (*_centre(grids[0], int(here)), *_centre(grids[1], int(permutation[here])),
         max(0.0, float(affinities[here]) / largest))
        for here in order
    ]  # fmt: skip


def _centre(grid: Sequence[int], location: int) -> tuple[float, float]:
    row, column = divmod(location, grid[1])
    return (column + 0.5) / grid[1], (row + 0.5) / grid[0]


def _same(value: Any) -> Any:
    return value
