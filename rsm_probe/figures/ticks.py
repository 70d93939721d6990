"""Ticks for layers: thinned if not all fit, with long names shortened."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Literal, TypeVar

import numpy as np
from matplotlib.axes import Axes

from rsm_probe.figures.style import font_points

T = TypeVar("T")
# Longer names of layers are shortened, because they would take more room than their panel.
_LONGEST = 20


def thinned(layers: Sequence[T], most: int) -> list[T]:
    """Select at most `most` layers, evenly spread from first to last."""
    if len(layers) <= most:
        return list(layers)
    return [layers[k] for k in np.linspace(0, len(layers) - 1, most).astype(int)]


def layer_ticks(names: Sequence[str], ax: Axes, axis: Literal["x", "y"] = "x") -> tuple[list[int], list[str]]:
    """Return tick positions and names, thinned so that they do not overlap; first and last always have a tick."""
    box = ax.get_window_extent()
    length = (box.width if axis == "x" else box.height) / ax.figure.dpi * 72
    points = font_points("xtick.labelsize" if axis == "x" else "ytick.labelsize")
    positions = thinned(range(len(names)), max(2, int(length / (1.25 * points))))
    short, _ = short_names(names)
    return positions, [short[k] for k in positions]


def short_names(names: Sequence[str], longest: int = _LONGEST) -> tuple[list[str], str]:
    """Shorten the names of layers if one of them is long.

    What all of them begin with, in whole components, becomes an ellipsis; names that are still long lose their middle.

    Args:
        names: names of layers, such as `vision_model.encoder.layers.0`.
        longest: letters of a name that needs no shortening.

    Returns:
        The names, different where they were, and the beginning that they share; "" if they are whole.
    """
    if max(map(len, names), default=0) <= longest:
        return list(names), ""
    # Each name keeps its last component.
    components = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = "".join(f"{part[0]}." for part in takewhile(lambda part: len(set(part)) == 1, components))
    names = [f"…{name.removeprefix(shared)}" for name in names] if shared else names
    half = (longest - 1) // 2
    cut = [name if len(name) <= longest else f"{name[:half]}…{name[half + 1 - longest :]}" for name in names]
    return (cut if len(set(cut)) == len(set(names)) else list(names)), shared
