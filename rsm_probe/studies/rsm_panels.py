"""Figures of RSMs side by side, with images sorted by label: RSMs kept by a sweep, and RSMs of all pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from rsm_probe.figures import names_as_written, rsm_heatmap, thinned
from rsm_probe.similarity.rsm import RSM

# Layers that fit into one figure; of more layers, an even selection is drawn.
_MOST_LAYERS = 8


@names_as_written()
def pair_panels(rsm: Callable[[str, str], RSM], layers: Sequence[str], matchings: Sequence[str], title: str) -> Figure:
    """Draw the RSMs of a model: a row per layer, a column per matching.

    Args:
        rsm: (layer, matching) -> RSM; called for one RSM at a time, because all of them may not fit into memory.
        layers: layers of the model.
        matchings: matchings to show.
        title: title of the figure.
    """
    layers = thinned(layers, _MOST_LAYERS)
    figure = Figure(figsize=(4.4 * len(matchings) + 0.6, 3.9 * len(layers) + 0.6), layout="constrained")
    axes = figure.subplots(len(layers), len(matchings), squeeze=False)
    for layer, line in zip(layers, axes, strict=True):
        for matching, ax in zip(matchings, line, strict=True):
            shown = rsm(layer, matching)
            labels = shown.dataset["label_a"].values
            order = np.argsort(labels, kind="stable")
            rsm_heatmap(ax, shown.values[np.ix_(order, order)], list(labels[order]), f"{layer}, {matching}")
            ax.tick_params(labelleft=ax in axes[:, 0], labelbottom=ax in axes[-1])
    figure.suptitle(title)
    return figure


@names_as_written()
def rsm_panels(rsms: xr.DataArray, kernel: str) -> Figure:
    """Draw the RSMs of the first mini-batch and the first model: a row per matching, a column per kept layer."""
    first = rsms.isel(batch=0)
    labels = [str(label) for label in first["image_label"].values]
    count = int(np.isfinite(first.values[0, 0]).sum())
    order = sorted(range(count), key=lambda k: labels[k])
    model = str(first["model"].values[0])
    shown = first.isel(rsm=np.flatnonzero((first["model"].values == model) & (first["kernel"].values == kernel)))
    matchings = list(dict.fromkeys(str(name) for name in shown["matching"].values))
    layers = list(dict.fromkeys(str(name) for name in shown["layer"].values))
    layers = layers[:: -(-len(layers) // _MOST_LAYERS)]
    figure = Figure(figsize=(4.4 * len(layers), 4.1 * len(matchings) + 0.4), layout="compressed")
    axes = figure.subplots(len(matchings), len(layers), squeeze=False)
    for line, matching in zip(axes, matchings, strict=True):
        for ax, layer in zip(line, layers, strict=True):
            mask = (shown["matching"].values == matching) & (shown["layer"].values == layer)
            values = shown.values[np.flatnonzero(mask)[0]][np.ix_(order, order)]
            rsm_heatmap(
                ax,
                values,
                [labels[k] for k in order],
                f"{layer}, {'spatio-semantic' if matching == 'identity' else f'semantic ({matching})'}",
            )
    figure.suptitle(f"RSMs of {model}, one mini-batch sorted by label, {kernel} kernel")
    return figure
