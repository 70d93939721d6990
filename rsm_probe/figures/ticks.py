"""Ticks for layers: thinned if not all fit, with long names shortened."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import TypeVar

import numpy as np
from matplotlib.axis import XAxis, YAxis
from matplotlib.ticker import FuncFormatter, Locator

from rsm_probe.figures.style import font_points

T = TypeVar("T")
# Longer names of layers are shortened, because they would take more room than their panel.
_LONGEST = 20


def thinned(layers: Sequence[T], most: int) -> list[T]:
    """Select at most `most` layers, evenly spread from first to last."""
    if len(layers) <= most:
        return list(layers)
    return [layers[k] for k in np.linspace(0, len(layers) - 1, most).astype(int)]


def name_layers(axis: XAxis | YAxis, names: Sequence[str], rotation: float = 0) -> None:
    """Name layers along an axis, at 0, 1, ...: as many as fit when the figure is drawn, always the first and the last.

    Args:
        axis: an axis of a panel.
        names: names of the layers; long ones are shortened, see `short_names`.
        rotation: of the names, in degrees.
    """
    short, _ = short_names(names)
    size = font_points("xtick.labelsize" if axis.axis_name == "x" else "ytick.labelsize")
    axis.set_major_locator(LayerLocator(axis, len(names), 1.25 * size))
    axis.set_major_formatter(FuncFormatter(lambda position, _: short[round(position)]))
    axis.set_tick_params(labelsize=size, labelrotation=rotation)


class LayerLocator(Locator):
    """Ticks at layers, as many as fit on the axis, always at the first and the last.

    Args:
        axis: an axis of a panel.
        count: number of layers, at 0, 1, ....
        points: room for a tick in points.
    """

    def __init__(self, axis: XAxis | YAxis, count: int, points: float) -> None:
        self._of, self._count, self._points = axis, count, points

    def __call__(self) -> list[int]:
        """The positions of the ticks, with the size that the axis has now."""
        panel = self._of.axes.bbox
        length = panel.width if self._of.axis_name == "x" else panel.height
        fitting = max(2, int(length / self._of.axes.figure.dpi * 72 / self._points))
        last = self._count - 1
        # Equal distances, and no tick so near to the last that their names would overlap.
        step = max(1, math.ceil(last / (fitting - 1)))
        return [*range(0, last - step + 1, step), last]

    def tick_values(self, vmin: float, vmax: float) -> list[int]:
        """The same, whatever the limits of the axis."""
        return self()


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
