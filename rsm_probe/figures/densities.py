"""How similarities are distributed, alone and against another quantity."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

_BINS = 40


def distributions(ax: Axes, kinds: Mapping[str, np.ndarray], title: str = "", meaning: str = "similarity") -> Axes:
    """Histograms of several kinds of pairs over each other, each of area 1 (paper, Figure 2, right).

    Args:
        ax: where to draw.
        kinds: name -> similarities; empty ones are left out.
        title: above the panel.
        meaning: of the values.
    """
    known = {name: np.ravel(values) for name, values in kinds.items() if np.size(values)}
    together = np.concatenate(list(known.values())) if known else np.zeros(1)
    edges = np.linspace(together.min(), max(together.max(), together.min() + 1e-9), _BINS + 1)
    for name, values in known.items():
        ax.hist(values, bins=list(edges), density=True, alpha=0.55, label=name)
    ax.set_yticks([])
    ax.set_xlabel(meaning)
    ax.set_title(title)
    return ax


def joint_density(
    ax: Axes, x: np.ndarray, y: np.ndarray, title: str = "", meanings: tuple[str, str] = ("", ""), line: bool = False
) -> Axes:
    """How many pairs have which two values, on a logarithmic scale of colours (paper, Figure 6).

    Args:
        ax: where to draw.
        x: one value for each pair.
        y: the other.
        title: above the panel.
        meanings: of x and of y.
        line: draw where the two are equal.
    """
    ax.hexbin(x, y, gridsize=36, bins="log", mincnt=1, cmap="viridis", linewidths=0.1)
    if line:
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        ax.plot(ends, ends, color="grey", linestyle="--", linewidth=0.8)
    ax.set_xlabel(meanings[0])
    ax.set_ylabel(meanings[1])
    ax.set_title(title)
    return ax


def spreads(ax: Axes, kinds: Mapping[str, np.ndarray], title: str = "", meaning: str = "") -> Axes:
    """The middle half, the middle nine tenths and the median of several sets of values, side by side.

    Args:
        ax: where to draw.
        kinds: name -> values.
        title: above the panel.
        meaning: of the values.
    """
    ax.boxplot(list(kinds.values()), whis=(5, 95), showfliers=False, widths=0.6)
    ax.set_xticks(range(1, len(kinds) + 1), list(kinds), rotation=90 if max(map(len, kinds), default=0) > 4 else 0)
    ax.set_ylabel(meaning)
    ax.grid(alpha=0.3, axis="y")
    ax.set_title(title)
    return ax
