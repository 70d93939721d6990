"""Tables 1 and 4 of the paper, as measured, and their pairs as figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from rsm_probe.figures import common_legend, interval_plot, joint_density, names_as_written
from rsm_probe.paper.similarity_rules import SEMANTIC, title
from rsm_probe.runs.tables import TableResult, accuracy_line, escaped, kernel_title, markdown, shown, with_interval

if TYPE_CHECKING:
    from rsm_probe.paper.outputs.study import OutputsConfig

_INTRODUCTION = """# Output similarity (paper, section 4.3 and appendix E; Tables 1 and 4)

Correlation of the Jensen-Shannon divergence of two images' class probabilities with the similarity of their
representations in the last hidden layer, over all pairs of {images} images. A representation that is alike where the
classifier answers alike gives a negative value. Intervals ({level:.0%}) are from images drawn with replacement, since
pairs share images. *none*: equal locations; *PI*: permutation-invariant.
"""


def outputs_report(config: OutputsConfig, result: TableResult, accuracies: Mapping[str, float]) -> str:
    """A table for each correlation: models and kernels in rows, matchings in columns."""
    parts = [
        _INTRODUCTION.format(images=result.table[0]["images"], level=config.level),
        accuracy_line(accuracies),
    ]
    stated = False
    for name, heading in (("pearson", "Pearson correlation"), ("spearman", "Spearman's rank correlation")):
        parts += [f"## {heading}\n", _table(result, name)]
        stated |= any(not math.isnan(row[f"{name}_paper"]) for row in result.table)
        lines = [line for kernel in config.kernels if (line := _sentence(result, name, kernel))]
        parts += [*lines, ""]
    if stated:
        parts.append(
            "*paper*: what the paper states for the model of this name. The images here are those of "
            f"{escaped(config.images.source)}; which ones of ImageNet's test set the paper drew is not published."
        )
    else:
        parts.append("Models or data are not those of the paper, so that its numbers do not stand beside these.")
    return "\n".join(part for part in parts if part is not None) + "\n"


def _table(result: TableResult, name: str) -> str:
    names = list(dict.fromkeys(row["matching"] for row in result.table))
    semantic = [n for n in names if n in SEMANTIC]
    papers = [n for n in names if any(not math.isnan(row[f"{name}_paper"]) for row in result.select(matching=n))]
    lines = []
    for model, layer, locations, kernel in dict.fromkeys(
        (row["model"], row["layer"], row["locations"], row["kernel"]) for row in result.table
    ):
        found = {row["matching"]: row for row in result.select(model=model, kernel=kernel)}
        line = [model, layer, locations, kernel_title(kernel)]
        line += [with_interval(found[n], name, f"{name}_low", f"{name}_high") if n in found else "-" for n in names]
        gain = f"{name}_gain"
        line += [with_interval(found[n], gain, f"{gain}_low", f"{gain}_high") if n in found else "-" for n in semantic]
        lines.append([*line, *(shown(found[n][f"{name}_paper"]) if n in found else "-" for n in papers)])
    headings = ["model", "layer", "S", "kernel", *(title(n) for n in names)]
    headings += [f"{title(n)} - none" for n in semantic] + [f"paper, {title(n)}" for n in papers]
    return markdown(headings, lines)


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


@names_as_written()
def outputs_figures(config: OutputsConfig, result: TableResult, out: Path) -> dict[str, Figure]:
    """A figure of pairs for each model, and one of all correlations."""
    figures = {"correlations": _correlations(result)}
    names = [name for name in config.matchings if name == "identity" or name in SEMANTIC][:2]
    for number, subject in enumerate(config.subjects(out) if names else ()):
        divergence, found = config.pairs(subject, False)
        triangle = np.triu_indices(len(divergence), 1)
        figure = Figure(figsize=(2.9 * len(config.kernels), 2.8 * len(names)), layout="constrained")
        axes = figure.subplots(len(names), len(config.kernels), squeeze=False, sharex="col", sharey=True)
        for line, name in zip(axes, names, strict=True):
            for ax, kernel in zip(line, config.kernels, strict=True):
                row = result.only(model=subject.title, kernel=kernel, matching=name)
                meanings = (kernel_title(kernel) if ax in axes[-1] else "", "JSD (nats)" if ax in axes[:, 0] else "")
                about = f"{title(name)}: r = {row['pearson']:.2f}"
                joint_density(ax, found[name, kernel][triangle], divergence[triangle], about, meanings)
        figure.suptitle(f"{subject.title}, {row['layer']}")
        figures[f"pairs-{number:02d}-{subject.title}"] = figure
    return figures


def _correlations(result: TableResult) -> Figure:
    kernels = list(dict.fromkeys(row["kernel"] for row in result.table))
    models = list(dict.fromkeys(row["model"] for row in result.table))
    names = list(dict.fromkeys(row["matching"] for row in result.table))
    figure = Figure(figsize=(3.4 * len(kernels), 3.6), layout="constrained")
    for ax, kernel in zip(figure.subplots(1, len(kernels), sharey=True, squeeze=False)[0], kernels, strict=True):
        lines = {
            title(name): [
                (row["pearson"], row["pearson_low"], row["pearson_high"])
                if (row := next(iter(result.select(model=model, kernel=kernel, matching=name)), None))
                else (np.nan, np.nan, np.nan)
                for model in models
            ]
            for name in names
        }
        interval_plot(ax, models, lines, kernel_title(kernel), "Pearson correlation with JSD", 0.0)
        for line in ax.lines[: 3 * len(lines)]:
            line.set_linestyle("none")
    common_legend(figure)
    return figure
