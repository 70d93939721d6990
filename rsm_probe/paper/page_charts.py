"""Charts of the experiments' pages: values with intervals by rule, curves, and densities of pairs.

Each takes rows of a result, and offers a menu for every key that tells its rows apart and has no place in the chart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rsm_probe.errors import StorageError
from rsm_probe.figures import rule_styles
from rsm_probe.paper.by_matching import distinct
from rsm_probe.report.write import INSTALL
from rsm_probe.runs.tables import Row, with_interval

# Pixels from the axis to the top of a chart.
_HEIGHT = 260
# Name of the rows of a chart.
_ROWS = "rows"
# Area of a point, and size of letters, in pixels.
_POINT, _LETTERS = 90, 12
# Letters of a tick that are shown; hovering shows all.
_LONGEST_TICK = 180
# A cross of two diagonals, as Vega draws paths.
_SALTIRE = "M-1,-.6L-.6,-1L0,-.4L.6,-1L1,-.6L.4,0L1,.6L.6,1L0,.4L-.6,1L-1,.6L-.4,0Z"
# In place of colours of figures that are hard to see on black.
_LIGHTER = {
    "#404040": "#868686",
    "#000000": "#868686",
    "#332288": "#7a6ad8",
    "#882255": "#b24a82",
    "#0072B2": "#2a8fd0",
}
# Matplotlib's markers as Vega names them; any other is a circle.
_SHAPES = {
    "s": "square", "o": "circle", "^": "triangle-up", "v": "triangle-down", "D": "diamond", "d": "diamond",
    "P": "cross", "X": _SALTIRE, "<": "triangle-left", ">": "triangle-right",
    "p": "M0,-1L.95,-.31L.59,.81L-.59,.81L-.95,-.31Z", "h": "M-.87,-.5L0,-1L.87,-.5L.87,.5L0,1L-.87,.5Z",
    "*": "M0,-1L.25,-.35L.95,-.3L.4,.12L.6,.8L0,.4L-.6,.8L-.4,.12L-.95,-.3L-.25,-.35Z",
    "H": "M-1,0L-.5,-.87L.5,-.87L1,0L.5,.87L-.5,.87Z",
}  # fmt: skip


def interval_chart(
    rows: Sequence[Row],
    tick: str,
    values: Sequence[str],
    meaning: str,
    titles: Mapping[str, str],
    *,
    rule: str = "matching",
    menus: Mapping[str, str] | None = None,
    hover: Mapping[str, str] | None = None,
    reference: float | None = None,
    verdicts: Mapping[str, str] | None = None,
    log: bool = False,
    band: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Draw values with their intervals: ticks along x, a colour and a marker per rule.

    Args:
        rows: rows of a result; those without a value are left out.
        tick: key of the ticks.
        values: keys of the value and of the lower and upper end of its interval.
        meaning: title of the y-axis.
        titles: name of a rule -> its title, in the order of the legend.
        rule: key of the rule.
        menus: key -> label of a menu that chooses among its values; keys with one value get none.
        hover: key -> what it says when the mouse is over a point, besides tick, rule and value.
        reference: value of a dashed line, such as chance or no difference.
        verdicts: key of the text that says whether a row is decided -> its label; undecided points ("") are hollow.
        log: a logarithmic y-axis.
        band: ends of a grey band, such as a noise ceiling.
    """
    alt = _altair()
    value, low, high = values
    (said, label), *_ = (verdicts or {"": ""}).items()
    menus, hover = menus or {}, hover or {}
    data = [
        {
            "tick": str(row[tick]), "rule": titles.get(row[rule], row[rule]), "value": row[value],
            # Without an interval, a line of no length: Vega warns of fields without any value.
            "low": _or(row[low], row[value]), "high": _or(row[high], row[value]),
            "said": with_interval(row, value, low, high), "decided": not said or bool(row[said]),
            "verdict": (row[said] or "undecided") if said else "",
            **{key: _text(row[key]) for key in [*menus, *hover]},
        }
        for row in rows
        if not math.isnan(row[value])
    ]  # fmt: skip
    parameters, conditions = _menus(data, menus)
    scale = _rule_scale({name: title for name, title in titles.items() if any(row[rule] == name for row in rows)})
    base = _filtered(conditions)
    ticks = list(dict.fromkeys(row["tick"] for row in data))
    picked = alt.selection_point(name="picked_rule", fields=["rule"], bind="legend")
    y = alt.Y(
        "value:Q", title=meaning, scale=alt.Scale(type="log") if log else alt.Scale(zero=False),
        axis=alt.Axis(format="~g"),
    )  # fmt: skip
    labels = alt.Axis(title=None, labelAngle=-35, labelLimit=_LONGEST_TICK)
    base = base.encode(
        x=alt.X("tick:N", sort=ticks, axis=labels),
        xOffset=alt.XOffset("rule:N", sort=scale["domain"]),
        color=alt.Color("rule:N", title=None, scale=alt.Scale(domain=scale["domain"], range=scale["colours"])),
        opacity=alt.condition(picked, alt.value(1.0), alt.value(0.12)),
        tooltip=[
            alt.Tooltip("tick:N", title=tick), alt.Tooltip("rule:N", title="compared by"),
            alt.Tooltip("said:N", title=meaning), *([alt.Tooltip("verdict:N", title=label)] if said else []),
            *(alt.Tooltip(f"{key}:N", title=name) for key, name in {**menus, **hover}.items()),
        ],
    )  # fmt: skip
    shape = alt.Shape("rule:N", title=None, scale=alt.Scale(domain=scale["domain"], range=scale["shapes"]))
    ends = base.mark_rule(strokeWidth=1.5).encode(
        y=alt.Y("low:Q", title=meaning, scale=alt.Scale(type="log") if log else alt.Scale(zero=False)), y2="high:Q"
    )
    # A transparent fill makes a point look hollow, but hovering over its inside still works.
    same_colour = alt.Fill("rule:N", title=None, scale=alt.Scale(domain=scale["domain"], range=scale["colours"]))
    fill = alt.condition("datum.decided", same_colour, alt.value("transparent"))
    points = base.mark_point(size=_POINT, filled=False, strokeWidth=1.4).encode(y=y, shape=shape, fill=fill)
    layers: list[Any] = [ends, points]
    if reference is not None:
        line = alt.Chart(alt.Data(values=[{"at": reference}])).mark_rule(
            strokeDash=[4, 3], strokeWidth=1.5, color="#888888"
        )
        layers.insert(0, line.encode(y=alt.Y("at:Q", title=meaning)))
    if band is not None:
        area = alt.Chart(alt.Data(values=[{"from": band[0], "to": band[1]}])).mark_rect(opacity=0.25, color="#888888")
        layers.insert(0, area.encode(y=alt.Y("from:Q", title=meaning), y2="to:Q"))
    return _sized(alt.layer(*layers).add_params(picked, *parameters), data)


def tradeoff_chart(
    rows: Sequence[Row],
    x: tuple[str, str],
    values: Sequence[str],
    meaning: str,
    titles: Mapping[str, str],
    rule: str,
    *,
    menus: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Draw a value with its interval against a cost on a logarithmic axis, a colour and a marker per rule.

    Args:
        rows: rows of a result; those without a value or a cost are left out.
        x: key and title of the cost.
        values: keys of the value and of the lower and upper end of its interval.
        meaning: title of the y-axis.
        titles: name of a rule -> its title, in the order of the legend.
        rule: key of the rule.
        menus: see `interval_chart`.
    """
    alt = _altair()
    value, low, high = values
    menus = menus or {}
    data = [
        {
            "x": row[x[0]], "rule": titles[row[rule]], "value": row[value], "low": _or(row[low], row[value]),
            "high": _or(row[high], row[value]), "said": with_interval(row, value, low, high, 4),
            **{key: row[key] for key in menus},
        }
        for row in rows
        if not math.isnan(row[value]) and row[x[0]] > 0
    ]  # fmt: skip
    parameters, conditions = _menus(data, menus)
    scale = _rule_scale(titles)
    base = _filtered(conditions).encode(
        x=alt.X("x:Q", title=x[1], scale=alt.Scale(type="log"), axis=alt.Axis(format="~g")),
        color=alt.Color("rule:N", title=None, scale=alt.Scale(domain=scale["domain"], range=scale["colours"])),
        tooltip=[
            alt.Tooltip("rule:N", title="method"), alt.Tooltip("said:N", title=meaning),
            alt.Tooltip("x:Q", title=x[1], format=".3~g"),
        ],
    )  # fmt: skip
    y, zero = alt.Y("value:Q", title=meaning, scale=alt.Scale(zero=False)), alt.Scale(zero=False)
    shape = alt.Shape("rule:N", title=None, scale=alt.Scale(domain=scale["domain"], range=scale["shapes"]))
    ends = base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q", title=meaning, scale=zero), y2="high:Q")
    points = base.mark_point(size=_POINT, filled=True).encode(y=y, shape=shape)
    return _sized(alt.layer(ends, points).add_params(*parameters), data)


def curve_chart(
    rows: Sequence[Row], x: tuple[str, str], y: tuple[str, str], kind: str, *, menus: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Draw curves, a colour and a dash per kind.

    Args:
        rows: points of the curves.
        x: key and title of the x-axis.
        y: key and title of the y-axis.
        kind: key of what tells curves apart.
        menus: see `interval_chart`.
    """
    alt = _altair()
    menus = menus or {}
    data = [{"x": row[x[0]], "y": row[y[0]], "kind": row[kind], **{key: row[key] for key in menus}} for row in rows]
    parameters, conditions = _menus(data, menus)
    chart = _filtered(conditions)
    kinds = distinct(data, "kind")
    chart = chart.mark_line(interpolate="monotone", point=alt.OverlayMarkDef(size=18)).encode(
        x=alt.X("x:Q", title=x[1], scale=alt.Scale(zero=False)),
        y=alt.Y("y:Q", title=y[1]),
        order="y:Q",
        color=alt.Color("kind:N", title=None, sort=kinds, scale=alt.Scale(domain=kinds, range=_KINDS[: len(kinds)])),
        strokeDash=alt.StrokeDash("kind:N", title=None, scale=alt.Scale(domain=kinds)),
        tooltip=[
            alt.Tooltip("kind:N", title="pairs"), alt.Tooltip("x:Q", title=x[1], format=".4~g"),
            alt.Tooltip("y:Q", title=y[1], format=".2~f"),
        ],
    )  # fmt: skip
    return _sized(chart.add_params(*parameters), data)


def density_chart(
    rows: Sequence[Row], x: str, y: str, *, menus: Mapping[str, str] | None = None, diagonal: bool = False
) -> dict[str, Any]:
    """Draw how many pairs lie in each cell of a grid.

    Args:
        rows: cells as `density_rows` makes them.
        x: title of the x-axis.
        y: title of the y-axis.
        menus: see `interval_chart`.
        diagonal: draw the line on which both are equal.
    """
    alt = _altair()
    menus = menus or {}
    data = [
        {**{key: row[key] for key in ("x", "x2", "y", "y2", "pairs")}, **{k: row[k] for k in menus}} for row in rows
    ]
    parameters, conditions = _menus(data, menus)
    chart = _filtered(conditions)
    cells = chart.mark_rect().encode(
        x=alt.X("x:Q", title=x, scale=alt.Scale(zero=False, nice=False)),
        x2="x2:Q",
        y=alt.Y("y:Q", title=y, scale=alt.Scale(zero=False, nice=False)),
        y2="y2:Q",
        color=alt.Color("pairs:Q", title="pairs", scale=alt.Scale(type="log", scheme="viridis")),
        tooltip=[
            alt.Tooltip("pairs:Q", title="pairs of images"),
            *(alt.Tooltip(f"{key}:Q", title=f"{title} {end}", format=".3~g")
              for title, name in ((x, "x"), (y, "y")) for key, end in ((name, "from"), (f"{name}2", "to"))),
        ],
    )  # fmt: skip
    layers = [cells]
    if diagonal:
        line = chart.transform_aggregate(low="min(x)", high="max(x2)").mark_rule(
            strokeDash=[4, 3], strokeWidth=1.5, color="#888888"
        )
        layers.append(line.encode(x="low:Q", x2="high:Q", y="low:Q", y2="high:Q"))
    return _sized(alt.layer(*layers).add_params(*parameters), data)


# Colours of kinds of pairs, which people with any colour vision can tell apart, on white and on black.
_KINDS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def _altair() -> Any:
    """The package that draws.

    Raises:
        StorageError: it is not installed.
    """
    try:
        import altair
    except ImportError as error:
        raise StorageError(f"charts need Vega-Altair; {INSTALL}") from error
    return altair


def _menus(data: Sequence[Mapping[str, Any]], menus: Mapping[str, str]) -> tuple[list[Any], list[str]]:
    """Parameters bound to menus, and the conditions that they set."""
    alt = _altair()
    parameters, conditions = [], []
    for key, label in menus.items():
        options = list(dict.fromkeys(row[key] for row in data))
        if len(options) > 1:
            name = f"chosen_{key}"
            parameters.append(
                alt.param(name=name, value=options[0], bind=alt.binding_select(options=options, name=label))
            )
            conditions.append(f"datum.{key} === {name}")
    return parameters, conditions


def _filtered(conditions: Sequence[str]) -> Any:
    """A chart of the rows that menus choose."""
    alt = _altair()
    chart = alt.Chart(alt.NamedData(name=_ROWS))
    for condition in conditions:
        chart = chart.transform_filter(condition)
    return chart


def _rule_scale(titles: Mapping[str, str]) -> dict[str, list[str]]:
    # Factors call the semantic matching so, whichever it is.
    names = ["optimal" if name == "semantic" else name for name in titles]
    styles = rule_styles(names)
    return {
        "domain": list(titles.values()),
        "colours": [_LIGHTER.get(styles[name].colour, styles[name].colour) for name in names],
        "shapes": [_SHAPES.get(styles[name].marker, "circle") for name in names],
    }


def _sized(chart: Any, data: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The specification of a chart, with its rows beside it: Altair would check every value."""
    chart = chart.properties(width="container", height=_HEIGHT)
    chart = chart.configure_axis(
        labelFontSize=_LETTERS, titleFontSize=_LETTERS, titleFontWeight="normal", gridOpacity=0.35
    )
    chart = chart.configure_legend(
        orient="bottom", columns=3, labelLimit=280, labelFontSize=_LETTERS, titleFontSize=_LETTERS, symbolSize=_POINT
    )
    return {**chart.to_dict(), "datasets": {_ROWS: list(data)}}


def _or(value: float, other: float) -> float:
    """A value, or another one in place of NaN, which JSON does not have."""
    return other if math.isnan(value) else value


def _text(value: Any) -> Any:
    return str(value) if not isinstance(value, int | float) else value
