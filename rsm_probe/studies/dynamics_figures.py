"""Figures of training: CKA to the final network by layer and step, and between all steps for a few layers.

The panels of a figure share colour scales. They average over networks that differ only in their seed, and name the
seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from rsm_probe.comparison.statistics import over_models
from rsm_probe.errors import ComparisonError
from rsm_probe.figures import cka_heatmap, colour_bar, difference_heatmap, print_style, symmetric, thinned
from rsm_probe.streaming.result import SweepResult
from rsm_probe.studies.panels import (
    averaged,
    conditions,
    extremes,
    kernel_name,
    lettered_panels,
    lowest_value,
    omitted_beginning,
    row_label,
    semantic_matchings,
)
from rsm_probe.studies.sweep_figures import Architecture

# Layers whose steps are compared with each other: the first, the middle and the last.
_LAYERS = 3


def dynamics_figures(result: SweepResult, rows: Sequence[Architecture] | None = None) -> dict[str, Figure]:
    """Draw how the layers of networks change over training: `dynamics-final` and `dynamics-steps`.

    Args:
        result: a sweep over checkpoints; without any, nothing is drawn.
        rows: networks that differ only in their seed, by their final models; by default, each network has its own row.

    Raises:
        ComparisonError: networks of a row have different steps or layers.
    """
    networks = _networks_by_row(result, rows)
    figures: dict[str, Figure] = {}
    if not networks:
        return figures
    kernels, matchings = (
        list(dict.fromkeys(str(name) for name in result.cka[f"{key}_a"].values)) for key in ("kernel", "matching")
    )
    semantic = semantic_matchings(result)
    pairs = [["identity", matching] for matching in semantic] or [[matching] for matching in matchings]
    for kernel in kernels:
        for pair in pairs:
            kind = ("" if len(kernels) == 1 else f"-{kernel}") + ("" if len(pairs) == 1 else f"-{pair[-1]}")
            figures[f"dynamics-final{kind}"] = final_figure(result, networks, pair, kernel)
            figures[f"dynamics-steps{kind}"] = steps_figure(result, networks, pair, kernel)
    return figures


def final_figure(
    result: SweepResult, networks: Mapping[str, Sequence[str]], matchings: Sequence[str], kernel: str = "linear"
) -> Figure:
    """Draw CKA between each layer during training and the same layer of the final network.

    Args:
        result: a sweep over checkpoints.
        networks: label of a row -> the networks that it averages over.
        matchings: one matching, or "identity" and a second one, whose difference is drawn as well.
        kernel: kernel of all RSMs.

    Raises:
        ComparisonError: networks of a row have different steps or layers.
    """
    grids = {
        label: [
            _mean(result, names, matching, kernel).isel(step_b=-1).rename(step_a="step").transpose("layer", "step")
            for matching in matchings
        ]
        for label, names in networks.items()
    }
    title = f"CKA to the final network, {kernel_name(kernel)}"
    labels = {
        label: row_label(averaged(label, names), omitted_beginning(_layers(grids[label][0])), "layer")
        for label, names in networks.items()
    }
    return _drawn(result, title, grids, matchings, labels)


def steps_figure(
    result: SweepResult, networks: Mapping[str, Sequence[str]], matchings: Sequence[str], kernel: str = "linear"
) -> Figure:
    """Draw CKA between all steps of the same network for its first, middle and last layer; see `final_figure`."""
    grids: dict[str, list[xr.DataArray]] = {}
    labels: dict[str, str] = {}
    title = f"CKA between training steps, {kernel_name(kernel)}"
    if len(networks) == 1:
        title += ", " + "".join(averaged(*network).replace("\n", ", ") for network in networks.items())
    for label, names in networks.items():
        means = [_mean(result, names, matching, kernel) for matching in matchings]
        for layer in thinned(_layers(means[0]), _LAYERS):
            grids[f"{label} {layer}"] = [mean.sel(layer=layer) for mean in means]
            whose = "" if len(networks) == 1 else averaged(label, names)
            labels[f"{label} {layer}"] = row_label(whose, layer, "training step")
    return _drawn(result, title, grids, matchings, labels)


def _networks_by_row(result: SweepResult, rows: Sequence[Architecture] | None) -> dict[str, list[str]]:
    """Label of a row -> its networks, of those that have several steps."""
    steps = {network: models for network, models in result.networks.items() if len(models) > 1}
    network_of = {model: network for network, models in steps.items() for model in models.values()}
    if rows is None:
        return {network: [network] for network in steps}
    by_row: dict[str, list[str]] = {}
    for row in rows:
        names = list(dict.fromkeys(network_of[model] for model in row.trained if model in network_of))
        if names:
            by_row[row.name if len(names) > 1 else names[0]] = names
    return by_row


def _mean(result: SweepResult, networks: Sequence[str], matching: str, kernel: str) -> xr.DataArray:
    """The mean of `SweepResult.over_training` over networks."""
    grids = [result.over_training(network, matching, kernel=kernel) for network in networks]
    for network, grid in zip(networks, grids, strict=True):
        if not np.array_equal(grid["step_a"].values, grids[0]["step_a"].values):
            raise ComparisonError(
                f"networks {networks[0]!r} and {network!r} have different steps, and cannot be averaged; give each a "
                f"row of its own"
            )
    return over_models(grids)["mean"]


def _layers(grid: xr.DataArray) -> list[str]:
    return [str(name) for name in grid["layer"].values]


def _drawn(
    result: SweepResult,
    title: str,
    grids: Mapping[str, Sequence[xr.DataArray]],
    matchings: Sequence[str],
    labels: Mapping[str, str],
) -> Figure:
    """Draw a row of panels per entry: a heatmap per matching, and the difference of two."""
    differences = {key: pair[1] - pair[0] for key, pair in grids.items() if len(pair) == 2}
    norm = Normalize(lowest_value(grid for pair in grids.values() for grid in pair), 1.0)
    around_zero = symmetric(list(differences.values()))
    names = ["spatio-semantic" if matching == "identity" else "semantic" for matching in matchings]
    with print_style():
        figure, axes = lettered_panels(
            len(grids), len(matchings) + bool(differences), f"{title}\n{conditions({'': result})}"
        )
        for line, (key, pair) in zip(axes, grids.items(), strict=True):
            top = line is axes[0]
            for ax, grid, name in zip(line, pair, names, strict=False):
                cka_heatmap(ax, grid, name if top else "", bar=False, norm=norm)
            colour_bar(line[len(pair) - 1], "CKA")
            if differences:
                heading = f"{'difference' if top else ''}\n{extremes(differences[key])}".lstrip()
                difference_heatmap(line[-1], differences[key], heading, bar=False, norm=around_zero)
                colour_bar(line[-1], "difference in CKA")
            for ax in line:
                ax.set_xlabel("training step" if line is axes[-1] else "")
                if ax is not line[0]:
                    ax.set_yticks([])
            line[0].set_ylabel(labels[key])
    return figure
