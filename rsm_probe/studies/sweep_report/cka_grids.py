"""CKA grids of a sweep, with the RSMs behind each cell.

Data are packed: one row per grid with all its values, which the chart unpacks after choosing the row. That keeps pages
small and menus fast. Charts name their data, which stand beside them: Altair would check every value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import altair as alt
import numpy as np

from rsm_probe.report.page import Chart, Table
from rsm_probe.streaming.result import SweepResult
from rsm_probe.studies.panels import semantic_matchings
from rsm_probe.studies.sweep_report.menus import (
    KINDS,
    MOST_TICKS,
    PANEL,
    beside,
    layer_axis,
    menu,
    menus_caption,
    selection,
    view_names,
)
from rsm_probe.studies.sweep_report.rsm_views import packed_rsms, rsm_caption, rsm_params, rsm_views
from rsm_probe.studies.sweep_report.shown import Shown
from rsm_probe.studies.sweep_report.summary import Cell, names

# Texts of a cell, and what they are.
_PROVEN = "certificate (matching error)"
_TOOLTIPS = {
    "spatio": "spatio-semantic CKA", "matched": "semantic CKA", "change": "difference", "proven": _PROVEN,
}  # fmt: skip
# Colours and widths of the frame of the selected cell, the lower one first.
_FRAME = (("#000000", 6), ("#ffffff", 3))


def cka_chart(result: SweepResult, shown: Shown | None, models: Sequence[str]) -> Chart:
    """CKA between all layers of two models by both kinds of RSM; a click shows the RSMs of both layers.

    A sweep without the identity, or without a second matching, has one grid.

    Args:
        result: the sweep.
        shown: RSMs and images, if the run stored them.
        models: the models on the page.
    """
    kernels, semantics = names(result, "kernel"), semantic_matchings(result)
    matchings = semantics or names(result, "matching")
    start = Cell(result, models)
    params = [
        menu("model_a", "rows", models, start.model),
        menu("model_b", "columns", models, start.model),
        menu("matching", "semantic RSMs by" if semantics else "RSMs by", matchings, start.matching),
        menu("kernel", "kernel", kernels, start.kernel),
    ]
    packed = _packed_grids(result, shown, models)
    grids, views = alt.NamedData(name="grids"), list[Any]()
    sequential, diverging = _scales(packed)
    if semantics:
        views.append(_grid_view(grids, "identity", "spatio-semantic RSMs", sequential, _TOOLTIPS))
        views.append(_grid_view(grids, "semantic", "semantic RSMs", sequential, _TOOLTIPS))
        views.append(_grid_view(grids, "difference", "semantic − spatio-semantic", diverging, _TOOLTIPS))
    else:
        views.append(_grid_view(grids, "semantic", "RSMs", sequential, {"matched": "CKA", "proven": _PROVEN}))
    menus = menus_caption({"the models": models, "the matching": matchings, "the kernel": kernels})
    figure = "Figure 16 of Wald et al. 2024" + (" (one model) or Figure 17 (two models)" if len(models) > 1 else "")
    caption = (
        f"CKA between each layer in the rows and each layer in the columns, as in {figure}. Point at a cell, or tap "
        f"it, for its layers, values and uncertainty.{menus}"
    )
    if max(len(result.layers(model)) for model in models) > MOST_TICKS:
        caption += " Only some layers are named at the axes; pointing at a cell names its layers."
    datasets: dict[str, list[dict[str, Any]]] = {"grids": packed}
    if shown is not None and semantics:
        views += rsm_views(len(shown.order))
        params += rsm_params(shown)
        datasets |= packed_rsms(shown)
        caption += f" Clicking on a cell, or tapping it, shows the RSMs of both layers below.\n\n{rsm_caption(shown)}"
    spec = beside(views, params, columns=3)
    cells = [{"depth_a": start.depth_a, "depth_b": start.depth_b}]
    selections = [
        selection("cell", "click, touchend", cells, [name for name in view_names(spec) if name.startswith("grid_")])
    ]
    if shown is not None and semantics:
        pair = [{"i": 0, "j": min(1, len(shown.order) - 1)}]
        selections.append(
            selection("pair", "pointerover, touchend", pair, [n for n in view_names(spec) if n.startswith("rsm_")])
        )
    spec["params"] += selections
    spec["datasets"] |= datasets
    return Chart("cka", spec, caption, _grid_table(packed), canvas="rsms" in datasets)


def _packed_grids(result: SweepResult, shown: Shown | None, models: Sequence[str]) -> list[dict[str, Any]]:
    """One row per pair of models, matching and kernel, with its CKA row by row; undefined values are None.

    Bootstrap intervals of a cell stand as its two ends after each other; a row without any has none.
    """
    rows, semantics, ends = [], semantic_matchings(result), dict[str, SweepResult]()
    if (proven := result.proven) is not None:
        ends = {end: SweepResult(result.dataset.assign(cka=proven[end])) for end in ("low", "high")}
    for kernel in names(result, "kernel"):
        for matching in semantics or names(result, "matching"):
            for a, b in product(models, repeat=2):
                values = {
                    kind: _rounded(result.grid(a, b, by, kernel=kernel).values)
                    for kind, by in (("identity", "identity" if semantics else matching), ("semantic", matching))
                }
                interval = {
                    end: _rounded(of_end.grid(a, b, matching, kernel=kernel).values, 5) for end, of_end in ends.items()
                }
                rows.append(
                    {
                        "model_a": a, "model_b": b, "matching": matching, "kernel": kernel,
                        "layers_a": result.layers(a), "layers_b": result.layers(b), **values, **interval,
                        **(_packed_ends(shown, a, b, matching, kernel, result) if shown is not None else {}),
                    }
                )  # fmt: skip
    return rows


def _packed_ends(
    shown: Shown, a: str, b: str, matching: str, kernel: str, result: SweepResult
) -> dict[str, list[float | None]]:
    """Bootstrap intervals of all cells of a grid, by kind."""
    if not len(shown.cells):
        return {}
    packed = {}
    for name, ends, by in (
        ("identity_ends", shown.cells, "identity"),
        ("semantic_ends", shown.cells, matching),
        ("change_ends", shown.differences, matching),
    ):
        rows, columns = (
            [shown.numbers.get((model, depth, by, kernel)) for depth in range(len(result.layers(model)))]
            for model in (a, b)
        )
        of_cells = [(np.nan, np.nan) if None in (i, j) else ends[i, j] for i in rows for j in columns]
        packed[name] = _rounded(np.array(of_cells), 3)
    return packed


def _rounded(values: np.ndarray, digits: int = 4) -> list[float | None]:
    return [round(float(value), digits) if np.isfinite(value) else None for value in values.ravel()]


def _unpacked(data: alt.NamedData) -> alt.Chart:
    """A chart over the cells of the chosen grid, with depths and names of both layers."""
    wanted = " && ".join(f"datum.{name} == {name}" for name in ("model_a", "model_b", "matching", "kernel"))
    return (
        alt.Chart(data)
        .transform_filter(wanted)
        .transform_calculate(k="sequence(length(datum.identity))")
        .transform_flatten(["k"])
        .transform_calculate(
            depth_a="floor(datum.k / length(datum.layers_b))",
            depth_b="datum.k % length(datum.layers_b)",
            spatio="datum.identity[datum.k]",
            matched="datum.semantic[datum.k]",
        )
        .transform_calculate(
            layer_a="datum.layers_a[datum.depth_a]",
            layer_b="datum.layers_b[datum.depth_b]",
            change="isValid(datum.matched) && isValid(datum.spatio) ? datum.matched - datum.spatio : null",
        )
    )


def _worded(cells: alt.Chart) -> alt.Chart:
    """Cells with the texts that pointing at them shows; formatting takes long, so filter cells before."""
    return cells.transform_calculate(
        spatio_text=_with_interval("spatio", "identity_ends", ".4f"),
        matched_text=_with_interval("matched", "semantic_ends", ".4f"),
        change_text=_with_interval("change", "change_ends", "+.4f"),
        proven_text="isArray(datum.low) ? 'with the best matchings, ' + (datum.low[datum.k] == datum.high[datum.k] ? "
        "format(datum.low[datum.k], '.5f') + ' to five digits' : format(datum.low[datum.k], '.5f') + ' to ' + "
        "format(datum.high[datum.k], '.5f')) : 'none'",
    )


def _with_interval(value: str, ends: str, form: str) -> str:
    """An expression for a value and its bootstrap interval."""
    low, high = (f"datum.{ends}[2 * datum.k + {end}]" for end in (0, 1))
    known = f"isArray(datum.{ends}) && isValid({low})"
    short = form.replace("4", "3")
    interval = f"'95% bootstrap interval ' + format({low}, '{short}') + ' to ' + format({high}, '{short}')"
    value = f"datum.{value}"
    return (
        f"isValid({value}) ? format({value}, '{form}') + ' (' + ({known} ? {interval} : 'no bootstrap interval') + ')' "
        ": 'undefined'"
    )


def _scales(packed: Sequence[Mapping[str, Any]]) -> tuple[alt.Scale, alt.Scale]:
    """The scales of CKA and of its differences: the same for all grids, and as much of either sign around 0."""
    identity, semantic = (
        np.concatenate([np.array(one[kind], dtype=np.float64) for one in packed]) for kind in ("identity", "semantic")
    )
    lowest = np.nanmin(np.concatenate([identity, semantic]), initial=0.0)
    limit = np.nanmax(np.abs(semantic - identity), initial=0.0) or 1e-6
    sequential = alt.Scale(scheme="viridis", domain=[float(lowest), 1.0])
    return sequential, alt.Scale(scheme="purpleorange", domain=[-float(limit), float(limit)])


def _grid_view(
    data: alt.NamedData, values: str, title: str, scale: alt.Scale, tooltips: Mapping[str, str]
) -> alt.LayerChart:
    field = {"identity": "spatio", "semantic": "matched", "difference": "change"}[values]
    meaning = "difference of CKA" if values == "difference" else "CKA"
    legend = alt.Legend(title=meaning, titleLimit=PANEL, orient="bottom", gradientLength=PANEL)

    def axis(side: str) -> dict[str, Any]:
        order = alt.EncodingSortField(field=f"depth_{side}", op="min")
        return {"field": f"layer_{side}", "type": "nominal", "sort": order, "axis": layer_axis()}

    shown: dict[str, Any] = dict(
        x=alt.X(**axis("b")),
        y=alt.Y(**axis("a")),
        tooltip=[
            alt.Tooltip("layer_a:N", title="row layer"),
            alt.Tooltip("layer_b:N", title="column layer"),
            *(alt.Tooltip(f"{field}_text:N", title=title) for field, title in tooltips.items()),
        ],
    )
    # White within black is seen on any colour.
    one = _unpacked(data).transform_filter("datum.depth_a == cell.depth_a[0] && datum.depth_b == cell.depth_b[0]")
    cells, selected = _worded(_unpacked(data)).encode(**shown), _worded(one).encode(**shown)
    frames = [selected.mark_rect(filled=False, stroke=ink, strokeWidth=width) for ink, width in _FRAME]
    colour = alt.Color(f"{field}:Q", scale=scale, legend=legend)
    coloured = cells.mark_rect().encode(color=colour).properties(name=f"grid_{values}")
    heading = alt.TitleParams(title, anchor="start", frame="group")
    return alt.layer(coloured, *frames).properties(width=PANEL, height=PANEL, title=heading)


def _grid_table(packed: Sequence[Mapping[str, Any]]) -> Table:
    rows: list[list[Any]] = []
    for one in packed:
        columns = len(one["layers_b"])
        for k, (identity, semantic) in enumerate(zip(one["identity"], one["semantic"], strict=True)):
            layers = [one["model_a"], one["layers_a"][k // columns], one["model_b"], one["layers_b"][k % columns]]
            both = identity is not None and semantic is not None
            values = [identity, semantic, semantic - identity if both else None]
            rows.append([*layers, one["matching"], one["kernel"], *values])
    headings = ["model", "layer", "other model", "other layer", "matching", "kernel", *KINDS, "difference"]
    return Table("cka", headings, rows, "CKA between layers by both kinds of RSM.", 4)
