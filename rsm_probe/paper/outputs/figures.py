"""Figures of the divergence of outputs against the similarity of representations, and of all correlations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from rsm_probe.figures import colour_bar, joint_density, lettered, print_style, share_counts
from rsm_probe.paper.by_matching import panels_by_kernel
from rsm_probe.paper.similarity_rules import matching_title
from rsm_probe.runs.tables import TableResult, kernel_title


@dataclass(frozen=True)
class PicturedPairs:
    """The data of one model in figures.

    Attributes:
        title: title of the model.
        divergence: divergence of the outputs for all P pairs of images, (P,).
        similarities: (matching, kernel) -> similarity of the representations, (P,).
    """

    title: str
    divergence: np.ndarray
    similarities: Mapping[tuple[str, str], np.ndarray]


@print_style()
def outputs_figures(result: TableResult) -> dict[str, Figure]:
    """Draw a figure of pairs for each model, and a figure of all correlations."""
    keys = ("pearson", "pearson_low", "pearson_high")
    figures = {"correlations": panels_by_kernel(result.table, ["model"], keys, "Pearson correlation with JSD", 0.0)}
    for number, model in enumerate(result.pictured):
        figures[f"pairs-{number:02d}-{model.title}"] = _pairs(result, model)
    return figures


def _pairs(result: TableResult, model: PicturedPairs) -> Figure:
    """Draw all pairs of images, with matchings in rows and kernels in columns."""
    names, kernels = (list(dict.fromkeys(names)) for names in zip(*model.similarities, strict=True))
    figure = Figure(figsize=(1.9 * len(kernels) + 0.7, 1.9 * len(names) + 0.5), layout="constrained")
    axes = figure.subplots(len(names), len(kernels), squeeze=False, sharex="col", sharey=True)
    lettered(axes.flat)
    for line, name in zip(axes, names, strict=True):
        for ax, kernel in zip(line, kernels, strict=True):
            row = result.only(model=model.title, kernel=kernel, matching=name)
            meanings = (kernel_title(kernel) if ax in axes[-1] else "", "JSD (nats)" if ax in axes[:, 0] else "")
            title = f"{matching_title(name)}: r = {row['pearson']:.2f}"
            joint_density(ax, model.similarities[name, kernel], model.divergence, title, meanings)
    share_counts(list(axes.flat))
    for line in axes:
        colour_bar(line[-1], "pairs per hexagon")
    figure.suptitle(f"{model.title}, {result.select(model=model.title)[0]['layer']}")
    return figure
