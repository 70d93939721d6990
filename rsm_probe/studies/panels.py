"""What the figures of sweeps share: panels with letters, names of rows, and what their numbers depend on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from rsm_probe.figures import lettered, short_names
from rsm_probe.streaming.result import SweepResult

# Size of a panel in inches, as printed, and the width of a page that panels share down to their smallest size.
_PANEL, _SMALLEST, _PAGE = 1.75, 1.25, 11.0
# Room for the names of layers below a panel in inches, and for colour bars, relative to a panel.
_BELOW, _ROOM = 0.5, 1.1
# Names of models, and letters, that fit beside a panel.
_MOST_NAMES, _LETTERS = 6, 30


def conditions(results: Mapping[str, SweepResult]) -> str:
    """What the numbers of a figure depend on: images and mini-batches, centering, and the estimator of CKA."""
    of = [result.dataset.attrs for result in results.values()]
    centerings = dict.fromkeys(str(attrs.get("centering", "None")) for attrs in of)
    centered = " and ".join("not centered" if name == "None" else f"centered by {name}" for name in centerings)
    estimators = " and ".join(dict.fromkeys(str(attrs["estimator"]) for attrs in of))
    batches = f"{of[0]['batches']} mini-batches" if of[0]["batches"] > 1 else "one mini-batch"
    return f"{of[0]['images']} images in {batches}, {centered}, {estimators} CKA"


def lettered_panels(rows: int, columns: int, title: str) -> tuple[Figure, list[list[Axes]]]:
    """A figure of lettered panels, in rows; many columns get smaller panels."""
    panel = min(_PANEL, max(_SMALLEST, _PAGE / columns))
    figure = Figure(
        figsize=(panel * _ROOM * columns + 1.2, (panel + _BELOW) * rows + 1.0),
        dpi=150,
        layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.05, compress=True),
    )
    figure.suptitle(title)
    axes = [list(line) for line in figure.subplots(rows, columns, squeeze=False)]
    lettered(ax for line in axes for ax in line)
    return figure, axes


def kernel_name(kernel: str) -> str:
    """A kernel in titles."""
    return f"{'RBF' if kernel == 'rbf' else kernel} kernel"


def averaged(name: str, models: Sequence[str], pairs: bool = False) -> str:
    """Name a row of panels after its models: the seeds that it averages over, if it has several.

    Args:
        name: what the models share, such as their architecture.
        models: their names; those that begin with `name` and a hyphen are named by the rest, which is their seed.
        pairs: whether the mean is that of all pairs of models.
    """
    if len(models) < 2:
        return name
    # The step of a checkpoint is none of its seed.
    rest = [model.partition("@")[0].removeprefix(f"{name}-") for model in models]
    seeds = all(part.isdigit() for part in rest)
    listed = [*rest[: _MOST_NAMES - 1], "…", rest[-1]] if len(rest) > _MOST_NAMES else rest
    whose = f"{'seeds' if seeds else 'models'} {', '.join(listed)}"
    count = len(models) * (len(models) - 1) // 2
    if pairs:
        return f"{name}\n" + (whose if count == 1 else f"mean of {count} pairs of {whose}")
    return f"{name}\nmean over {whose}"


def row_label(*lines: str) -> str:
    """The label of a row of panels; long lines are broken, so that they do not reach into the next row."""
    return "\n".join(part for line in lines if line for text in line.splitlines() for part in _broken(text))


def _broken(text: str) -> list[str]:
    return [text] if len(text) <= _LETTERS else wrap(text, _LETTERS)


def omitted_beginning(layers: Sequence[str]) -> str:
    """Say what the ellipsis in names of layers stands for; "" if names are whole."""
    shared = short_names(layers)[1]
    return f"… = {shared}" if shared else ""


def extremes(difference: xr.DataArray) -> str:
    """The smallest and the largest difference of a panel, in words."""
    values = difference.values[np.isfinite(difference.values)]
    return f"{values.min():+.3f} to {values.max():+.3f}" if values.size else "undefined"


def lowest_value(grids: Iterable[xr.DataArray]) -> float:
    """The lowest value of all panels of a scale, at most 0."""
    return min(0.0, *(float(np.nanmin(grid.values, initial=0.0)) for grid in grids))


def semantic_matchings(result: SweepResult) -> list[str]:
    """All matchings but the identity; none if the sweep lacks the identity."""
    matchings = list(dict.fromkeys(str(name) for name in result.cka["matching_a"].values))
    return [name for name in matchings if name != "identity"] if "identity" in matchings else []
