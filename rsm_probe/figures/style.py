"""Text in figures: print sizes, panel labels, and names drawn verbatim."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from string import ascii_lowercase
from typing import Any, Literal

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties

# Colours that readers with a colour vision deficiency tell apart (Okabe and Ito, 2008), without the yellow that is
# lost on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Font sizes in points and line widths, for figures printed at their own size.
_PRINTED: dict[Any, Any] = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 6.5,
    "axes.linewidth": 0.6,
    "axes.prop_cycle": cycler(color=COLOURS),
    "figure.titlesize": 8,
    "legend.fontsize": 6,
    "legend.frameon": False,
    "lines.linewidth": 1.0,
    "lines.markersize": 3.5,
    "xtick.labelsize": 5.5,
    "ytick.labelsize": 5.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
}


@contextmanager
def names_as_written() -> Iterator[None]:
    """Draw text verbatim, without Matplotlib's math parsing; a context manager and a decorator.

    Names of models, layers and labels may contain math markup, such as two dollar signs. Parsed as math, they lose
    letters or raise an error when the figure is saved.
    """
    with mpl.rc_context({"text.parse_math": False}):
        yield


@contextmanager
def print_style() -> Iterator[None]:
    """Draw at the size of print: small fonts, thin lines, names verbatim; a context manager and a decorator."""
    with mpl.rc_context(_PRINTED), names_as_written():
        yield


def font_points(key: Literal["xtick.labelsize", "ytick.labelsize", "legend.fontsize"]) -> float:
    """The font size of a setting of Matplotlib in points."""
    return float(FontProperties(size=mpl.rcParams[key]).get_size_in_points())


def axes_or_new(ax: Axes | None) -> Axes:
    """Return the Axes given, or those of a new figure, which a notebook shows by itself."""
    if ax is None:
        from matplotlib import pyplot

        return pyplot.figure(layout="constrained").add_subplot()
    return ax


def labelled(ax: Axes, title: str, x: str = "", y: str = "") -> Axes:
    """Set the title and axis labels of a panel; an empty label leaves its axis unchanged."""
    ax.set_title(title)
    ax.set(**{name: text for name, text in (("xlabel", x), ("ylabel", y)) if text})
    return ax


def panel_letter(ax: Axes, letter: str) -> Axes:
    """Put a bold letter at the upper left of a panel, so that a text can refer to it."""
    ax.set_title(letter, loc="left", fontweight="bold", x=-0.03, ha="right")
    return ax


def lettered(panels: Iterable[Axes]) -> None:
    """Put (a), (b), ... (z), (aa), ... at the panels, in their order."""
    for k, ax in enumerate(panels):
        panel_letter(ax, f"({ascii_lowercase[k // 26 - 1] if k >= 26 else ''}{ascii_lowercase[k % 26]})")
