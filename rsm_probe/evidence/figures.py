"""One figure per factor and model: scores by rule, and how much better the semantic RSM is than each baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsm_probe.evidence.differences import DIFFERENCE, SEMANTIC_RULE, varies
from rsm_probe.evidence.words import rule_title, what_of
from rsm_probe.figures import RuleStyle, lettered, print_style, rule_styles
from rsm_probe.paper.by_matching import distinct
from rsm_probe.runs.tables import Row, TableResult, kernel_title

# Size of a panel in inches, as printed.
_PANEL = (2.1, 1.55)
_SCORE = ("score", "low", "high")


@print_style()
def factor_figures(result: TableResult) -> dict[str, Figure]:
    """Draw all factors of a finished run, for each model."""
    styles = rule_styles([SEMANTIC_RULE, *distinct(result.table, "matching")])
    figures = {}
    for factor in distinct(result.table, "factor"):
        for model in distinct(result.table, "model"):
            if rows := result.select(factor=factor, model=model):
                base = result.settings["base"]
                title = (
                    f"{factor}, {model}\n{base['queries']} queries, {base['database_sizes'][0]} images, "
                    f"{base['level']:.0%} intervals over queries"
                )
                figures[f"factor-{factor}-{model}"] = _factor(rows, title, what_of(base), styles)
    return figures


def _factor(rows: Sequence[Row], title: str, what: str, styles: Mapping[str, RuleStyle]) -> Figure:
    """Draw panels of scores above panels of differences, with a column per kernel and a pair of rows per layer."""
    factor = rows[0]["factor"]
    # What changes from level to level has no panels of its own.
    layers = [None] if varies(rows, "layer") else distinct(rows, "layer")
    kernels = [None] if varies(rows, "kernel") else distinct(rows, "kernel")
    grid = [[(layer, kernel) for kernel in kernels] for layer in layers]
    grid = [[cell for line in grid for cell in line]] if len(kernels) == 1 else grid
    size = (max(_PANEL[0] * len(grid[0]), 4.2) + 0.5, 2 * _PANEL[1] * len(grid) + 0.8)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots(2 * len(grid), len(grid[0]), squeeze=False, sharex=True, sharey="row")
    for k, line in enumerate(grid):
        for column, (layer, kernel) in enumerate(line):
            mine = [r for r in rows if layer in (None, r["layer"]) and kernel in (None, r["kernel"])]
            above, below = axes[2 * k][column], axes[2 * k + 1][column]
            _lines(above, mine, _SCORE, styles)
            _lines(below, mine, DIFFERENCE, {rule: styles[rule] for rule in styles if rule != SEMANTIC_RULE})
            below.axhline(0, color="0.4", linewidth=0.6, zorder=0)
            names = [kernel_title(kernel)] if kernel else []
            names += [f"{layer} ({_locations(mine)})"] if layer else []
            above.set_title(", ".join(names))
            if column == 0:
                above.set_ylabel(what)
                below.set_ylabel("semantic RSM\nminus baseline")
    levels = distinct(rows, "level")
    for ax in axes[-1]:
        ax.set_xticks(range(len(levels)), levels, rotation=30 if max(map(len, levels)) > 9 else 0)
        ax.set_xlabel(factor)
    lettered(axes.flat)
    figure.suptitle(title)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(4 if size[0] > 5 else 3, len(labels)), frameon=False
    )
    return figure


def _lines(ax: Axes, rows: Sequence[Row], keys: Sequence[str], styles: Mapping[str, RuleStyle]) -> None:
    """Draw the values of each rule at all levels, with intervals; levels that have an order are joined by lines."""
    levels = distinct(rows, "level")
    ordered = varies(rows, "layer") or all(level[:1].isdigit() for level in levels)
    every = {level: number for number, level in enumerate(levels)}
    for number, (rule, style) in enumerate(styles.items()):
        points = [
            (every[row["level"]], *(row[key] for key in keys))
            for row in rows
            if row["matching"] == rule and not math.isnan(row[keys[0]])
        ]
        if not points:
            continue
        # Half the width of a marker apart, so that intervals that cover each other stay visible.
        x = [point[0] + (number - (len(styles) - 1) / 2) * 0.05 for point in points]
        spread = [[value - low for _, value, low, _ in points], [high - value for _, value, _, high in points]]
        semantic = rule == SEMANTIC_RULE
        ax.errorbar(
            x, [point[1] for point in points], yerr=spread, capsize=1.5, elinewidth=0.7, capthick=0.7,
            linestyle="-" if ordered else "none", linewidth=1.4 if semantic else 1.0, zorder=3 if semantic else 2,
            **style.options(),
            label=rule_title(rule),
        )  # fmt: skip
    ax.margins(x=0.12)
    ax.grid(axis="y", linewidth=0.3, alpha=0.6)


def _locations(rows: Sequence[Row]) -> str:
    return "S = " + ", ".join(str(count) for count in distinct(rows, "locations"))
