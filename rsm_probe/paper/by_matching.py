"""Tables with a column per matching, and panels with a line per matching."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib.figure import Figure

from rsm_probe.figures import RuleStyle, common_legend, interval_plot, lettered, print_style, rule_styles
from rsm_probe.paper.similarity_rules import is_shown_as_semantic, matching_title
from rsm_probe.runs.tables import Row, kernel_title, markdown, shown, with_interval

_NOTHING = (math.nan, math.nan, math.nan)
# Inches of a panel for each point at a tick, and the width of the widest panel.
_POINT, _WIDEST = 0.055, 7.0


def distinct(rows: Sequence[Row], key: str) -> list[Any]:
    """The distinct values of a key, in the order of the rows."""
    return list(dict.fromkeys(row[key] for row in rows))


def comparison_table(
    rows: Sequence[Row], cell: Callable[[Row], str], gain: str = "", paper: str = "", kernels: bool = True
) -> str:
    """Format a Markdown table with models, layers and kernels in rows and matchings in columns.

    Args:
        rows: rows of a result, with the keys `model`, `layer`, `locations`, `kernel` and `matching`.
        cell: row -> text of its cell.
        gain: key of the difference between the semantic and the spatio-semantic RSM, with `_low` and `_high`.
        paper: key of the paper's number; matchings without numbers get no column.
        kernels: whether the table has a column for the kernel.
    """
    lines: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row["model"], row["layer"], row["locations"], row["kernel"]), {})[row["matching"]] = row
    names = distinct(rows, "matching")
    columns: list[tuple[str, str, Callable[[Row], str]]] = [(matching_title(name), name, cell) for name in names]
    for name in names if gain else ():
        if is_shown_as_semantic(name):
            columns.append((f"{matching_title(name)} - none", name, lambda row: gain_with_interval(row, gain)))
    for name in names if paper else ():
        if any(row["matching"] == name and not math.isnan(row[paper]) for row in rows):
            columns.append((f"paper, {matching_title(name)}", name, lambda row: shown(row[paper])))
    head = ["model", "layer", "S"] + ["kernel"] * kernels
    cells = []
    for (*where, kernel), line in lines.items():
        values = (say(line[name]) if name in line else "-" for _, name, say in columns)
        cells.append([*where, *[kernel_title(kernel)] * kernels, *values])
    return markdown([*head, *(heading for heading, _, _ in columns)], cells)


def gain_with_interval(row: Row, gain: str = "gain") -> str:
    """Format a difference with its interval; a dash if there is none."""
    return with_interval(row, gain, f"{gain}_low", f"{gain}_high")


def paper_note(stated: bool, meaning: str) -> str:
    """The last line of a report: what the paper's numbers mean, or why the report has none."""
    if stated:
        return f"*paper*: {meaning}"
    return "The paper's numbers are not shown, because models or data differ from those of the paper."


def lines_by_matching(
    rows: Sequence[Row], ticks: Sequence[tuple[Any, ...]], keys: Sequence[str], names: Sequence[str],
    values: Sequence[str],
) -> dict[str, list[tuple[float, float, float]]]:  # fmt: skip
    """Collect value and interval at each tick by matching; matchings without rows are included, to keep colours fixed.

    Args:
        rows: rows of a result.
        ticks: positions along the x-axis, as values of `keys`.
        keys: the keys that identify a tick.
        names: names of the matchings.
        values: keys of the value and of the lower and upper end of its interval.
    """
    lines: dict[str, dict[tuple[Any, ...], tuple[float, float, float]]] = {matching_title(name): {} for name in names}
    for row in rows:
        value, low, high = (row[key] for key in values)
        lines[matching_title(row["matching"])][tuple(row[key] for key in keys)] = value, low, high
    return {name: [points.get(tick, _NOTHING) for tick in ticks] for name, points in lines.items()}


def styles_by_title(names: Iterable[str]) -> dict[str, RuleStyle]:
    """The colour and marker of matchings by their titles, the same in all figures."""
    return {matching_title(name): style for name, style in rule_styles(names).items()}


@print_style()
def panels_by_kernel(
    rows: Sequence[Row], keys: Sequence[str], values: Sequence[str], meaning: str, chance: float | None = None
) -> Figure:
    """Draw models or layers side by side, with a panel per kernel (paper, Figure 3).

    Args:
        rows: rows of a result.
        keys: the keys that identify a model or layer.
        values: keys of the value and of the lower and upper end of its interval.
        meaning: label of the values.
        chance: value expected by chance, drawn as a dashed line; None for no line.
    """
    kernels, names = distinct(rows, "kernel"), distinct(rows, "matching")
    ticks = list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))
    # Wide enough for the points of a tick to lie side by side, and stacked where panels are wide.
    width = min(max(2.2, 0.6 + len(ticks) * len(names) * _POINT), _WIDEST)
    stacked = width * len(kernels) > _WIDEST + 1.0
    shape = (len(kernels), 1) if stacked else (1, len(kernels))
    figure = Figure(figsize=(width * shape[1] + 0.4, 2.1 * shape[0] + 0.9), layout="constrained")
    axes = figure.subplots(*shape, sharey=True, squeeze=False)
    lettered(axes.flat)
    for ax, kernel in zip(axes.flat, kernels, strict=True):
        mine = [row for row in rows if row["kernel"] == kernel]
        lines = lines_by_matching(mine, ticks, keys, names, values)
        interval_plot(
            ax,
            [", ".join(tick) for tick in ticks],
            lines,
            kernel_title(kernel),
            meaning if ax in axes[:, 0] else "",
            chance,
            styles=styles_by_title(names),
            joined=False,
        )
    return common_legend(figure)
