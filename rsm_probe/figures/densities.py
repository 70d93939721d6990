"""Distributions of similarities, alone or against another quantity."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from rsm_probe.figures.style import labelled

_BINS = 40


def distributions(ax: Axes, kinds: Mapping[str, np.ndarray], title: str = "", meaning: str = "similarity") -> Axes:
    """Draw overlaid histograms of several kinds of pairs, each of area 1 (paper, Figure 2, right).

    Args:
        ax: Axes to draw on.
        kinds: for each name, its similarities; empty kinds are omitted.
        title: title of the panel.
        meaning: label of the values.
    """
    filled = {name: np.ravel(values) for name, values in kinds.items() if np.size(values)}
    every = np.concatenate(list(filled.values())) if filled else np.zeros(1)
    edges = np.linspace(every.min(), max(every.max(), every.min() + 1e-9), _BINS + 1)
    for name, values in filled.items():
        ax.hist(values, bins=list(edges), density=True, alpha=0.55, label=name)
    ax.set_yticks([])
    return labelled(ax, title, x=meaning)


def joint_density(
    ax: Axes, x: np.ndarray, y: np.ndarray, title: str = "", meanings: tuple[str, str] = ("", ""), line: bool = False
) -> Axes:
    """Draw the joint density of two values per pair, on a logarithmic colour scale (paper, Figure 6).

    Args:
        ax: Axes to draw on.
        x: one value per pair.
        y: another value per pair.
        title: title of the panel.
        meanings: labels of x and y.
        line: draw the diagonal.
    """
    ax.hexbin(x, y, gridsize=36, bins="log", mincnt=1, cmap="viridis", linewidths=0.1)
    if line:
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        ax.plot(ends, ends, color="grey", linestyle="--", linewidth=0.8)
    return labelled(ax, title, *meanings)


def spreads(ax: Axes, kinds: Mapping[str, np.ndarray], title: str = "", meaning: str = "") -> Axes:
    """Draw box plots of several sets of values: median, quartiles, and 5th to 95th percentile.

    Args:
        ax: Axes to draw on.
        kinds: for each name, its values.
        title: title of the panel.
        meaning: label of the values.
    """
    ax.boxplot(list(kinds.values()), whis=(5, 95), showfliers=False, widths=0.6)
    ax.set_xticks(range(1, len(kinds) + 1), list(kinds), rotation=90 if max(map(len, kinds), default=0) > 4 else 0)
    ax.grid(alpha=0.3, axis="y")
    return labelled(ax, title, y=meaning)
