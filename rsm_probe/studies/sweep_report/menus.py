"""Menus of charts, and what charts of a sweep share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

# Width and height of a panel in pixels.
PANEL = 230
# Names of layers that fit at an axis of a panel.
MOST_TICKS = 20
KINDS = ("spatio-semantic", "semantic")


# Of long names of layers the end is shown, in which they differ.
_LAYER_LABEL = "length(datum.label) > 20 ? '…' + slice(datum.label, -19) : datum.label"


def layer_axis() -> alt.Axis:
    """The axis of the layers of a model."""
    return alt.Axis(labelExpr=_LAYER_LABEL, labelLimit=0, labelOverlap=True, title=None)


def menu(name: str, label: str, options: Sequence[str], value: str) -> alt.Parameter:
    """A parameter with a menu, or without one where there is nothing to choose."""
    if len(options) < 2:
        return alt.param(name=name, value=value)
    return alt.param(name=name, value=value, bind=alt.binding_select(options=list(options), name=f"{label} "))


def menus_caption(choices: Mapping[str, Sequence[str]]) -> str:
    """Say what the menus choose, in a sentence after a space; "" where there is nothing to choose."""
    *others, last = ["", *(what for what, options in choices.items() if len(options) > 1)]
    return f" Choose {', '.join(others[1:])}{' and ' if others[1:] else ''}{last} by menu." if last else ""


def beside(views: Sequence[alt.LayerChart], params: Sequence[alt.Parameter], columns: int) -> dict[str, Any]:
    """Views beside each other, as one specification.

    Altair's own `concat` copies each view several times, which takes longer than all else on the page of a small sweep.
    """
    specs = [view.to_dict() for view in views]
    shared = {key: spec[key] for spec in specs for key in ("$schema", "config")}
    datasets = {name: values for spec in specs for name, values in spec.get("datasets", {}).items()}
    own = [{key: value for key, value in spec.items() if key not in (*shared, "datasets")} for spec in specs]
    return {
        **shared, "concat": own, "columns": columns, "spacing": {"row": 36, "column": 20},
        "params": [one.param.to_dict() for one in params], "datasets": datasets,
        "resolve": {"scale": dict.fromkeys(("color", "x", "y"), "independent")},
    }  # fmt: skip


def selection(name: str, event: str, value: Sequence[Mapping[str, int]], views: Sequence[str]) -> dict[str, Any]:
    """A selection of one mark by its fields, over several views, for the parameters of a specification.

    It is written out, because Altair names and merges the selections of layered views itself.

    Args:
        name: its name in expressions, where `name.field[0]` is the value of a field.
        event: the event that selects.
        value: the fields of the mark that is selected first.
        views: names of the views.
    """
    select = {"type": "point", "fields": list(value[0]), "on": event, "clear": False, "toggle": False}
    return {"name": name, "select": select, "value": list(value), "views": list(views)}


def view_names(spec: Any) -> list[str]:
    """Names of all views of a specification."""
    parts = [part for key in ("concat", "layer") for part in spec.get(key, ())]
    return [*([spec["name"]] if "name" in spec else []), *(name for part in parts for name in view_names(part))]
