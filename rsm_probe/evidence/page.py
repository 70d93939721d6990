"""The page of factors, and what the page of the evidence says of all studies together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rsm_probe.evidence.differences import DIFFERENCE, SEMANTIC_RULE, Verdicts, baselines, varies
from rsm_probe.evidence.report import MEANS, gains_of
from rsm_probe.evidence.words import rule_title, what_of
from rsm_probe.paper.by_matching import distinct
from rsm_probe.paper.page_charts import interval_chart
from rsm_probe.paper.page_parts import TABLES_NOTE, counted, result_table
from rsm_probe.paper.page_words import COMPARED, verdict_words
from rsm_probe.report.page import Chart, Page, Part, Section, Table
from rsm_probe.runs.tables import Row, TableResult, kernel_title, with_interval

_VERDICTS = (
    "Cells in which the semantic RSM is better / undecided / worse. It is undecided where the interval of its "
    "difference from the baseline contains 0."
)


def factors_page(result: TableResult) -> Page:
    """Lay out the page of a finished run, without command and provenance."""
    base, rows = result.settings["base"], result.table
    what, level = what_of(base), base["level"]
    titles = {name: rule_title(name) for name in [SEMANTIC_RULE, *baselines(rows)]}
    sections = [
        Section(
            "All factors",
            "How often the semantic RSM is better than each baseline, over all levels, layers and kernels. "
            + TABLES_NOTE,
            [verdict_table("verdicts", rows, ["factor"])],
        ),
        *(_factor(result, factor, titles, what, level) for factor in distinct(rows, "factor")),
    ]
    size = base["database_sizes"][0]
    return Page(
        "Where semantic RSMs win, one factor at a time",
        "Which property of images, models and settings decides whether matching locations helps retrieval?",
        f"Retrieval of images of the set {base['images']['source']} by their objects: {base['queries']} queries, a "
        f"database of {size:,} images; {counted(distinct(rows, 'model'), 'model')}; "
        f"{counted(distinct(rows, 'factor'), 'factor')}. Each factor changes alone; all else is the base setting. "
        f"{what} compares the objects of a query with those of its nearest image.",
        _answer(rows, level, what),
        sections,
        command="",
        notes=[TABLES_NOTE],
    )


def verdicts_section(tables: Mapping[str, tuple[str, Sequence[Row]]]) -> Section:
    """What several studies say of each baseline.

    Args:
        tables: name of a study -> its kind and the rows of its result.
    """
    rows = [
        {**row, "study": name, "compared": MEANS[kind]}
        for name, (kind, table) in tables.items()
        if kind in COMPARED
        for row in gains_of(kind, table)
    ]
    parts: list[Part] = [verdict_table("verdicts", rows, ["study", "compared"])] if rows else []
    return Section("The semantic RSM against each baseline, in all studies", TABLES_NOTE, parts)


def verdict_table(name: str, rows: Sequence[Row], keys: Sequence[str]) -> Table:
    """Count what the intervals say of each baseline.

    Args:
        name: name of the table.
        rows: rows as `gains` makes them.
        keys: what tells the lines of the table apart, besides the model.
    """
    names = baselines(rows)
    lines = list(dict.fromkeys(tuple(row[key] for key in (*keys, "model")) for row in rows))
    cells: list[list[Any]] = []
    for line in lines:
        mine = [row for row in rows if tuple(row[key] for key in (*keys, "model")) == line]
        cells.append([*line, *(str(Verdicts.of(row for row in mine if row["matching"] == rule)) for rule in names)])
    return Table(name, [*keys, "model", *(f"against {rule_title(rule)}" for rule in names)], cells, _VERDICTS)


def _factor(result: TableResult, factor: str, titles: Mapping[str, str], what: str, level: float) -> Section:
    """Scores and differences at all levels of a factor."""
    rows = [{**row, "kernel_name": kernel_title(row["kernel"])} for row in result.select(factor=factor)]
    # No menu offers what changes from level to level.
    menus = {"model": "model "} | ({} if varies(rows, "layer") else {"layer": "layer "})
    menus |= {} if varies(rows, "kernel") else {"kernel_name": "kernel "}
    hover = {"locations": "locations", "queries": "queries"}
    scores = interval_chart(rows, "level", ("score", "low", "high"), what, titles, menus=menus, hover=hover)
    # Differences are those of baselines; who is better is said of each.
    known = [{**row, "verdict": verdict_words(row, DIFFERENCE[0])} for row in rows if row["matching"] != SEMANTIC_RULE]
    others = {name: title for name, title in titles.items() if name != SEMANTIC_RULE}
    differences = interval_chart(
        known, "level", DIFFERENCE, "semantic RSM minus baseline", others, menus=menus, hover=hover, reference=0.0,
        verdicts={"verdict": "by the interval"},
    )  # fmt: skip
    columns = ["level", "model", "layer", "locations", "kernel", "matching", "score", "low", "high", *DIFFERENCE]
    return Section(
        factor,
        "Scores by rule, and how much better the semantic RSM is than each baseline on the same queries, with "
        f"{level:.0%} intervals over queries (whole scenes, where frames share one). Hollow points are undecided: "
        "their interval contains 0.",
        [
            Chart(f"{factor}-scores", scores, f"{what} at each level, with intervals."),
            Chart(
                f"{factor}-differences",
                differences,
                "Semantic RSM minus baseline at each level; the dashed line marks 0.",
                result_table(f"{factor}", result, columns, rows),
            ),
        ],
    )


def _answer(rows: Sequence[Row], level: float, what: str) -> str:
    """The verdicts against each baseline, and the largest difference from the first that is decided."""
    trained = [row for row in rows if not row["untrained"]] or list(rows)
    names = baselines(trained)
    if not names:
        return f"No difference in {what} has an interval. Nothing is shown."
    counts = {name: Verdicts.of(row for row in trained if row["matching"] == name) for name in names}
    listed = ", ".join(f"{rule_title(name)} {count}" for name, count in counts.items())
    first = "identity" if "identity" in names else names[0]
    cells = [row for row in trained if row["matching"] == first and verdict_words(row, DIFFERENCE[0])]
    sentence = (
        f"Cells of trained models in which the {level:.0%} interval of semantic RSM minus baseline lies above 0 / "
        f"contains 0 / lies below 0: {listed}."
    )
    if not cells:
        return f"{sentence} No difference from {rule_title(first)} is decided."
    ends = [choose(cells, key=lambda row: row[DIFFERENCE[0]]) for choose in (min, max)]
    low, high = (
        f"{with_interval(row, *DIFFERENCE)} ({row['factor']}: {row['level']}, {row['layer']} of {row['model']}, "
        f"{kernel_title(row['kernel'])})"
        for row in ends
    )
    decided = f"The only decided difference in {what} from {rule_title(first)} is {low}"
    if len(cells) > 1:
        decided = f"The decided differences in {what} from {rule_title(first)} lie between {low} and {high}"
    return (
        f"{sentence} {decided}; by chance alone, about {1 - level:.0%} of the cells without a difference would be "
        "decided."
    )
