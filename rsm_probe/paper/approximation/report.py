"""Table 5 of the paper, from our measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rsm_probe.paper.by_matching import distinct, paper_note
from rsm_probe.runs.tables import TableResult, accuracy_line, escaped, markdown, shown, with_interval

_INTRODUCTION = """# Approximation quality (paper, section 4.4 and appendix F; Figures 5 and 6, Table 5)

Random pairs of images, representations {centred}. *share*: the matched product as a share of the optimum, as a ratio
of sums over pairs, with its {level:.0%} interval over pairs; *5 % to 95 %*: quantiles of the share over pairs. *ms*:
the median time per pair on one core, from the affinity to the matching. Methods that do not read the affinity compute
what they need within that time, and methods that are not symmetric run in both directions. Exact solvers of other
libraries are timed on the first {solver_pairs} pairs.
"""


def approximation_report(result: TableResult, accuracies: Mapping[str, float]) -> str:
    """Write one table per model, with a row per layer and method."""
    settings = result.settings
    centred = "not centred" if settings["centering"] is None else "centred by the mean of each channel"
    parts = [
        _INTRODUCTION.format(centred=centred, level=settings["level"], solver_pairs=settings["solver_pairs"]),
        accuracy_line(accuracies),
    ]
    stated = any(not math.isnan(row["paper_share"]) for row in result.table)
    for model in distinct(result.table, "model"):
        lines = []
        for row in result.select(model=model):
            share = with_interval(row, "share", digits=4)
            line = [
                row["layer"],
                row["locations"],
                row["method"],
                share,
                "-" if math.isnan(row["share_5"]) else f"{row['share_5']:.3f} to {row['share_95']:.3f}",
            ]
            line += [f"{row['milliseconds']:.3g}", row["pairs"]]
            paper = [shown(row["paper_share"]), "-" if math.isnan(ms := row["paper_milliseconds"]) else f"{ms:.3g}"]
            lines.append(line + (paper if stated else []))
        headings = ["layer", "S", "matching", "share", "5 % to 95 %", "ms", "pairs"]
        parts += [
            f"## {escaped(model)}\n",
            markdown(headings + (["paper, share", "paper, ms"] if stated else []), lines),
        ]
    meaning = (
        "Table 5: ratio and time as means over pairs, for layers of a ResNet-101 with as many locations, on another "
        "processor."
    )
    return "\n".join(part for part in [*parts, paper_note(stated, meaning)] if part) + "\n"
