"""The tables of the translation experiment, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from rsm_probe.paper.by_matching import comparison_table, distinct
from rsm_probe.runs.tables import TableResult, accuracy_line, kernel_title, shown, with_interval

_INTRODUCTION = """# Translation sensitivity (paper, section 4.1, Figure 2; appendix B, Figure 7)

Two crops of {crop} x {crop} pixels of each image of {edge} x {edge}, which share {shared} x {crop} pixels; {batches}
mini-batches of {batch} images. *AUROC*: how often two overlapping crops are more similar than two crops of different
photographs, with the interval ({level:.0%}) from photographs drawn with replacement. Those are easy to tell; crops of
other parts of the same photograph share texture and light, and no pixel. The paper shows distributions and states no
number. *none*: equal locations; *PI*: permutation-invariant.
"""


def translation_report(result: TableResult, accuracies: Mapping[str, float]) -> str:
    """For each kernel three tables: layers in rows, matchings in columns."""
    settings = result.settings
    parts = [
        _INTRODUCTION.format(**{**settings, "shared": 2 * settings["crop"] - settings["edge"]}),
        accuracy_line(accuracies),
    ]
    apart = partial(with_interval, value="apart", low="apart_low", high="apart_high")
    for kernel in distinct(result.table, "kernel"):
        rows = result.select(kernel=kernel)
        parts += [
            f"## {kernel_title(kernel)}\n",
            "AUROC against crops of other photographs:\n",
            comparison_table(rows, partial(with_interval, value="auroc"), "gain", kernels=False),
            "AUROC against crops of other parts of the same photograph:\n",
            comparison_table(rows, apart, kernels=False),
            "How often the partner is the most similar crop:\n",
            comparison_table(rows, lambda row: shown(row["partner_first"], 2), kernels=False),
        ]
    return "\n".join(part for part in parts if part)
