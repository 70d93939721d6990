"""The paper's Figures 15, 16 and 17: a row of panels per architecture, data sets or kernels side by side.

The panels of a figure share colour scales. They average over models that differ only in their seed, and name the seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from rsm_probe.errors import ComparisonError
from rsm_probe.figures import (
    cka_heatmap,
    colour_bar,
    diagonal_plot,
    difference_heatmap,
    print_style,
    symmetric,
)
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
    checkpoints of a training, only the last one has a row. Kernels are side by side.
    """
    rows = [Architecture(model, [model]) for model in result.models] if rows is None else rows
    # Of a training, the network that it ended with.
    earlier = {model for steps in result.networks.values() for model in list(steps.values())[:-1]}
    rows = [row for row in rows if not earlier.issuperset(row.trained)]
    kernels = list(dict.fromkeys(str(name) for name in result.cka["kernel_a"].values))
    figures: dict[str, Figure] = {}
    for semantic in semantic_matchings(result):
        kind = "" if len(semantic_matchings(result)) == 1 else f"-{semantic}"
        for name, draw in FIGURES.items():
            if name != "figure17" or any(len(row.trained) > 1 for row in rows):
                figures[name + kind] = draw({"": result}, rows, kernels, semantic)
    if result.rsms is not None:
        for kernel in kernels:
            figures["rsms" if len(kernels) == 1 else f"rsms-{kernel}"] = rsm_panels(result.rsms, kernel)
    return figures


def figure15(
    results: Mapping[str, SweepResult],
    rows: Sequence[Architecture],
    kernel: str | Sequence[str] = "linear",
    semantic: str = "optimal",
) -> Figure:
    """Draw CKA between semantic and spatio-semantic RSMs, and the diagonal with its spread over seeds.

    Args:
        results: data set -> sweep.
        rows: architectures, the same in all sweeps.
        kernel: kernel of both RSMs; several are drawn side by side.
        semantic: matching of the semantic RSMs.

    Raises:
        ComparisonError: a sweep lacks a model, a matching or the kernel, or sweeps have different numbers of images.
    """
    _require_equal_numbers(results)
    kernels = [kernel] if isinstance(kernel, str) else list(kernel)
    blocks = [(data, name) for name in kernels for data in results]
    # The lines of a diagonal are the data sets, or the kernels of one data set.
    diagonals = [blocks] if len(kernels) == 1 else [[(data, name) for name in kernels] for data in results]
    grids = {
        (row.name, *block): results[block[0]].within(row.trained, semantic, "identity", block[1])["mean"]
        for row in rows
        for block in blocks
    }
    norm = Normalize(lowest_value(grids.values()), 1.0)
    title = _title("Semantic against spatio-semantic RSMs", kernels, results)
    with print_style():
        figure, axes = lettered_panels(len(rows), len(blocks) + len(diagonals), title)
        for line, row in zip(axes, rows, strict=True):
            top, bottom = line is axes[0], line is axes[-1]
            for ax, block in zip(line, blocks, strict=False):
                grid = grids[row.name, *block]
                cka_heatmap(ax, grid, _block_title(*block, kernels) if top else "", bar=False, norm=norm)
                ax.set_xlabel("layer,\nspatio-semantic RSM" if bottom else "")
                if ax is not line[0]:
                    ax.set_yticks([])
            colour_bar(line[len(blocks) - 1], "CKA")
            layers = [str(name) for name in grids[row.name, *blocks[0]]["layer_a"].values]
            whose = averaged(row.name, row.trained)
            line[0].set_ylabel(row_label(whose, omitted_beginning(layers), "layer, semantic RSM"))
            for ax, of in zip(line[len(blocks) :], diagonals, strict=True):
                for data, name in of:
                    trained, control = _diagonals(results[data], row, name, semantic)
                    label = data if len(kernels) == 1 else kernel_name(name)
                    # Several kernels have a panel for each data set.
                    panel = f"diagonal\n{data}" if len(diagonals) > 1 else "diagonal"
                    diagonal_plot(ax, trained, panel if top else "", label, control)
                ax.set_box_aspect(1)
                ax.set(ylabel="CKA", xlabel="layer" if bottom else "")
        labelled = {
            name: line
            for row in axes
            for ax in row[len(blocks) :]
            for line, name in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        if len(labelled) > 1:
            figure.legend(list(labelled.values()), list(labelled), loc="outside lower center", ncols=len(labelled))
    return figure


def figure16(
    results: Mapping[str, SweepResult],
    rows: Sequence[Architecture],
    kernel: str | Sequence[str] = "linear",
    semantic: str = "optimal",
) -> Figure:
    """Draw CKA between layers of the same model: spatio-semantic, semantic, and the difference; see `figure15`."""
    return _three_panels(
        lambda result, row, matching, kernel: result.within(row.trained, matching, kernel=kernel),
        rows, results, kernel, semantic, "CKA between layers of one model", ("layer", "layer"),
    )  # fmt: skip


def figure17(
    results: Mapping[str, SweepResult],
    rows: Sequence[Architecture],
    kernel: str | Sequence[str] = "linear",
    semantic: str = "optimal",
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
        lambda result, row, matching, kernel: result.across(row.trained, matching, kernel),
        rows, results, kernel, semantic, "CKA between layers of different seeds",
        ("layer, one seed", "layer, other seed"),
    )  # fmt: skip


FIGURES: dict[str, Callable[..., Figure]] = {"figure15": figure15, "figure16": figure16, "figure17": figure17}


def figure_numbers(
    results: Mapping[str, SweepResult],
    rows: Sequence[Architecture],
    kernel: str | Sequence[str] = "linear",
    semantic: str = "optimal",
) -> list[dict[str, str | float]]:
    """The numbers in the figures as rows of a table: the diagonal by layer, and the ranges of the differences.

    Of several kernels, all but the first are named in the column `what`.
    """
    first, *further = [kernel] if isinstance(kernel, str) else kernel
    table = _numbers(results, rows, first, semantic)
    for name in further:
        numbers = _numbers(results, rows, name, semantic)
        table += [{**entry, "what": f"{entry['what']}, {kernel_name(name)}"} for entry in numbers]
    return table


def _numbers(
    results: Mapping[str, SweepResult], rows: Sequence[Architecture], kernel: str, semantic: str
) -> list[dict[str, str | float]]:
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
    grid: Callable[[SweepResult, Architecture, str, str], xr.Dataset],
    rows: Sequence[Architecture],
    results: Mapping[str, SweepResult],
    kernel: str | Sequence[str],
    semantic: str,
    title: str,
    axis_names: tuple[str, str],
) -> Figure:
    """Draw three panels per architecture, data set and kernel: spatio-semantic, semantic, difference.

    Data sets are side by side; if there are several kernels, these are, and each data set has its own rows.
    """
    _require_equal_numbers(results)
    kernels = [kernel] if isinstance(kernel, str) else list(kernel)
    several = len(kernels) > 1
    means = {
        (row.name, data, name, matching): grid(result, row, matching, name)["mean"]
        for row in rows
        for data, result in results.items()
        for name in kernels
        for matching in ("identity", semantic)
    }
    differences = {key[:3]: mean - means[*key[:3], "identity"] for key, mean in means.items() if key[3] == semantic}
    norm, around_zero = Normalize(lowest_value(means.values()), 1.0), symmetric(list(differences.values()))
    lines = [(row, data) for row in rows for data in (results if several else [""])]
    blocks = [("", name) for name in kernels] if several else [(data, kernels[0]) for data in results]
    with print_style():
        figure, axes = lettered_panels(len(lines), 3 * len(blocks), _title(title, kernels, results))
        for line, (row, data) in zip(axes, lines, strict=True):
            for k, (of, name) in enumerate(blocks):
                heading = _block_title(of, name, kernels)
                names = [f"{heading}\n{kind}".lstrip() for kind in ("spatio-semantic", "semantic", "difference")]
                names = names if line is axes[0] else [""] * 3
                panels = line[3 * k : 3 * k + 3]
                key = row.name, of or data, name
                for ax, matching, panel in zip(panels, ("identity", semantic), names, strict=False):
                    cka_heatmap(ax, means[*key, matching], panel, bar=False, norm=norm)
                difference = differences[key]
                heading = f"{names[2]}\n{extremes(difference)}".lstrip()
                difference_heatmap(panels[2], difference, heading, bar=False, norm=around_zero)
                colour_bar(panels[1], "CKA")
                colour_bar(panels[2], "difference in CKA")
                for ax in panels:
                    ax.set_xlabel(axis_names[1] if line is axes[-1] else "")
                    if ax is not line[0]:
                        ax.set_yticks([])
            layers = [str(name) for name in differences[row.name, blocks[0][0] or data, blocks[0][1]]["layer_a"].values]
            whose = averaged(row.name, row.trained, pairs=axis_names[0] != axis_names[1])
            line[0].set_ylabel(row_label(whose, data, omitted_beginning(layers), axis_names[0]))
    return figure


def _title(what: str, kernels: Sequence[str], results: Mapping[str, SweepResult]) -> str:
    named = f", {kernel_name(kernels[0])}" if len(kernels) == 1 else ""
    return f"{what}{named}\n{conditions(results)}"


def _block_title(data: str, kernel: str, kernels: Sequence[str]) -> str:
    """Name what tells the panels of a block from those beside it."""
    return "\n".join(part for part in (data, kernel_name(kernel) if len(kernels) > 1 else "") if part)


def _require_equal_numbers(results: Mapping[str, SweepResult]) -> None:
    """Reject sweeps with different numbers of images, whose CKA is not comparable."""
    counts = {
        name: (result.dataset.attrs["images"], result.dataset.attrs["batches"]) for name, result in results.items()
    }
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name}: {images} in {batches}" for name, (images, batches) in counts.items())
        raise ComparisonError(f"the sweeps of one figure need equal numbers of images and batches ({shown})")
