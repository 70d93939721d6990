"""Tables 2 and 3 of the paper, as measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rsm_probe.paper.similarity_rules import SEMANTIC, title
from rsm_probe.runs.entries import base_title
from rsm_probe.runs.tables import (
    Row,
    TableResult,
    accuracy_line,
    escaped,
    kernel_title,
    markdown,
    shown,
    with_interval,
)

if TYPE_CHECKING:
    from rsm_probe.paper.retrieval.study import RetrievalConfig


def retrieval_report(config: RetrievalConfig, result: TableResult, accuracies: Mapping[str, float]) -> str:
    """One table for each size of the database: models, layers and kernels in rows, matchings in columns."""
    what = {"f1": "F1", "iou": "IoU"}[config.score]
    drawn = (
        "from images drawn apart from the database" if config.query_images is None else "from another part of the data"
    )
    parts = [
        f"# Retrieval (paper, section 4.2 and appendix D; Table {2 if config.score == 'f1' else 3})\n\n"
        f"{config.queries} queries {drawn} of {escaped(config.images.source)}. "
        f"*{what}@1*: the {what} of each query's objects and those of its nearest image, with the interval "
        f"({config.level:.0%}) over queries; *best of {config.top}*: the largest among the nearest. *none*: equal "
        "locations; *PI*: permutation-invariant. Differences are over the same queries, and the intervals draw scenes "
        "or videos, whose frames are not independent.\n",
        accuracy_line(accuracies),
    ]
    for size in config.database_sizes:
        parts += [f"## {what}@1 in a database of {size} images\n", _table(result, size, what)]
        parts += [f"## Best of {config.top} in a database of {size} images\n", _best(result, size)]
    parts.append("## What the intervals allow to say\n")
    controls = {entry.control_title for entry in config.models if entry.control}
    for kind, chosen in (("", False), (", untrained", True)):
        for kernel in config.kernels:
            rows = [r for r in result.select(kernel=kernel) if (base_title(r["model"]) in controls) == chosen]
            parts += [f"- {kernel_title(kernel)}{kind}: {line}" for line in conclusions(rows, f"{what}@1")]
    parts.append("\nThe cells of one table share queries and database, so that they are no independent evidence.")
    known = [row for row in result.table if not math.isnan(row["paper"])]
    if known:
        parts.append("\n*paper*: what the paper states for this model, these data and this number of images.")
    else:
        parts.append("\nModels or data are not those of the paper, so that its numbers do not stand beside these.")
    return "\n".join(part for part in parts if part) + "\n"


def conclusions(rows: Sequence[Row], what: str) -> list[str]:
    """For each other way of comparing: in how many cells of the table it is better or worse than the usual ones.

    Args:
        rows: with `gain` over the identity and `behind`, the difference to optimal matching, and their intervals.
        what: the values are called.
    """
    lines = []
    for name in dict.fromkeys(row["matching"] for row in rows):
        for key, against in (("gain", "identity"), ("behind", "optimal")):
            cells = [row for row in rows if row["matching"] == name and not math.isnan(row.get(key, math.nan))]
            if name in ("identity", against) or not cells:
                continue
            above = sum(row[f"{key}_low"] > 0 for row in cells)
            below = sum(row[f"{key}_high"] < 0 for row in cells)
            lines.append(
                f"{what} of *{title(name)}* is above that of *{title(against)}* in {above} of {len(cells)} cells and "
                f"below it in {below}, the interval clear of 0; in the others the data do not tell."
            )
    return lines


def _table(result: TableResult, size: int, what: str) -> str:
    rows = result.select(database=size)
    names = list(dict.fromkeys(row["matching"] for row in rows))
    semantic = [name for name in names if name in SEMANTIC]
    papers = [name for name in names if any(r["matching"] == name and not math.isnan(r["paper"]) for r in rows)]
    lines = []
    for where in dict.fromkeys((row["model"], row["layer"], row["locations"], row["kernel"]) for row in rows):
        keys = dict(zip(("model", "layer", "locations", "kernel"), where, strict=True))
        found = {row["matching"]: row for row in rows if all(row[key] == value for key, value in keys.items())}
        line = [*where[:3], kernel_title(where[3])]
        line += [with_interval(found[name], "score") if name in found else "-" for name in names]
        line += [with_interval(found[name], "gain", "gain_low", "gain_high") for name in semantic]
        lines.append([*line, *(shown(found[name]["paper"]) if name in found else "-" for name in papers)])
    headings = ["model", "layer", "S", "kernel", *(title(name) for name in names)]
    headings += [f"{title(name)} - none" for name in semantic] + [f"paper, {title(name)}" for name in papers]
    return markdown(headings, lines)


def _best(result: TableResult, size: int) -> str:
    rows = result.select(database=size)
    names = list(dict.fromkeys(row["matching"] for row in rows))
    lines = []
    for where in dict.fromkeys((row["model"], row["layer"], row["locations"], row["kernel"]) for row in rows):
        found = {
            row["matching"]: row
            for row in rows
            if (row["model"], row["layer"], row["locations"], row["kernel"]) == where
        }
        cells = [with_interval(found[n], "best", "best_low", "best_high") if n in found else "-" for n in names]
        lines.append([*where[:3], kernel_title(where[3]), *cells])
    return markdown(["model", "layer", "S", "kernel", *(title(name) for name in names)], lines)
