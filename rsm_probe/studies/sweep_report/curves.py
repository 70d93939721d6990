"""The diagonal of Figure 15, and training dynamics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from rsm_probe.report.page import Chart, Table
from rsm_probe.streaming.result import SweepResult
from rsm_probe.studies.panels import semantic_matchings
from rsm_probe.studies.sweep_report.menus import MOST_TICKS, PANEL, layer_axis, menu, menus_caption
from rsm_probe.studies.sweep_report.shown import Shown
from rsm_probe.studies.sweep_report.summary import names


def diagonal_chart(result: SweepResult, shown: Shown | None, models: Sequence[str]) -> Chart:
    """CKA between the semantic and the spatio-semantic RSM of each layer (paper, Figure 15, diagonal)."""
    kernels, semantics = names(result, "kernel"), semantic_matchings(result)
    known = {(one.model, one.layer, one.matching, one.kernel): one for one in (shown.intervals if shown else ())}
    rows: list[dict[str, Any]] = []
    for kernel in kernels:
        for semantic in semantics:
            for model in models:
                values = np.diagonal(result.grid(model, model, semantic, "identity", kernel).values)
                for depth, (layer, value) in enumerate(zip(result.layers(model), values, strict=True)):
                    one = known.get((model, layer, semantic, kernel))
                    ends = {"low": None, "high": None} if one is None else {"low": one.low, "high": one.high}
                    rows.append(
                        {
                            "model": model, "layer": layer, "depth": depth, "matching": semantic, "kernel": kernel,
                            "cka": None if np.isnan(value) else float(value), **ends,
                            "interval": "no interval" if one is None else f"{one.low:.3f} to {one.high:.3f}",
                        }
                    )  # fmt: skip
    start = {"matching": semantics[0], "kernel": kernels[0]}
    base = alt.Chart(alt.NamedData(name="diagonal")).transform_filter(
        "datum.matching == matching && datum.kernel == kernel"
    )
    x = alt.X("layer:N", sort=alt.EncodingSortField(field="depth", op="min"), axis=layer_axis())
    legend = alt.Legend(orient="bottom", columns=4, labelLimit=160)
    colour = alt.Color("model:N", title="model", legend=legend, scale=alt.Scale(domain=list(models)))
    tooltip = [
        "model:N", "layer:N", alt.Tooltip("cka:Q", title="CKA", format=".4f"),
        alt.Tooltip("interval:N", title="95% bootstrap interval"),
    ]  # fmt: skip
    y = alt.Y("cka:Q", title="CKA, semantic against spatio-semantic", scale=alt.Scale(zero=False))
    # Models stand side by side in a layer, so that their intervals can be told apart.
    base = base.encode(x=x, xOffset=alt.XOffset("model:N", sort=list(models)), color=colour)
    layers = [
        base.mark_line().encode(y=y),
        base.mark_point(filled=True, opacity=1, size=60).encode(y=y, tooltip=tooltip),
    ]
    if known:
        layers.insert(0, base.mark_rule(strokeWidth=2).encode(y="low:Q", y2="high:Q", tooltip=tooltip))
    params = [
        menu("matching", "semantic RSMs by", semantics, start["matching"]),
        menu("kernel", "kernel", kernels, start["kernel"]),
    ]
    chart = alt.layer(*layers).add_params(*params).properties(width="container", height=300)
    chart = chart.configure_axis(gridOpacity=0.35)
    spec = {**chart.to_dict(), "datasets": {"diagonal": rows}}
    words = " There are no bootstrap intervals."
    if known and shown is not None:
        words = (
            f" Vertical lines are 95% bootstrap intervals ({shown.repeats} random draws of the images): "
            "the sampling error. Point at a circle, or tap it, for its numbers."
        )
    if max(len(result.layers(model)) for model in models) > MOST_TICKS:
        words += " Where not all layers are named at the axis, pointing at a circle names its layer."
    headings = ["model", "layer", "matching", "kernel", "CKA"]
    headings += ["low end of 95% bootstrap interval", "high end of 95% bootstrap interval"]
    cells = [[row[name] for name in ("model", "layer", "matching", "kernel", "cka", "low", "high")] for row in rows]
    table = Table("diagonal", headings, cells, "CKA between both RSMs of a layer.", 4)
    what = (
        "CKA between the semantic and the spatio-semantic RSM of the same layer, as in Figure 15 of Wald et al. 2024."
    )
    menus = menus_caption({"the matching": semantics, "the kernel": kernels})
    return Chart("diagonal", spec, what + words + menus, table)


def dynamics_chart(result: SweepResult, networks: Mapping[str, Mapping[int, str]]) -> Chart:
    """CKA of each layer to the same layer at the end of training, by both kinds of RSM."""
    kernels = names(result, "kernel")
    matchings = names(result, "matching")
    rows: list[dict[str, Any]] = []
    for network in networks:
        for kernel in kernels:
            for matching in matchings:
                grid = result.over_training(network, matching, kernel=kernel).isel(step_b=-1)
                for depth, layer in enumerate(grid["layer"].values):
                    for step, value in zip(grid["step_a"].values, grid.values[:, depth], strict=True):
                        rows.append(
                            {
                                "network": network, "kernel": kernel, "matching": matching, "layer": str(layer),
                                "depth": depth, "step": int(step), "cka": None if np.isnan(value) else float(value),
                            }
                        )  # fmt: skip
    params = [
        menu("network", "network", list(networks), next(iter(networks))),
        menu("kernel", "kernel", kernels, kernels[0]),
    ]
    data = alt.NamedData(name="dynamics")
    views = []
    for number, matching in enumerate(matchings):
        title = "spatio-semantic RSMs" if matching == "identity" else f"semantic RSMs ({matching})"
        wanted = alt.FieldEqualPredicate(field="matching", equal=matching)
        views.append(
            alt.Chart(data)
            .transform_filter("datum.network == network && datum.kernel == kernel")
            .transform_filter(wanted)
            .mark_rect()
            .encode(
                x=alt.X("step:O", title="training step"),
                y=alt.Y("layer:N", sort=alt.EncodingSortField(field="depth", op="min"), axis=layer_axis()),
                color=alt.Color("cka:Q", scale=alt.Scale(scheme="viridis", domainMax=1), title="CKA"),
                tooltip=["layer:N", "step:O", alt.Tooltip("cka:Q", title="CKA to the final network", format=".4f")],
            )
            .properties(name=f"dynamics_{number}", width=PANEL, height=PANEL, title=title)
        )
    chart = alt.concat(*views, columns=3).add_params(*params)
    spec = {**chart.to_dict(), "datasets": {"dynamics": rows}}
    headings = ["network", "kernel", "matching", "layer", "step", "CKA"]
    cells = [[row[name] for name in ("network", "kernel", "matching", "layer", "step", "cka")] for row in rows]
    caption = (
        "CKA of each layer during training to the same layer at the end of training. Point at a cell, or tap it, for "
        "its value; there are no intervals."
    )
    return Chart("dynamics", spec, caption, Table("dynamics", headings, cells, caption, 4))
