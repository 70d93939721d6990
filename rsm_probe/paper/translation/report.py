"""The tables of the translation experiment as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from rsm_probe.paper.by_matching import comparison_table, distinct
from rsm_probe.paper.semantic_differences import semantic_differences
from rsm_probe.runs.tables import TableResult, accuracy_line, escaped, kernel_title, shown, with_interval

_INTRODUCTION = """# Translation sensitivity (paper, section 4.1, Figure 2; appendix B, Figure 7)

Each image of {edge} x {edge} pixels gives two crops of {crop} x {crop}, which share {shared} x {crop} pixels; {batches}
mini-batches of {batch} images. *AUROC*: how often two overlapping crops are more similar than two crops of different
photographs, with the {level:.0%} interval from drawing photographs with replacement. Those crops are easy to separate;
crops of different parts of one photograph share texture and light, but no pixels. The paper shows distributions, but
gives no numbers. *none*: equal locations; *PI*: permutation-invariant.
"""


def translation_report(result: TableResult, accuracies: Mapping[str, float]) -> str:
    """Write three tables per kernel, with layers in rows and matchings in columns."""
    settings = result.settings
    parts = [
        _INTRODUCTION.format(**{**settings, "shared": 2 * settings["crop"] - settings["edge"]}),
        _as_seen(result, settings["crop"]),
        accuracy_line(accuracies),
    ]
    apart = partial(with_interval, value="apart", low="apart_low", high="apart_high")
    for kernel in distinct(result.table, "kernel"):
        rows = result.select(kernel=kernel)
        parts += [
            f"## {kernel_title(kernel)}\n",
            "AUROC against crops of different photographs:\n",
            comparison_table(rows, partial(with_interval, value="auroc"), "gain", kernels=False),
            "AUROC against crops of different parts of the same photograph:\n",
            comparison_table(rows, apart, kernels=False),
            "How often the partner is the most similar crop:\n",
            comparison_table(rows, lambda row: shown(row["partner_first"], 2), kernels=False),
        ]
    measures = {
        "difference": ("AUROC against crops of different photographs", False),
        "apart_difference": ("AUROC against crops of different parts of the same photograph", False),
    }
    if all(math.isnan(row["apart"]) for row in result.table):
        del measures["apart_difference"]
    parts.append(semantic_differences(result.table, measures, settings))
    return "\n".join(part for part in parts if part)


def _as_seen(result: TableResult, crop: int) -> str:
    """Say which pixels of the crops models see that resize and crop them again; "" where all see whole crops."""
    lines = []
    for model in distinct(result.table, "model"):
        row = result.select(model=model)[0]
        width, height, shared = (row.get(f"seen_{name}", math.nan) for name in ("width", "height", "shared"))
        if math.isnan(width):
            lines.append(f"- Which part of the crops {escaped(model)} sees is not known.")
        elif (width, height) != (crop, crop):
            lines.append(
                f"- {escaped(model)} sees {height:.4g} x {width:.4g} pixels of each crop, after its own resize and "
                f"crop, of which the two share {shared:.4g} x {width:.4g}."
            )
    return "\n".join([*lines, ""]) if lines else ""
