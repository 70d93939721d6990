"""Text in figures: labels of a panel, and names drawn as written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib.axes import Axes


@contextmanager
def names_as_written() -> Iterator[None]:
    """Draw text made within letter by letter; also a decorator.

    Names of models, layers and labels may hold what Matplotlib reads as mathematics, such as two dollar signs. As
    mathematics they lose letters, or raise when the figure is saved.
    """
    with mpl.rc_context({"text.parse_math": False}):
        yield


def labelled(ax: Axes, title: str, x: str = "", y: str = "") -> Axes:
    """Set title and axis labels of a panel; an empty label leaves its axis as it is."""
    ax.set_title(title)
    ax.set(**{name: text for name, text in (("xlabel", x), ("ylabel", y)) if text})
    return ax
