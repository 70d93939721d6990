"""Figures of RSMs side by side, with images sorted by label: RSMs kept by a sweep, and RSMs of all pairs.

The RSMs of a layer share one colour scale, so that those of different matchings can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsm_probe.figures import lettered, print_style, rsm_heatmap, rsm_scale, thinned
from rsm_probe.similarity.rsm import RSM
from rsm_probe.studies.panels import kernel_name

# Layers that fit into one figure; of more layers, an even selection is drawn.
_MOST_LAYERS = 8
# Size of a panel in inches, as printed.
_PANEL = 2.2


@print_style()
def pair_panels(rsm: Callable[[str, str], RSM], layers: Sequence[str], matchings: Sequence[str], title: str) -> Figure:
    """Draw the RSMs of a model: a row per layer, a column per matching.

    Args:
        rsm: (layer, matching) -> RSM; called for one RSM at a time, because all of them may not fit into memory.
        layers: layers of the model.
        matchings: matchings to show.
        title: title of the figure.
    """
    layers = thinned(layers, _MOST_LAYERS)
    size = _PANEL * len(matchings) + 0.8, _PANEL * len(layers) + 0.5
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(layers), len(matchings), squeeze=False)
    lettered(axes.flat)
    for layer, line in zip(layers, axes, strict=True):
        values, labels = dict[str, np.ndarray](), list[str]()
        for matching in matchings:
            shown = rsm(layer, matching)
            order = np.argsort(shown.dataset["label_a"].values, kind="stable")
            labels = [str(label) for label in shown.dataset["label_a"].values[order]]
            values[f"{layer}, {matching}"] = shown.values[np.ix_(order, order)]
        _one_scale(line, values, labels)
    _name_axes(axes, "image")
    figure.suptitle(title)
    return figure


@print_style()
def rsm_panels(rsms: xr.DataArray, kernel: str) -> Figure:
    """Draw the RSMs of the first mini-batch and the first model: a row per kept layer, a column per matching."""
    first = rsms.isel(batch=0)
    labels = [str(label) for label in first["image_label"].values]
    count = int(np.isfinite(first.values[0, 0]).sum())
    order = sorted(range(count), key=lambda k: labels[k])
    model = str(first["model"].values[0])
    shown = first.isel(rsm=np.flatnonzero((first["model"].values == model) & (first["kernel"].values == kernel)))
    matchings = list(dict.fromkeys(str(name) for name in shown["matching"].values))
    layers = thinned(list(dict.fromkeys(str(name) for name in shown["layer"].values)), _MOST_LAYERS)
    size = _PANEL * len(matchings) + 0.8, _PANEL * len(layers) + 0.5
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(layers), len(matchings), squeeze=False)
    lettered(axes.flat)
    for layer, line in zip(layers, axes, strict=True):
        values = {}
        for matching in matchings:
            mask = (shown["matching"].values == matching) & (shown["layer"].values == layer)
            kind = "spatio-semantic" if matching == "identity" else f"semantic ({matching})"
            values[f"{layer}, {kind}"] = shown.values[np.flatnonzero(mask)[0]][np.ix_(order, order)]
        _one_scale(line, values, [labels[k] for k in order])
    _name_axes(axes, "image")
    figure.suptitle(f"RSMs of {model}, one mini-batch sorted by label, {kernel_name(kernel)}")
    return figure


def _one_scale(line: Sequence[Axes], values: Mapping[str, np.ndarray], labels: Sequence[str]) -> None:
    """Draw RSMs side by side, by their titles, with one colour scale whose bar is beside the last one."""
    norm = rsm_scale(list(values.values()))
    for ax, (title, rsm) in zip(line, values.items(), strict=True):
        rsm_heatmap(ax, rsm, labels, title, norm=norm, bar=ax is line[-1])


def _name_axes(axes: np.ndarray, what: str) -> None:
    """Name the axes at the edges of a figure whose panels have the same images."""
    for line in axes:
        for ax in line:
            ax.tick_params(labelleft=ax is line[0], labelbottom=ax in axes[-1])
        line[0].set_ylabel(what)
    for ax in axes[-1]:
        ax.set_xlabel(what)
