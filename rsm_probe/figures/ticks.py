"""Ticks for layers, thinned if not all fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties

T = TypeVar("T")


def thinned(layers: Sequence[T], most: int) -> list[T]:
    """Select at most `most` layers, evenly spread from first to last."""
    if len(layers) <= most:
        return list(layers)
    return [layers[k] for k in np.linspace(0, len(layers) - 1, most).astype(int)]


def layer_ticks(names: Sequence[str], ax: Axes) -> tuple[list[int], list[str]]:
    """Return tick positions and names, thinned so that they do not overlap."""
    width = ax.get_window_extent().width / ax.figure.dpi * 72
    points = FontProperties(size=rcParams["xtick.labelsize"]).get_size_in_points()
    step = -(-len(names) // max(2, int(width / (1.25 * points))))
    return list(range(0, len(names), step)), list(names[::step])
