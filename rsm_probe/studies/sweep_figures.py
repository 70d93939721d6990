"""The figures of a sweep, put together from panels: averages over seeds, shared scales, titles."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations_with_replacement

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from rsm_probe.figures import cka_heatmap, diagonal_plot, difference_heatmap, rsm_heatmap
from rsm_probe.studies.result import SweepResult


def sweep_figures(result: SweepResult) -> dict[str, Figure]:
    """The figures of a sweep by file name: paper's Figures 15, 16 and 17, and the kept RSMs sorted by label."""
    kernels = list(dict.fromkeys(str(name) for name in result.cka["kernel_a"].values))
    figures: dict[str, Figure] = {}
    for kernel in kernels:
        suffix = "" if len(kernels) == 1 else f"-{kernel}"
        within = {
            model: {m: result.grid(model, matching_a=m, kernel=kernel) for m in _matchings(result)}
            for model in result.models
        }
        figures[f"figure16-within-models{suffix}"] = _grid_rows(
            within, f"CKA between layers of one model, {kernel} kernel"
        )
        across = _across(result, kernel)
        if across:
            title = f"CKA between layers of different models, {kernel} kernel"
            figures[f"figure17-across-models{suffix}"] = _grid_rows(across, title)
        if {"identity"} < set(_matchings(result)):
            figures[f"figure15-semantic-against-spatio-semantic{suffix}"] = _against(result, kernel)
        if result.rsms is not None:
            figures[f"rsms{suffix}"] = _rsm_panels(result.rsms, kernel)
    return figures


def _matchings(result: SweepResult) -> list[str]:
    return list(dict.fromkeys(str(name) for name in result.cka["matching_a"].values))


def _kind(matching: str) -> str:
    return "spatio-semantic" if matching == "identity" else f"semantic ({matching})"


def _groups(result: SweepResult) -> dict[str, list[str]]:
    """Models with the same layers, such as seeds of one architecture, by the name of the first."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for model in result.models:
        groups.setdefault(tuple(result.layers(model)), []).append(model)
    return {_group_name(members): members for members in groups.values()}


def _group_name(members: list[str]) -> str:
    return members[0] if len(members) == 1 else f"{members[0]} ... {members[-1]}"


def _across(result: SweepResult, kernel: str) -> dict[str, dict[str, xr.DataArray]]:
    """Grids between different models, averaged over all pairs of two groups."""
    rows: dict[str, dict[str, xr.DataArray]] = {}
    for (first, some), (second, others) in combinations_with_replacement(_groups(result).items(), 2):
        pairs = [(a, b) for a in some for b in others if a != b]
        if not pairs:
            continue
        count = len(pairs) // 2 if first == second else len(pairs)
        title = f"{first} x {second}" if first != second else first
        title += f"\nmean of {count} pairs" if count > 1 else ""
        rows[title] = {
            matching: _mean([result.grid(a, b, matching, kernel=kernel) for a, b in pairs])
            for matching in _matchings(result)
        }
    return rows


def _mean(grids: list[xr.DataArray]) -> xr.DataArray:
    return grids[0].copy(data=np.mean([grid.values for grid in grids], axis=0))


def _grid_rows(rows: Mapping[str, Mapping[str, xr.DataArray]], title: str) -> Figure:
    """A row of panels per entry: one a matching, then each difference from the identity; scales are shared."""
    matchings = list(next(iter(rows.values())))
    compared = [m for m in matchings if m != "identity"] if "identity" in matchings else []
    differences = {name: {m: grids[m] - grids["identity"] for m in compared} for name, grids in rows.items()}
    lowest = min(0.0, *(float(np.nanmin(g.values, initial=0.0)) for grids in rows.values() for g in grids.values()))
    limit = max(
        (float(np.nanmax(np.abs(d.values), initial=0.0)) for ds in differences.values() for d in ds.values()),
        default=0,
    )
    columns = len(matchings) + len(compared)
    figure = Figure(figsize=(4.4 * columns, 3.8 * len(rows) + 0.4), layout="compressed")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, grids) in zip(axes, rows.items(), strict=True):
        for ax, matching in zip(line, matchings, strict=False):
            cka_heatmap(ax, grids[matching], _kind(matching), lowest)
        for ax, matching in zip(line[len(matchings) :], compared, strict=True):
            difference_heatmap(ax, differences[name][matching], f"{_kind(matching)} - spatio-semantic", limit)
        line[0].set_ylabel(name, fontweight="bold")
    figure.suptitle(title)
    return figure


def _against(result: SweepResult, kernel: str) -> Figure:
    """Semantic against spatio-semantic RSMs of the same representations, and the diagonal, per group of models."""
    groups = _groups(result)
    compared = [m for m in _matchings(result) if m != "identity"]
    figure = Figure(figsize=(10.0, 4.4 * len(groups) * len(compared) + 0.4), layout="compressed")
    axes = iter(figure.subplots(len(groups) * len(compared), 2, squeeze=False))
    for name, members in groups.items():
        for matching in compared:
            grids = [result.grid(m, m, matching, "identity", kernel) for m in members]
            left, right = next(axes)
            averaged = f"mean of {len(members)} models" if len(members) > 1 else members[0]
            cka_heatmap(left, _mean(grids), averaged)
            left.set_xlabel("spatio-semantic RSM of layer")
            left.set_ylabel(f"{_kind(matching)} RSM of layer")
            diagonals = xr.DataArray(
                [np.diagonal(grid.values) for grid in grids],
                dims=("model", "layer"),
                coords={"model": members, "layer": result.layers(members[0])},
            )
            diagonal_plot(right, diagonals, name)
    figure.suptitle(f"Semantic against spatio-semantic RSMs of the same representations, {kernel} kernel")
    return figure


def _rsm_panels(rsms: xr.DataArray, kernel: str) -> Figure:
    """The RSMs of the first mini-batch and the first model: a row per matching, a column per kept layer."""
    first = rsms.isel(batch=0)
    labels = [str(label) for label in first["image_label"].values]
    count = sum(str(name) != "" for name in first["image_id"].values)
    order = sorted(range(count), key=lambda k: labels[k])
    model = str(first["model"].values[0])
    chosen = first.isel(rsm=np.flatnonzero((first["model"].values == model) & (first["kernel"].values == kernel)))
    matchings = list(dict.fromkeys(str(name) for name in chosen["matching"].values))
    layers = list(dict.fromkeys(str(name) for name in chosen["layer"].values))
    figure = Figure(figsize=(4.4 * len(layers), 4.1 * len(matchings) + 0.4), layout="compressed")
    axes = figure.subplots(len(matchings), len(layers), squeeze=False)
    for line, matching in zip(axes, matchings, strict=True):
        for ax, layer in zip(line, layers, strict=True):
            mask = (chosen["matching"].values == matching) & (chosen["layer"].values == layer)
            values = chosen.values[np.flatnonzero(mask)[0]][np.ix_(order, order)]
            rsm_heatmap(ax, values, [labels[k] for k in order], f"{layer}, {_kind(matching)}")
    figure.suptitle(f"RSMs of {model}, one mini-batch sorted by label, {kernel} kernel")
    return figure
