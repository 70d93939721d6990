"""Tables 1 and 4 of the paper, as measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from rsm_probe.paper.by_matching import comparison_table, paper_note
from rsm_probe.runs.tables import TableResult, accuracy_line, escaped, kernel_title, with_interval

_INTRODUCTION = """# Output similarity (paper, section 4.3 and appendix E; Tables 1 and 4)

Correlation of the Jensen-Shannon divergence of two images' class probabilities with the similarity of their
representations in the last hidden layer, over all pairs of {images} images. A representation that is alike where the
classifier answers alike gives a negative value. Intervals ({level:.0%}) are from images drawn with replacement, since
pairs share images. *none*: equal locations; *PI*: permutation-invariant.
"""


def outputs_report(result: TableResult, accuracies: Mapping[str, float]) -> str:
    """A table for each correlation: models and kernels in rows, matchings in columns."""
    settings, rows = result.settings, result.table
    parts = [_INTRODUCTION.format(images=rows[0]["images"], level=settings["level"]), accuracy_line(accuracies)]
    for name, heading in (("pearson", "Pearson correlation"), ("spearman", "Spearman's rank correlation")):
        cell = partial(with_interval, value=name, low=f"{name}_low", high=f"{name}_high")
        table = comparison_table(rows, cell, f"{name}_gain", f"{name}_paper")
        sentences = [sentence for kernel in settings["kernels"] if (sentence := _sentence(result, name, kernel))]
        parts += [f"## {heading}\n", table, *sentences, ""]
    stated = any(not math.isnan(row[f"{name}_paper"]) for row in rows for name in ("pearson", "spearman"))
    meaning = (
        "what the paper states for the model of this name. The images here are those of "
        f"{escaped(settings['images']['source'])}; which ones of ImageNet's test set the paper drew is not published."
    )
    return "\n".join([*parts, paper_note(stated, meaning)]) + "\n"


def _sentence(result: TableResult, name: str, kernel: str) -> str:
    """Where permutation invariance helps, and where it does not."""
    cells = [
        r for r in result.select(kernel=kernel, matching="optimal") if not math.isnan(r.get(f"{name}_gain", math.nan))
    ]
    if not cells:
        return ""
    groups: dict[str, list[str]] = {"more negative": [], "less negative": [], "not told apart": []}
    for row in cells:
        low, high = row[f"{name}_gain_low"], row[f"{name}_gain_high"]
        kind = "more negative" if high < 0 else "less negative" if low > 0 else "not told apart"
        groups[kind].append(row["model"])
    listed = "; ".join(f"{kind}: {', '.join(map(escaped, models))}" for kind, models in groups.items() if models)
    return f"- {kernel_title(kernel)}, PI against none: {listed}."
