"""The RSMs that a sweep kept, as a figure."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from rsm_probe.figures import names_as_written, rsm_heatmap

# More RSMs than this do not fit side by side; some are then passed over, evenly.
_MOST_LAYERS = 8


@names_as_written()
def rsm_panels(rsms: xr.DataArray, kernel: str) -> Figure:
    """The RSMs of the first mini-batch and the first model: a row per matching, a column per kept layer."""
    first = rsms.isel(batch=0)
    labels = [str(label) for label in first["image_label"].values]
    count = int(np.isfinite(first.values[0, 0]).sum())
    order = sorted(range(count), key=lambda k: labels[k])
    model = str(first["model"].values[0])
    chosen = first.isel(rsm=np.flatnonzero((first["model"].values == model) & (first["kernel"].values == kernel)))
    matchings = list(dict.fromkeys(str(name) for name in chosen["matching"].values))
    layers = list(dict.fromkeys(str(name) for name in chosen["layer"].values))
    layers = layers[:: -(-len(layers) // _MOST_LAYERS)]
    figure = Figure(figsize=(4.4 * len(layers), 4.1 * len(matchings) + 0.4), layout="compressed")
    axes = figure.subplots(len(matchings), len(layers), squeeze=False)
    for line, matching in zip(axes, matchings, strict=True):
        for ax, layer in zip(line, layers, strict=True):
            mask = (chosen["matching"].values == matching) & (chosen["layer"].values == layer)
            values = chosen.values[np.flatnonzero(mask)[0]][np.ix_(order, order)]
            rsm_heatmap(
                ax,
                values,
                [labels[k] for k in order],
                f"{layer}, {'spatio-semantic' if matching == 'identity' else f'semantic ({matching})'}",
            )
    figure.suptitle(f"RSMs of {model}, one mini-batch sorted by label, {kernel} kernel")
    return figure
