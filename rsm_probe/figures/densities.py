"""Distributions of similarities, alone or against another quantity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from rsm_probe.figures.style import COLOURS, labelled

_BINS = 40
# Hexagons along the x-axis of a joint density.
_HEXAGONS = 36
# Patterns of histograms, to tell them apart in grey print.
_HATCHES = ("", "////", "....", "\\\\\\\\")


def distributions(ax: Axes, kinds: Mapping[str, np.ndarray], title: str = "", meaning: str = "similarity") -> Axes:
    """Draw overlaid histograms of several kinds of pairs, each of area 1 (paper, Figure 2, right).

    Args:
        ax: Axes to draw on.
        kinds: for each name, its similarities, (P,); empty kinds are omitted.
        title: title of the panel.
        meaning: label of the values.
    """
    filled = {name: np.ravel(values) for name, values in kinds.items() if np.size(values)}
    every = np.concatenate(list(filled.values())) if filled else np.zeros(1)
    edges = np.linspace(every.min(), max(every.max(), every.min() + 1e-9), _BINS + 1)
    for number, name in enumerate(kinds):
        if name not in filled:
            continue
        colour, hatch = COLOURS[number % len(COLOURS)], _HATCHES[number % len(_HATCHES)]
        # The outline is drawn once more, above the areas of all kinds.
        ax.hist(
            filled[name], list(edges), density=True, alpha=0.5, color=colour, hatch=hatch, ec=colour, lw=0, label=name
        )
        ax.hist(filled[name], list(edges), density=True, histtype="step", color=colour, lw=0.7)
    ax.yaxis.set_major_locator(MaxNLocator(3))
    return labelled(ax, title, x=meaning, y="density")


def joint_density(
    ax: Axes,
    x: np.ndarray,
    y: np.ndarray,
    title: str = "",
    meanings: tuple[str, str] = ("", ""),
    line: bool = False,
) -> Axes:
    """Draw the joint density of two values per pair, on a logarithmic colour scale (paper, Figure 6).

    Args:
        ax: Axes to draw on.
        x: one value per pair, (P,).
        y: another value per pair, (P,).
        title: title of the panel.
        meanings: labels of x and y.
        line: draw the diagonal, with equal limits of both axes.
    """
    ends = min(x.min(), y.min()), max(x.max(), y.max())
    extent = None
    if line:
        # Without limits, the hexagons of a narrow cloud are too small to be seen on the axes of the diagonal.
        extent = (*ends, *ends) if ends[0] < ends[1] else None
        ax.plot(ends, ends, color="grey", linestyle="--", linewidth=0.8, zorder=0)
        ax.set_box_aspect(1)
    ax.hexbin(x, y, gridsize=_HEXAGONS, bins="log", mincnt=1, cmap="viridis", linewidths=0.1, extent=extent)
    return labelled(ax, title, *meanings)


def share_counts(panels: Sequence[Axes]) -> None:
    """Give the joint densities of several panels one colour scale, from one pair to the largest count."""
    drawn = [ax.collections[-1] for ax in panels]
    largest = max(float(np.asarray(density.get_array()).max(initial=1.0)) for density in drawn)
    norm = LogNorm(1.0, max(2.0, largest))
    for density in drawn:
        density.set_norm(norm)


def spreads(ax: Axes, kinds: Mapping[str, np.ndarray], title: str = "", meaning: str = "") -> Axes:
    """Draw box plots of several sets of values: median, quartiles, and 5th to 95th percentile.

    Args:
        ax: Axes to draw on.
        kinds: for each name, its values, (n,); names may have different numbers of them.
        title: title of the panel.
        meaning: label of the values.
    """
    median = {"color": COLOURS[1], "linewidth": 1.2}
    ax.boxplot(list(kinds.values()), whis=(5, 95), showfliers=False, widths=0.6, medianprops=median)
    ax.set_xticks(range(1, len(kinds) + 1), list(kinds), rotation=90 if max(map(len, kinds), default=0) > 4 else 0)
    ax.grid(alpha=0.3, axis="y")
    return labelled(ax, title, y=meaning)
