"""The page of all pairs: CKA by layer, neighbours of some images, and the pairs that matching moves most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rsm_probe.errors import StorageError
from rsm_probe.paper.by_matching import distinct
from rsm_probe.paper.page_charts import interval_chart
from rsm_probe.paper.page_parts import NOTHING_SHOWN, counted
from rsm_probe.paper.page_words import rule_titles, rule_words
from rsm_probe.report.page import Chart, Page, Section, Table
from rsm_probe.report.write import INSTALL
from rsm_probe.runs.tables import Row, kernel_title
from rsm_probe.studies.sweep_report.page import changes_section, neighbours_section
from rsm_probe.studies.sweep_report.shown import Shown


def pairs_page(table: Sequence[Row], settings: Mapping[str, Any], shown: Shown | None) -> Page:
    """Lay out the page of a finished run, without command and provenance.

    Args:
        table: rows of the result.
        settings: settings of the study.
        shown: what the run stored for its page; None if it stored nothing.
    """
    same, kernels = settings["database"] is None, settings["kernels"]
    count = f"{table[0]['images_a']:,} images of the set {settings['images']['source']}"
    if not same:
        count += f" with {table[0]['images_b']:,} images of the set {settings['database']['source']}"
    rules = [rule_words(name) for name in distinct(table, "matching")]
    columns = [key for key in table[0] if key != "path"]
    sections = [_cka(table, kernels)] if any(f"cka_{kernel}" in table[0] for kernel in kernels) else []
    if shown is not None:
        sections += [_rsms(shown)] if shown.keys else []
        sections += [changes_section(shown)] if shown.changes else []
        sections += [neighbours_section(shown)] if shown.neighbours else []
    sections.append(
        Section(
            "All layers",
            "largest_gap: the largest possible distance of a product from the optimum, as a share of |x| |y|; none "
            "where nothing is proven.",
            [Table("pairs", columns, [[_shown(key, row[key]) for key in columns] for row in table], digits=4)],
        )
    )
    return Page(
        "All pairs of images",
        "Which images does each layer of a model consider similar, and what changes when locations are matched?",
        f"All pairs of {count}; {counted(distinct(table, 'model'), 'model')}; "
        f"{counted(distinct(table, 'layer'), 'layer')}; {counted(rules, 'matching')}; "
        f"{counted([kernel_title(kernel) for kernel in kernels], 'kernel')}.",
        _answer(table, kernels),
        sections,
        command="",
        notes=[NOTHING_SHOWN] if shown is None else shown.notes,
    )


def _rsms(shown: Shown) -> Section:
    """Two layers side by side, under both kinds of RSM.

    Raises:
        StorageError: Vega-Altair is not installed.
    """
    try:
        import altair as alt

        from rsm_probe.studies.sweep_report.menus import menu, menus_caption, selection, view_names
        from rsm_probe.studies.sweep_report.rsm_views import packed_rsms, rsm_caption, rsm_params, rsm_views
    except ImportError as error:
        raise StorageError(f"the page of all pairs needs Vega-Altair; {INSTALL}") from error
    layers = {f"{key.model}, {key.layer}": key for key in shown.keys}
    titles, (first, last) = list(layers), (next(iter(layers)), list(layers)[-1])
    depths = "[{depth}[indexof(titles, layer_{side})]]"
    # The views read the model and the depth of each side, which here follow from the chosen layer.
    params = [
        menu("layer_a", "row layer", titles, first), menu("layer_b", "column layer", titles, last),
        menu("matching", "semantic RSMs by", _distinct(shown, "matching") or ["identity"],
             shown.semantic or "identity"),
        menu("kernel", "kernel", _distinct(shown, "kernel"), shown.kernel),
        *rsm_params(shown),
        alt.param(name="titles", value=titles),
        alt.param(name="models", value=[key.model for key in layers.values()]),
        alt.param(name="depths", value=[key.depth for key in layers.values()]),
        *(alt.param(name=f"model_{side}", expr=f"models[indexof(titles, layer_{side})]") for side in "ab"),
        alt.param(
            name="cell",
            expr="{" + ", ".join(f"depth_{side}: " + depths.format(depth="depths", side=side) for side in "ab") + "}",
        ),
    ]  # fmt: skip
    scales = {"color": "independent", "x": "independent", "y": "independent"}
    views = alt.concat(*rsm_views(len(shown.order)), columns=3, spacing=alt.RowColnumber(row=36, column=20))
    spec = views.add_params(*params).resolve_scale(**scales).to_dict()
    pair = [{"i": 0, "j": min(1, len(shown.order) - 1)}]
    names = [name for name in view_names(spec) if name.startswith("rsm_")]
    spec["params"].append(selection("pair", "pointerover, touchend", pair, names))
    spec["datasets"] = packed_rsms(shown)
    matchings, kernels = (_distinct(shown, field) for field in ("matching", "kernel"))
    menus = menus_caption({"the layers": titles, "the matching": matchings, "the kernel": kernels})
    caption = f"RSMs of two layers.{menus}\n\n{rsm_caption(shown)}"
    return Section("RSMs of two layers", "", [Chart("rsms", spec, caption)])


def _distinct(shown: Shown, field: str) -> list[str]:
    """Kernels, or matchings other than the identity, of the RSMs on the page."""
    return list(dict.fromkeys(value for key in shown.keys if (value := getattr(key, field)) != "identity"))


def certificate_of(table: Sequence[Row]) -> dict[str, str]:
    """What is proven about the products, under "Certificate"; {} if nothing is."""
    gaps: dict[str, list[float]] = {}
    for row in table:
        gaps.setdefault(row["matching"], []).append(row["largest_gap"])
    proven = {name: max(values) for name, values in gaps.items() if not any(map(math.isnan, values))}
    if not proven:
        return {}
    listed = ", ".join(f"{rule_words(name)} {gap:.1e}" for name, gap in proven.items())
    return {"Certificate": f"largest possible distance of a product from the optimum, as a share of |x| |y|: {listed}"}


def _answer(table: Sequence[Row], kernels: Sequence[str]) -> str:
    """The lowest and the highest CKA between semantic and spatio-semantic RSMs, and what is proven."""
    values = [
        (
            row[f"cka_{kernel}"],
            f"{row['layer']} of {row['model']}, {rule_words(row['matching'])}, {kernel_title(kernel)}",
        )
        for row in table
        for kernel in kernels
        if row["matching"] != "identity" and not math.isnan(row.get(f"cka_{kernel}", math.nan))
    ]
    proven = certificate_of(table).get("Certificate", "")
    second = (
        f"Proven about the matchings: {proven}." if proven else "Nothing is proven about the optimum of the matchings."
    )
    if not values:
        return f"The similarities of all pairs are stored, and no two RSMs of one set were compared. {second}"
    (low, where), (high, elsewhere) = min(values), max(values)
    return (
        "The CKA of the RSM with matched locations and the spatio-semantic RSM of the same layer is lowest, "
        f"{low:.3f}, in {where}, and highest, {high:.3f}, in {elsewhere}; these are values of this set of images, "
        f"without intervals. {second}"
    )


def _cka(table: Sequence[Row], kernels: Sequence[str]) -> Section:
    rows = [
        {**row, "kernel": kernel_title(kernel), "cka": row[f"cka_{kernel}"], "none": math.nan}
        for kernel in kernels
        for row in table
        if row["matching"] != "identity" and not math.isnan(row[f"cka_{kernel}"])
    ]
    if not rows:
        return Section("CKA by layer", "No matching is compared with equal locations.")
    chart = interval_chart(
        rows, "layer", ("cka", "none", "none"), "CKA with the spatio-semantic RSM", rule_titles(rows),
        menus={"model": "model ", "kernel": "kernel "}, hover={"locations": "locations", "channels": "channels"},
    )  # fmt: skip
    keys = ("model", "layer", "locations", "channels", "matching", "kernel", "cka")
    listed = Table("cka", keys, [[row[key] for key in keys] for row in rows])
    return Section(
        "CKA by layer",
        "How similar the RSM with matched locations is to the spatio-semantic RSM (equal locations) of the same "
        "layer; 1 is identical. All images of the run count, so there is no interval over mini-batches.",
        [Chart("cka", chart, "Unbiased CKA by layer; no intervals. Click on the legend, or tap it, to single out a "
               "rule.",
               listed)],
    )  # fmt: skip


def _shown(key: str, value: Any) -> Any:
    if key == "matching":
        return rule_words(value)
    return f"{value:.1e}" if key == "largest_gap" and not math.isnan(value) else value
