"""Tables 1 and 4 of the paper, from our measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from rsm_probe.paper.by_matching import comparison_table, paper_note
from rsm_probe.paper.semantic_differences import semantic_differences
from rsm_probe.runs.tables import TableResult, accuracy_line, escaped, kernel_title, with_interval

_INTRODUCTION = """# Output similarity (paper, section 4.3 and appendix E; Tables 1 and 4)

Correlation between the Jensen-Shannon divergence of the class probabilities of two images and the similarity of their
representations in the last hidden layer, over all pairs of {images} images. It is negative if similar representations
go with similar outputs. Intervals ({level:.0%}) come from drawing images with replacement, because pairs share images.
*none*: equal locations; *PI*: permutation-invariant.
"""


def outputs_report(result: TableResult, accuracies: Mapping[str, float]) -> str:
    """Write one table per correlation, with models and kernels in rows and matchings in columns."""
    settings, rows = result.settings, result.table
    parts = [_INTRODUCTION.format(images=rows[0]["images"], level=settings["level"]), accuracy_line(accuracies)]
    for name, heading in (("pearson", "Pearson correlation"), ("spearman", "Spearman's rank correlation")):
        cell = partial(with_interval, value=name, low=f"{name}_low", high=f"{name}_high")
        table = comparison_table(rows, cell, f"{name}_gain", f"{name}_paper")
        sentences = [sentence for kernel in settings["kernels"] if (sentence := _sentence(result, name, kernel))]
        parts += [f"## {heading}\n", table, *sentences, ""]
    measures = {f"{name}_difference": (f"Correlation with JSD ({name})", True) for name in ("pearson", "spearman")}
    parts.append(semantic_differences(rows, measures, settings))
    stated = any(not math.isnan(row[f"{name}_paper"]) for row in rows for name in ("pearson", "spearman"))
    meaning = (
        "the paper's value for the model of this name. The images here come from "
        f"{escaped(settings['images']['source'])}; which images of ImageNet's test set the paper used is not published."
    )
    return "\n".join([*parts, paper_note(stated, meaning)]) + "\n"


def _sentence(result: TableResult, name: str, kernel: str) -> str:
    """Summarise for which models permutation invariance helps; "" without rows."""
    cells = [
        r for r in result.select(kernel=kernel, matching="optimal") if not math.isnan(r.get(f"{name}_gain", math.nan))
    ]
    if not cells:
        return ""
    groups: dict[str, list[str]] = {"more negative": [], "less negative": [], "inconclusive": []}
    for row in cells:
        low, high = row[f"{name}_gain_low"], row[f"{name}_gain_high"]
        kind = "more negative" if high < 0 else "less negative" if low > 0 else "inconclusive"
        groups[kind].append(row["model"])
    listed = "; ".join(f"{kind}: {', '.join(map(escaped, models))}" for kind, models in groups.items() if models)
    return f"- {kernel_title(kernel)}, PI against none: {listed}."
