"""The RSMs of the two layers that are selected in the CKA grids, and the two images under the pointer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from textwrap import wrap
from typing import Any

import altair as alt
import numpy as np

from rsm_probe.report.write import data_address
from rsm_probe.studies.sweep_report.menus import KINDS, PANEL
from rsm_probe.studies.sweep_report.shown import Shown

# Codes of similarities, from the lowest to the highest of a layer's images.
_CODES = 999
# Pixels between the lines of two labels, and how far a label may move from the middle of its images to keep them.
_LINE, _MOVED = 11, 8
# Letters in a line beside an image, and lines of its name at most.
_LETTERS, _MOST_LINES = 28, 4
# Letters of a label beside an RSM, and of a name above it, at most.
_LONGEST, _SHORT = 20, 40
# Pixels between the lines above an RSM.
_ABOVE = 14
# Numbers in full, with thousands apart, and four digits that count.
_FORMAT = ",.4~r"

# Width of what stands beside the RSMs, in pixels.
_BESIDE = 290

_BARE = alt.ViewBackground(stroke=None)


def rsm_views(images_shown: int) -> list[alt.LayerChart]:
    """Five views, three in a row: both RSMs of the layer of the row, the two images; both RSMs of that of the column.

    They read the parameters `model_a`, `model_b`, `matching`, `kernel` and `cell` of the grids, the selection `pair` of
    positions i and j, and the data of `packed_rsms`.

    Args:
        images_shown: number of images of an RSM.
    """
    rsms, images = alt.NamedData(name="rsms"), alt.NamedData(name="images")
    rows: list[alt.LayerChart] = []
    for side, which in (("a", "row layer"), ("b", "column layer")):
        rows += [_rsm_view(rsms, images, side, which, kind, _side_length(images_shown)) for kind in KINDS]
    rows.insert(2, _images_view(images))
    return rows


def rsm_params(shown: Shown) -> list[alt.Parameter]:
    """What the views read besides: names of images, in full and short, and the ends of the colours by layer."""
    spans = {"\n".join(map(str, key)): ends for key, ends in _spans(shown).items()}
    return [
        alt.param(name="named", value=[shown.named(number) for number in shown.order.tolist()]),
        alt.param(name="short", value=[_abbreviated(shown.named(number), _SHORT) for number in shown.order.tolist()]),
        alt.param(name="spans", value=spans),
    ]


def rsm_caption(shown: Shown) -> str:
    """What the views answer to, and what their colours and labels mean, in sentences."""
    with_rank = ", their similarity, and the rank of the pair: the share of pairs of images that are less similar"
    words = (
        "An RSM, as in Figure 2 of Wald et al. 2024, has a row and a column for each image, sorted by label; the "
        "columns follow the order of the rows. Point at an entry of an RSM, or tap it, for its two images"
        f"{with_rank if len(shown.ranks) else ' and their similarity'}. Similarities have no interval. The colours run "
        "from the lowest to the highest similarity between two different images of a layer, on the same scale for both "
        "kinds of RSM. The diagonal, each image with itself, is not part of that scale, because it is often far "
        "higher: values beyond the scale have the colour of its end."
    )
    labels = [shown.labels[number] for number in shown.order]
    count, beside = len(set(labels) - {""}), len(_placed_labels(labels))
    return (
        words
        if beside == count
        else f"{words} Only {beside} of {count} labels fit beside an RSM; pointing at an entry names both images."
    )


def _side_length(images_shown: int) -> int:
    """Pixels of an RSM's side: whole ones for every image leave no gaps."""
    return images_shown * max(2, round(PANEL / images_shown))


def packed_rsms(shown: Shown) -> dict[str, list[dict[str, Any]]]:
    """The data of the views by name."""
    return {"rsms": _packed_rsms(shown), "images": _packed_images(shown)}


def _spans(shown: Shown) -> dict[tuple[str, str, int], list[float]]:
    """The lowest and the highest similarity of different images in any RSM of a layer, by model, kernel and depth."""
    spans: dict[tuple[str, str, int], list[float]] = {}
    for key, (low, high) in zip(shown.keys, shown.ranges, strict=True):
        ends = spans.setdefault((key.model, key.kernel, key.depth), [np.inf, -np.inf])
        ends[:] = min(ends[0], float(f"{low:.5g}")), max(ends[1], float(f"{high:.5g}"))
    return spans


def _packed_rsms(shown: Shown) -> list[dict[str, Any]]:
    """One row per RSM: its lower triangle as codes between the lowest and the highest similarity of its layer, and
    the ranks of its pairs as codes, if the run stored them."""
    rows, (below, left), spans = [], np.tril_indices(len(shown.order)), _spans(shown)
    for number, (key, rsm) in enumerate(zip(shown.keys, shown.rsms, strict=True)):
        low, high = spans[key.model, key.kernel, key.depth]
        codes = np.clip((rsm[below, left] - low) / ((high - low) or 1.0), 0, 1) * _CODES
        row = {
            "model": key.model, "layer": key.layer, "depth": key.depth, "matching": key.matching,
            "kernel": key.kernel, "low": low, "high": high, "codes": codes.round().astype(int).tolist(),
        }  # fmt: skip
        if len(shown.ranks):
            ranks = np.nan_to_num(shown.ranks[number][below, left], nan=-1) * 1000  # -1000 on the diagonal
            row["ranks"] = ranks.round().astype(int).tolist()
        rows.append(row)
    return rows


def _packed_images(shown: Shown) -> list[dict[str, Any]]:
    """The images of an RSM, in its order; where some of the labels begin, their names."""
    rows = []
    beside = _placed_labels([shown.labels[number] for number in shown.order])
    for position, number in enumerate(shown.order.tolist()):
        one, label = shown.thumbnails.get(number), shown.labels[number]
        row = {"position": position, "lines": [*_wrapped(shown.ids[number]), *([label] if label else [])]}
        if position in beside:
            row |= {"beside": _abbreviated(label, _LONGEST), "at": beside[position]}
        rows.append({**row, "url": "" if one is None else data_address(one.content)})
    return rows


def _placed_labels(labels: Sequence[str]) -> dict[int, float]:
    """The first position of each label that fits beside an RSM, with the pixel at which it stands."""
    size, last, placed = _side_length(len(labels)) / len(labels), -np.inf, dict[int, float]()
    for label in dict.fromkeys(labels):
        first, count = labels.index(label), labels.count(label)
        middle = (first + count / 2) * size
        at = max(middle, last + _LINE)
        if label and at <= middle + _MOVED:
            placed[first], last = round(at, 1), at
    return placed


def _abbreviated(name: str, most: int) -> str:
    """A name whose beginning and end are shown, because names may differ in either."""
    if len(name) <= most:
        return name
    # Cut between words where that leaves half of either end.
    half = f".{{{most // 4},}}"
    start = re.sub(rf"({half})[_\W]+[^_\W]*$", r"\1", name[: most // 2 - 1])
    end = re.sub(rf"^[^_\W]*[_\W]+({half})$", r"\1", name[-most // 2 :])
    return f"{start}…{end}"


def _wrapped(name: str) -> list[str]:
    """A name over several lines, whose end is always shown."""
    lines = wrap(name, _LETTERS, break_on_hyphens=False) or [""]
    if len(lines) <= _MOST_LINES:
        return lines
    return [*lines[: _MOST_LINES - 2], "…", name[-_LETTERS:]]


def _row(side: str, kind: str) -> str:
    """The condition of the RSM of the selected layer of a side, of one kind."""
    matching = "'identity'" if kind == "spatio-semantic" else "matching"
    return (
        f"datum.model == model_{side} && datum.depth == cell.depth_{side}[0] && datum.kernel == kernel && "
        f"datum.matching == {matching}"
    )


_VALUE = f"datum.low + (datum.high - datum.low) * datum.code / {_CODES}"
_SIMILARITY = (
    f"(datum.code <= 0 ? 'at most ' : datum.code >= {_CODES} ? 'at least ' : '') + format({_VALUE}, '{_FORMAT}')"
)
# The rank of a pair in words; "" for an image with itself, and for runs that stored no ranks.
_RANK = "isArray(datum.ranks) && datum.ranks[datum.at] >= 0 ? format(datum.ranks[datum.at] / 1000, '.1%') : ''"


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
            at="max(datum.i, datum.j) * (max(datum.i, datum.j) + 1) / 2 + min(datum.i, datum.j)",
            one="named[datum.i]",
            other="named[datum.j]",
        )
        .transform_calculate(code="datum.codes[datum.at]", rank=_RANK)
        .transform_calculate(similarity=_SIMILARITY, value=_VALUE)
    )


def _rsm_view(
    rsms: alt.NamedData, images: alt.NamedData, side: str, which: str, kind: str, length: int
) -> alt.LayerChart:
    name = f"rsm_{side}_{'identity' if kind == 'spatio-semantic' else 'semantic'}"
    position = {"scale": alt.Scale(padding=0), "axis": None}
    span = f"spans[model_{side} + '\\n' + kernel + '\\n' + cell.depth_{side}[0]]"
    ends = [alt.ExprRef(f"({span} || [0, 1])[{end}]") for end in (0, 1)]
    values = alt.ExprRef(f"{span} ? [{span}[0], ({span}[0] + {span}[1]) / 2, {span}[1]] : []")
    legend = alt.Legend(
        title="similarity of different images", titleLimit=length, orient="bottom", gradientLength=length,
        values=values, format=_FORMAT,
    )  # fmt: skip
    cells = (
        _cells(rsms, side, kind)
        .mark_rect()
        .encode(
            x=alt.X("j:O", **position),
            y=alt.Y("i:O", **position),
            color=alt.Color("value:Q", scale=alt.Scale(scheme="viridis", domain=ends, clamp=True), legend=legend),
            tooltip=[
                alt.Tooltip("one:N", title="row image"),
                alt.Tooltip("other:N", title="column image"),
                alt.Tooltip("rank:N", title="rank of the pair"),
                alt.Tooltip("similarity:N"),
            ],
        )
        .properties(name=name)
    )
    # Says what the tooltip says, because a tap shows no tooltip.
    heading = (
        alt.Chart(rsms)
        .transform_filter(_row(side, kind))
        .transform_calculate(i="max(pair.i[0], pair.j[0])", j="min(pair.i[0], pair.j[0])")
        .transform_calculate(at="datum.i * (datum.i + 1) / 2 + datum.j")
        .transform_calculate(code="datum.codes[datum.at]", rank=_RANK)
        .transform_calculate(similarity=_SIMILARITY)
        .transform_calculate(
            text="[datum.model + ', ' + datum.layer, short[pair.i[0]], short[pair.j[0]], "
            "(datum.rank ? 'rank ' + datum.rank + ', ' : '') + 'similarity ' + datum.similarity]"
        )
        .mark_text(align="left", baseline="top", dy=-4 * _ABOVE - 2, lineHeight=_ABOVE, limit=length + 60, dir="rtl")
        .encode(text="text:N", x=alt.value(0), y=alt.value(0))
    )
    beside = (
        alt.Chart(images)
        .transform_filter("isValid(datum.at)")
        .mark_text(align="right", baseline="middle", dx=-4, limit=0, fontSize=10)
        .encode(text="beside:N", x=alt.value(0), y=alt.Y("at:Q", scale=None))
    )
    missing = (
        alt.Chart(alt.Data(values=[{"text": "This layer's RSMs are not on the page."}]))
        .transform_filter(f"!isValid({span})")
        .mark_text()
        .encode(text="text:N", x=alt.value(length / 2), y=alt.value(length / 2))
    )
    title = _title(f"{which}: {kind} RSM")
    views = alt.layer(cells, heading, beside, missing).resolve_scale(y="independent")
    return views.properties(width=length, height=length, title=title)


def _title(text: str) -> alt.TitleParams:
    """A title above the view."""
    return alt.TitleParams(text, offset=8, anchor="start", frame="group")


def _images_view(images: alt.NamedData) -> alt.LayerChart:
    """The two images of the entry under the pointer."""
    layers: list[alt.Chart] = []
    for side, y in (("i", 0), ("j", PANEL / 2)):
        base = alt.Chart(images).transform_filter(f"datum.position == pair.{side}[0]")
        layers.append(
            base.mark_image(width=100, height=100, align="left", baseline="top", aspect=True).encode(
                url="url:N", x=alt.value(0), y=alt.value(y)
            )
        )
        layers.append(
            base.mark_text(align="left", baseline="top", lineHeight=16).encode(
                text="lines:N", x=alt.value(110), y=alt.value(y)
            )
        )
    return alt.layer(*layers).properties(width=_BESIDE, height=PANEL, title=_title("the two images"), view=_BARE)
