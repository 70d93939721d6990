"""What the figures of sweeps share: panels with letters, colour bars, and what their numbers depend on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from string import ascii_uppercase
from typing import Any

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from rsm_probe.figures import panel_letter
from rsm_probe.streaming.result import SweepResult

# Size of a panel in inches, as printed.
_PANEL = 1.75


def conditions(results: Mapping[str, SweepResult]) -> str:
    """What the numbers of a figure depend on: images and mini-batches, centering, and the estimator of CKA."""
    of = [result.dataset.attrs for result in results.values()]
    centerings = dict.fromkeys(str(attrs.get("centering", "None")) for attrs in of)
    centered = " and ".join("not centered" if name == "None" else f"centered by {name}" for name in centerings)
    estimators = " and ".join(dict.fromkeys(str(attrs["estimator"]) for attrs in of))
    batches = f"{of[0]['batches']} mini-batches" if of[0]["batches"] > 1 else "one mini-batch"
    return f"{of[0]['images']} images in {batches}, {centered}, {estimators} CKA"


def print_style() -> AbstractContextManager[None]:
    """Font sizes and line widths for the printed size."""
    sizes = {"font.size": 7, "axes.titlesize": 7, "axes.labelsize": 6.5, "figure.titlesize": 8, "legend.fontsize": 5.5}
    style: dict[Any, Any] = {**sizes, "xtick.labelsize": 5.5, "ytick.labelsize": 5.5, "lines.linewidth": 1.2}
    style["text.parse_math"] = False  # names may contain any character
    return mpl.rc_context(style)


def lettered_panels(rows: int, columns: int, title: str) -> tuple[Figure, list[list[Axes]]]:
    """A figure of lettered panels, in rows."""
    size = (_PANEL * columns + 1.0, _PANEL * rows + 0.7)
    figure = Figure(figsize=size, dpi=150, layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.05))
    figure.suptitle(title)
    axes = [list(line) for line in figure.subplots(rows, columns, squeeze=False)]
    for k, ax in enumerate(ax for line in axes for ax in line):
        panel_letter(ax, ascii_uppercase[k] if k < 26 else f"{ascii_uppercase[k // 26 - 1]}{ascii_uppercase[k % 26]}")
    return figure, axes


def shared_bar(figure: Figure, axes: Sequence[Sequence[Axes]], source: Axes, meaning: str) -> None:
    """Draw one colour bar for all panels of a scale, beside them."""
    panels = [ax for line in axes for ax in line]
    figure.colorbar(source.images[0], ax=panels, shrink=0.8, aspect=20, pad=0.02, fraction=0.04, label=meaning)


def lowest_value(grids: Iterable[xr.DataArray]) -> float:
    """The lowest value of all panels of a scale, at most 0."""
    return min(0.0, *(float(np.nanmin(grid.values, initial=0.0)) for grid in grids))


def semantic_matchings(result: SweepResult) -> list[str]:
    """All matchings but the identity; none if the sweep lacks the identity."""
    matchings = list(dict.fromkeys(str(name) for name in result.cka["matching_a"].values))
    return [name for name in matchings if name != "identity"] if "identity" in matchings else []
