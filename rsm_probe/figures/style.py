"""Text in figures: panel labels, and names drawn verbatim."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib.axes import Axes


@contextmanager
def names_as_written() -> Iterator[None]:
    """Draw text verbatim, without Matplotlib's math parsing; a context manager and a decorator.

    Names of models, layers and labels may contain math markup, such as two dollar signs. Parsed as math, they lose
    letters or raise an error when the figure is saved.
    """
    with mpl.rc_context({"text.parse_math": False}):
        yield


def labelled(ax: Axes, title: str, x: str = "", y: str = "") -> Axes:
    """Set the title and axis labels of a panel; an empty label leaves its axis unchanged."""
    ax.set_title(title)
    ax.set(**{name: text for name, text in (("xlabel", x), ("ylabel", y)) if text})
    return ax
