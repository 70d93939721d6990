"""The paper's Figures 15, 16 and 17: a row of panels per architecture, data sets side by side.

The panels of a figure share colour scales. They average over models that differ only in their seed, and state how many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from rsm_probe.errors import ComparisonError
from rsm_probe.figures import (
    cka_heatmap,
    diagonal_plot,
    difference_heatmap,
)
from rsm_probe.streaming.result import SweepResult
from rsm_probe.studies.panels import (
    conditions,
    lettered_panels,
    lowest_value,
    print_style,
    semantic_matchings,
    shared_bar,
)
from rsm_probe.studies.rsm_panels import rsm_panels


@dataclass(frozen=True)
class Architecture:
    """Models that differ only in their seed.

    Attributes:
        name: label of the row.
        trained: the trained models.
        control: the untrained model, if there is one.
    """

    name: str
    trained: Sequence[str]
    control: str | None = None


def sweep_figures(result: SweepResult, rows: Sequence[Architecture] | None = None) -> dict[str, Figure]:
    """Draw the figures of one sweep by name: Figures 15, 16 and 17, and the kept RSMs sorted by label.

    Without `rows`, each model has its own row: models with equal layers need not differ only in their seed. Of the
    checkpoints of a training, only the last one has a row.
    """
    rows = [Architecture(model, [model]) for model in result.models] if rows is None else rows
    # Of a training, the network that it ended with.
    earlier = {model for steps in result.networks.values() for model in list(steps.values())[:-1]}
    rows = [row for row in rows if not earlier.issuperset(row.trained)]
    kernels = list(dict.fromkeys(str(name) for name in result.cka["kernel_a"].values))
    figures: dict[str, Figure] = {}
    for kernel in kernels:
        suffix = "" if len(kernels) == 1 else f"-{kernel}"
        for semantic in semantic_matchings(result):
            kind = suffix if len(semantic_matchings(result)) == 1 else f"{suffix}-{semantic}"
            for name, draw in FIGURES.items():
                if name != "figure17" or any(len(row.trained) > 1 for row in rows):
                    figures[name + kind] = draw({"": result}, rows, kernel, semantic)
        if result.rsms is not None:
            figures[f"rsms{suffix}"] = rsm_panels(result.rsms, kernel)
    return figures


def figure15(
    results: Mapping[str, SweepResult], rows: Sequence[Architecture], kernel: str = "linear", semantic: str = "optimal"
) -> Figure:
    """Draw CKA between semantic and spatio-semantic RSMs, and the diagonal with its spread over seeds.

    Args:
        results: data set -> sweep.
        rows: architectures, the same in all sweeps.
        kernel: kernel of both RSMs.
        semantic: matching of the semantic RSMs.

    Raises:
        ComparisonError: a sweep lacks a model, a matching or the kernel, or sweeps have different numbers of images.
    """
    _require_equal_numbers(results)
    with print_style():
        title = f"Semantic against spatio-semantic RSMs, {kernel} kernel\n{conditions(results)}"
        figure, axes = lettered_panels(len(rows), len(results) + 1, title)
        grids = {
            (row.name, data): result.within(row.trained, semantic, "identity", kernel)["mean"]
            for row in rows
            for data, result in results.items()
        }
        lowest = lowest_value(grids.values())
        for line, row in zip(axes, rows, strict=True):
            for ax, data in zip(line, results, strict=False):
                cka_heatmap(ax, grids[row.name, data], data if line is axes[0] else "", lowest, bar=False)
                ax.set_xlabel("spatio-semantic RSM")
            line[0].set_ylabel(f"{row.name}\nsemantic RSM")
            for data, result in results.items():
                trained, control = _diagonals(result, row, kernel, semantic)
                diagonal_plot(line[-1], trained, "diagonal (CKA)" if line is axes[0] else "", data, control)
            line[-1].set_box_aspect(1)
            line[-1].set_ylabel("")
        shared_bar(figure, [line[:-1] for line in axes], axes[0][0], "CKA")
        labelled = {name: line for row in axes for line, name in zip(*row[-1].get_legend_handles_labels(), strict=True)}
        if len(labelled) > 1:
            figure.legend(list(labelled.values()), list(labelled), loc="outside lower center", ncols=len(labelled))
    return figure


def figure16(
    results: Mapping[str, SweepResult], rows: Sequence[Architecture], kernel: str = "linear", semantic: str = "optimal"
) -> Figure:
    """Draw CKA between layers of the same model: spatio-semantic, semantic, and the difference; see `figure15`."""
    return _three_panels(
        lambda result, row, matching: result.within(row.trained, matching, kernel=kernel),
        rows, results, semantic, f"CKA between layers of one model, {kernel} kernel", "models",
    )  # fmt: skip


def figure17(
    results: Mapping[str, SweepResult], rows: Sequence[Architecture], kernel: str = "linear", semantic: str = "optimal"
) -> Figure:
    """Draw CKA between layers of models with different seeds, averaged over all pairs of seeds; see `figure15`.

    Raises:
        ComparisonError: as `figure15`, or no architecture has several seeds.
    """
    rows = [row for row in rows if len(row.trained) > 1]
    if not rows:
        raise ComparisonError(
            "Figure 17 compares models that differ in their seed, but every architecture has only one"
        )
    return _three_panels(
        lambda result, row, matching: result.across(row.trained, matching, kernel),
        rows, results, semantic, f"CKA between layers of different seeds, {kernel} kernel", "pairs",
    )  # fmt: skip


FIGURES: dict[str, Callable[..., Figure]] = {"figure15": figure15, "figure16": figure16, "figure17": figure17}


def figure_numbers(
    results: Mapping[str, SweepResult], rows: Sequence[Architecture], kernel: str = "linear", semantic: str = "optimal"
) -> list[dict[str, str | float]]:
    """The numbers in the figures as rows of a table: the diagonal by layer, and the ranges of the differences."""
    table: list[dict[str, str | float]] = []
    for data, result in results.items():
        for row in rows:
            trained, control = _diagonals(result, row, kernel, semantic)
            for k, layer in enumerate(trained["layer"].values):
                values = {"mean": trained[:, k].mean(), "low": trained[:, k].min(), "high": trained[:, k].max()}
                values |= {} if control is None else {"untrained": control[k]}
                table += [_entry(data, row, f"diagonal {name}", str(layer), value) for name, value in values.items()]
            kinds = (semantic, "identity")
            pairs = {"within": [result.within(row.trained, m, kernel=kernel) for m in kinds]}
            if len(row.trained) > 1:
                pairs["across"] = [result.across(row.trained, m, kernel) for m in kinds]
            if row.control is not None:
                pairs["within untrained"] = [result.within([row.control], m, kernel=kernel) for m in kinds]
            for name, (matched, identity) in pairs.items():
                difference = (matched["mean"] - identity["mean"]).values
                ends = {"smallest": np.nanmin(difference), "largest": np.nanmax(difference)}
                table += [_entry(data, row, f"{end} difference {name}", "", value) for end, value in ends.items()]
    return table


def _entry(data: str, row: Architecture, what: str, layer: str, value: Any) -> dict[str, str | float]:
    return {"data": data, "architecture": row.name, "what": what, "layer": layer, "value": float(value)}


def _diagonals(
    result: SweepResult, row: Architecture, kernel: str, semantic: str
) -> tuple[xr.DataArray, xr.DataArray | None]:
    """CKA between the two RSMs of each layer: (model, layer) for trained models, (layer,) for the control."""

    def diagonal(model: str) -> np.ndarray:
        return np.diagonal(result.grid(model, model, semantic, "identity", kernel).values)

    layers = {"layer": result.layers(row.trained[0])}
    values = np.stack([diagonal(model) for model in row.trained])
    trained = xr.DataArray(values, dims=("model", "layer"), coords={"model": list(row.trained), **layers})
    return trained, None if row.control is None else xr.DataArray(diagonal(row.control), dims="layer", coords=layers)


def _three_panels(
    grid: Callable[[SweepResult, Architecture, str], xr.Dataset],
    rows: Sequence[Architecture],
    results: Mapping[str, SweepResult],
    semantic: str,
    title: str,
    counted: str,
) -> Figure:
    """Draw three panels per architecture and data set: spatio-semantic, semantic, difference."""
    _require_equal_numbers(results)
    grids = {
        (row.name, data, matching): grid(result, row, matching)
        for row in rows
        for data, result in results.items()
        for matching in ("identity", semantic)
    }
    means = {key: values["mean"] for key, values in grids.items()}
    differences = {
        (row.name, data): means[row.name, data, semantic] - means[row.name, data, "identity"]
        for row in rows
        for data in results
    }
    lowest = lowest_value(means.values())
    limit = max(float(np.nanmax(np.abs(grid.values), initial=0.0)) for grid in differences.values())
    with print_style():
        figure, axes = lettered_panels(len(rows), 3 * len(results), f"{title}\n{conditions(results)}")
        for line, row in zip(axes, rows, strict=True):
            top = line is axes[0]
            for k, data in enumerate(results):
                names = [f"{data}\n{name}".lstrip() for name in ("spatio-semantic", "semantic", "difference")]
                names = names if top else [""] * 3
                panels = line[3 * k : 3 * k + 3]
                for ax, matching, name in zip(panels, ("identity", semantic), names, strict=False):
                    cka_heatmap(ax, means[row.name, data, matching], name, lowest, bar=False)
                difference = differences[row.name, data]
                difference_heatmap(panels[2], difference, names[2], limit, bar=False)
                panels[2].set_xlabel(f"{float(difference.min()):+.3f} to {float(difference.max()):+.3f}")
                for ax in panels[1:]:
                    ax.set_yticks([])
            count = int(grids[row.name, next(iter(results)), "identity"]["pairs"].max())
            line[0].set_ylabel(row.name + (f"\nmean of {count} {counted}" if count > 1 else ""))
        shared_bar(figure, axes, axes[0][2], "difference in CKA")  # the last one is drawn next to the panels
        shared_bar(figure, axes, axes[0][0], "CKA")
    return figure


def _require_equal_numbers(results: Mapping[str, SweepResult]) -> None:
    """Reject sweeps with different numbers of images, whose CKA is not comparable."""
    counts = {
        name: (result.dataset.attrs["images"], result.dataset.attrs["batches"]) for name, result in results.items()
    }
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name}: {images} in {batches}" for name, (images, batches) in counts.items())
        raise ComparisonError(f"the sweeps of one figure need equal numbers of images and batches ({shown})")
