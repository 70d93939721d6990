"""The RSMs of the two layers that are selected in the CKA grids, and the two images under the pointer."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np

from rsm_probe.figures import thinned
from rsm_probe.report.write import data_address
from rsm_probe.studies.sweep_report.menus import KINDS, PANEL
from rsm_probe.studies.sweep_report.shown import Shown

# Codes of similarities, from the lowest to the highest of a layer's images.
_CODES = 999
# Labels beside an RSM, at most, and the images between two of them, at least.
_MOST_LABELS, _APART = 12, 4

_BARE = alt.ViewBackground(stroke=None)


def rsm_views(images_shown: int) -> list[alt.LayerChart]:
    """Six views, three in a row: both RSMs of the layer of the row, the two images; of the column, their similarity.

    They read the parameters `model_a`, `model_b`, `matching`, `kernel` and `cell` of the grids, the selection `pair` of
    positions i and j, and the data of `packed_rsms`.

    Args:
        images_shown: number of images of an RSM.
    """
    rsms, images = alt.NamedData(name="rsms"), alt.NamedData(name="images")
    side_length = images_shown * max(2, round(PANEL / images_shown))  # whole pixels leave no gaps
    rows: list[alt.LayerChart] = []
    for side, which in (("a", "row layer"), ("b", "column layer")):
        rows += [_rsm_view(rsms, images, side, which, kind, side_length) for kind in KINDS]
        rows.append(_images_view(images) if side == "a" else _pair_view(rsms))
    return rows


def packed_rsms(shown: Shown) -> dict[str, list[dict[str, Any]]]:
    """The data of the views by name."""
    return {"rsms": _packed_rsms(shown), "images": _packed_images(shown)}


def _packed_rsms(shown: Shown) -> list[dict[str, Any]]:
    """One row per RSM: its lower triangle as codes between the lowest and the highest similarity of its layer."""
    rows, (below, left) = [], np.tril_indices(len(shown.order))
    spans: dict[tuple[str, ...], list[float]] = {}
    for key, (low, high) in zip(shown.keys, shown.ranges, strict=True):
        of_layer = spans.setdefault((key.model, key.layer, key.kernel), [float(low), float(high)])
        of_layer[:] = min(of_layer[0], float(low)), max(of_layer[1], float(high))
    for key, rsm in zip(shown.keys, shown.rsms, strict=True):
        low, high = spans[key.model, key.layer, key.kernel]
        codes = np.clip((rsm[below, left] - low) / ((high - low) or 1.0), 0, 1) * _CODES
        rows.append(
            {
                "model": key.model, "layer": key.layer, "depth": key.depth, "matching": key.matching,
                "kernel": key.kernel, "low": float(f"{low:.5g}"), "high": float(f"{high:.5g}"),
                "codes": codes.round().astype(int).tolist(),
            }
        )  # fmt: skip
    return rows


def _packed_images(shown: Shown) -> list[dict[str, Any]]:
    """The images of an RSM, in its order; where some of the labels begin, their names."""
    starts, before = list[int](), None
    for position, number in enumerate(shown.order.tolist()):
        if shown.labels[number] != before and position >= (starts[-1] + _APART if starts else 0):
            starts.append(position)
        before = shown.labels[number]
    named, rows = set(thinned(starts, _MOST_LABELS)), []
    for position, number in enumerate(shown.order.tolist()):
        one, label = shown.thumbnails.get(number), shown.labels[number]
        address = "" if one is None else data_address(one.content)
        rows.append(
            {
                "position": position, "id": shown.ids[number], "label": label, "url": address,
                "begins": label if position in named else "",
            }
        )  # fmt: skip
    return rows


def _row(side: str, kind: str) -> str:
    """The condition of the RSM of the selected layer of a side, of one kind."""
    matching = "'identity'" if kind == "spatio-semantic" else "matching"
    return (
        f"datum.model == model_{side} && datum.depth == cell.depth_{side}[0] && datum.kernel == kernel && "
        f"datum.matching == {matching}"
    )


_SIMILARITY = (
    f"datum.code <= 0 ? 'at most ' + format(datum.low, '.4~g') : datum.code >= {_CODES} ? 'at least ' + "
    f"format(datum.high, '.4~g') : format(datum.low + (datum.high - datum.low) * datum.code / {_CODES}, '.4~g')"
)


def _cells(data: alt.NamedData, side: str, kind: str) -> alt.Chart:
    """A chart over the entries of the RSM of the selected layer."""
    return (
        alt.Chart(data)
        .transform_filter(_row(side, kind))
        .transform_calculate(n="round((sqrt(8 * length(datum.codes) + 1) - 1) / 2)")
        .transform_calculate(k="sequence(datum.n * datum.n)")
        .transform_flatten(["k"])
        .transform_calculate(i="floor(datum.k / datum.n)", j="datum.k % datum.n")
        .transform_calculate(
            code="datum.codes[max(datum.i, datum.j) * (max(datum.i, datum.j) + 1) / 2 + min(datum.i, datum.j)]"
        )
        .transform_calculate(similarity=_SIMILARITY)
    )


def _rsm_view(
    rsms: alt.NamedData, images: alt.NamedData, side: str, which: str, kind: str, length: int
) -> alt.LayerChart:
    name = f"rsm_{side}_{'identity' if kind == 'spatio-semantic' else 'semantic'}"
    position = {"scale": alt.Scale(padding=0), "axis": None}
    cells = (
        _cells(rsms, side, kind)
        .mark_rect()
        .encode(
            x=alt.X("j:O", **position),
            y=alt.Y("i:O", **position),
            color=alt.Color("code:Q", scale=alt.Scale(scheme="viridis", domain=[0, _CODES]), legend=None),
            tooltip=[alt.Tooltip("similarity:N")],
        )
        .properties(name=name)
    )
    heading = (
        alt.Chart(rsms)
        .transform_filter(_row(side, kind))
        .transform_calculate(text="datum.model + ', ' + datum.layer")
        .mark_text(align="left", baseline="bottom", dy=-4, limit=PANEL)
        .encode(text="text:N", x=alt.value(0), y=alt.value(0))
    )
    begins = (
        alt.Chart(images)
        .transform_filter("datum.begins != ''")
        .mark_text(align="right", baseline="top", dx=-4, limit=70)
        .encode(text="begins:N", x=alt.value(0), y=alt.Y("position:O", **position))
    )
    title = _title(f"{which}, {kind} RSM")
    return alt.layer(cells, heading, begins).properties(width=length, height=length, title=title)


def _title(text: str) -> alt.TitleParams:
    """A title with room below it for the name of the layer."""
    return alt.TitleParams(text, offset=18, anchor="start")


def _images_view(images: alt.NamedData) -> alt.LayerChart:
    """The two images of the entry under the pointer."""
    layers: list[alt.Chart] = []
    for side, y in (("i", 0), ("j", PANEL / 2)):
        base = alt.Chart(images).transform_filter(f"datum.position == pair.{side}[0]")
        layers.append(
            base.mark_image(width=90, height=90, align="left", baseline="top", aspect=True).encode(
                url="url:N", x=alt.value(0), y=alt.value(y)
            )
        )
        words = base.transform_calculate(text="[datum.id, datum.label]")
        layers.append(
            words.mark_text(align="left", baseline="top", limit=PANEL - 105, lineHeight=16).encode(
                text="text:N", x=alt.value(100), y=alt.value(y)
            )
        )
    return alt.layer(*layers).properties(width=PANEL, height=PANEL, title=_title("the two images"), view=_BARE)


def _pair_view(rsms: alt.NamedData) -> alt.LayerChart:
    """The similarities of the two images in all four RSMs, in words."""
    layers = []
    for number, (side, kind) in enumerate((side, kind) for side in "ab" for kind in KINDS):
        layers.append(
            alt.Chart(rsms)
            .transform_filter(_row(side, kind))
            .transform_calculate(i="max(pair.i[0], pair.j[0])", j="min(pair.i[0], pair.j[0])")
            .transform_calculate(code="datum.codes[datum.i * (datum.i + 1) / 2 + datum.j]")
            .transform_calculate(similarity=_SIMILARITY)
            .transform_calculate(text=f"datum.layer + ', {kind}: ' + datum.similarity")
            .mark_text(align="left", baseline="top", limit=PANEL)
            .encode(text="text:N", x=alt.value(0), y=alt.value(22 * number))
        )
    return alt.layer(*layers).properties(width=PANEL, height=PANEL, title=_title("their similarity"), view=_BARE)
