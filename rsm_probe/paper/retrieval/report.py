"""Tables 2 and 3 of the paper, from our measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

from rsm_probe.paper.by_matching import comparison_table, distinct, paper_note
from rsm_probe.paper.semantic_differences import semantic_differences
from rsm_probe.paper.similarity_rules import matching_title
from rsm_probe.runs.tables import Row, TableResult, accuracy_line, escaped, kernel_title, with_interval


def retrieval_report(result: TableResult, accuracies: Mapping[str, float]) -> str:
    """Write one table per database size, with models, layers and kernels in rows and matchings in columns."""
    settings = result.settings
    what, top = {"f1": "F1", "iou": "IoU"}[settings["score"]], settings["top"]
    apart = settings["query_images"] is None
    drawn = "drawn from outside the database," if apart else "from another part of the data,"
    parts = [
        f"# Retrieval (paper, section 4.2 and appendix D; Table {2 if what == 'F1' else 3})\n\n"
        f"{settings['queries']} queries {drawn} images of {escaped(settings['images']['source'])}. "
        f"*{what}@1*: mean {what} between the objects of a query and those of its nearest image, with the "
        f"{settings['level']:.0%} interval over queries; *best of {top}*: the largest {what} among the nearest {top}. "
        "*none*: equal locations; *PI*: permutation-invariant. Differences are between the same queries. Intervals "
        "come from drawing whole scenes or videos, because their frames are not independent.\n",
        accuracy_line(accuracies),
        _objects(result.table),
    ]
    for size in settings["database_sizes"]:
        rows = result.select(database=size)
        scores = comparison_table(rows, partial(with_interval, value="score"), "gain", "paper")
        best = comparison_table(rows, partial(with_interval, value="best", low="best_low", high="best_high"))
        parts += [f"## {what}@1 in a database of {size} images\n", scores]
        parts += [f"## Best of {top} in a database of {size} images\n", best]
    measures = {"difference": (f"{what}@1", False), "best_difference": (f"Best of {top}", False)}
    parts.append(semantic_differences(result.table, measures, settings, ["database"]))
    parts.append("## Conclusions from the intervals\n")
    for kind, untrained in (("", False), (", untrained", True)):
        for kernel in settings["kernels"]:
            rows = result.select(kernel=kernel, untrained=untrained)
            parts += [f"- {kernel_title(kernel)}{kind}: {line}" for line in conclusions(rows, f"{what}@1")]
    parts.append("\nThe cells of a table share queries and database, so they are not independent evidence.")
    stated = any(not math.isnan(row["paper"]) for row in result.table)
    note = paper_note(stated, "the paper's value for this model, data set and number of images.")
    parts.append(f"\n{note}")
    return "\n".join(part for part in parts if part) + "\n"


def _objects(rows: Sequence[Row]) -> str:
    """Say which objects count, where this depends on what a model sees; "" where all do."""
    said = {row["model"]: row.get("objects", "") for row in rows}
    lines = [f"- Objects that count for {escaped(model)}: {text}." for model, text in said.items() if text]
    return "\n".join([*lines, ""]) if lines else ""


def conclusions(rows: Sequence[Row], what: str) -> list[str]:
    """Say for each matching in how many cells it is better or worse than the identity.

    Args:
        rows: rows with `gain` (the difference from the identity) and its interval.
        what: name of the score.
    """
    lines = []
    for name in distinct(rows, "matching"):
        cells = [row for row in rows if row["matching"] == name and not math.isnan(row.get("gain", math.nan))]
        if name == "identity" or not cells:
            continue
        above = sum(row["gain_low"] > 0 for row in cells)
        below = sum(row["gain_high"] < 0 for row in cells)
        lines.append(
            f"{what} of *{matching_title(name)}* is significantly above that of *{matching_title('identity')}* in "
            f"{above} of {len(cells)} cells, significantly below it in {below}, and inconclusive in the rest."
        )
    return lines
