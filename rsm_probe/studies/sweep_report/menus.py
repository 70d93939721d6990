"""Menus of charts, and what charts of a sweep share."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

# Width and height of a panel in pixels.
PANEL = 230
KINDS = ("spatio-semantic", "semantic")


def menu(name: str, label: str, options: Sequence[str], value: str) -> alt.Parameter:
    """A parameter with a menu, or without one where there is nothing to choose."""
    if len(options) < 2:
        return alt.param(name=name, value=value)
    return alt.param(name=name, value=value, bind=alt.binding_select(options=list(options), name=f"{label} "))
