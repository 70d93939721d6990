"""How well RSMs explain those of several subjects: bars with intervals against the noise ceiling."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.transforms import ScaledTranslation

from rsm_probe.figures.line_styles import rule_styles
from rsm_probe.figures.style import font_points, labelled
from rsm_probe.figures.ticks import name_layers

# What the two notions of similarity are called.
NOTIONS: Mapping[str, str] = {"identity": "spatio-semantic", "optimal": "semantic"}
# Share of the distance between two layers that their bars take together, and the white in the colour of a bar, before
# which its interval stays visible.
_SHARE, _WHITE = 0.84, 0.45
# Hatches of the kernels of a panel.
_HATCHES = ("", "////", "....", "xxxx", "++++", "oooo")
# Points from the end of an interval to the first mark above it, and from there to the second.
_FIRST, _NEXT = 3.2, 3.8
# Size of letters in legends of printed figures, in points.
_PRINTED = 6.0
# Room for marks above the highest bar, as a share of the panel.
_ROOM = 0.2


def ceiling_bars(
    ax: Axes,
    evaluation: xr.Dataset,
    title: str = "",
    meaning: str = "",
    *,
    titles: Mapping[str, str] | None = None,
    best: str | None = None,
    tied: Collection[str] = (),
) -> Axes:
    """Draw bars of layers with their intervals against the noise ceiling, as papers on brains and models print them.

    Layers stand side by side in their order, with a bar for each notion of similarity (matching). The grey band is the
    noise ceiling. A dot above a bar says that the RSM explains the subjects better than chance, a hollow triangle that
    it stays below the lower noise ceiling, both after correction for the number of RSMs. A star marks the best RSM, and
    dashes mark those that cannot be told apart from it.

    Args:
        ax: Axes to draw on.
        evaluation: what `rsm_probe.brains.evaluate` returns, or some of its RSMs: variables `mean`, `low`, `high`,
            `p_corrected` and `p_ceiling_corrected` (rsm), `ceiling_low` and `ceiling_high`, with coordinates model,
            layer, matching and kernel, and the attribute `level`.
        title: title of the panel.
        meaning: label of the values.
        titles: matching -> its name in the legend; by default "spatio-semantic" and "semantic" for the two notions.
        best: label of the best RSM; None for none.
        tied: labels of RSMs that cannot be told apart from the best.
    """
    names, models, layers, matchings, kernels = (
        [str(value) for value in evaluation[key].values] for key in ("rsm", "model", "layer", "matching", "kernel")
    )
    groups = list(dict.fromkeys(zip(models, layers, strict=True)))
    kinds = list(dict.fromkeys(zip(matchings, kernels, strict=True)))
    position = {group: number for number, group in enumerate(groups)}
    width = _SHARE / max(1, len(kinds))
    x = np.array(
        [
            position[model, layer] + (kinds.index((matching, kernel)) - (len(kinds) - 1) / 2) * width
            for model, layer, matching, kernel in zip(models, layers, matchings, kernels, strict=True)
        ]
    )
    mean = evaluation["mean"].values
    # Where there is no interval, a line of no length.
    low, high = (np.where(np.isnan(end), mean, end) for end in (evaluation["low"].values, evaluation["high"].values))
    ceiling = [float(evaluation[f"ceiling_{end}"]) for end in ("low", "high")]
    if np.isfinite(ceiling).all():
        ax.axhspan(*ceiling, facecolor="0.85", edgecolor="0.6", linewidth=0.5, zorder=0, label="noise ceiling")
    ax.axhline(0, color="black", linewidth=0.6, zorder=1)
    _bars(ax, x, mean, width, list(zip(matchings, kernels, strict=True)), {**NOTIONS, **(titles or {})})
    ax.errorbar(
        x, mean, yerr=[mean - low, high - mean], fmt="none", ecolor="black", elinewidth=0.6,
        capsize=min(1.5, 9 * width), capthick=0.6, zorder=3,
    )  # fmt: skip
    _limits(ax, [mean, low, high, np.array(ceiling)])
    error = 1 - float(evaluation.attrs["level"])
    above = evaluation["p_corrected"].values <= error + 1e-12
    # The test against the ceiling has two sides.
    below = (evaluation["p_ceiling_corrected"].values <= error + 1e-12) & (mean < ceiling[0])
    tops = np.fmax(high, 0)
    _mark(ax, x[above], tops[above], _FIRST, "above chance", marker="o")
    _mark(ax, x[below], tops[below], _FIRST + _NEXT * above[below], "below the noise ceiling", marker="v", hollow=True)
    # Above the other marks of a bar.
    height = _FIRST + _NEXT * (above.astype(float) + below)
    tie = np.array([name in tied and name != best for name in names])
    _mark(ax, x[tie], tops[tie], height[tie], "not told apart from the best", marker="_", s=9.0, linewidths=0.8)
    first = np.array([name == best for name in names])
    _mark(ax, x[first], tops[first], height[first] + 1, "best", marker="*", s=18.0, linewidths=0.3)
    many = len(set(models)) > 1
    name_layers(ax.xaxis, [f"{model}, {layer}" if many else layer for model, layer in groups], rotation=90)
    ax.set_xlim(-0.6, len(groups) - 0.4)
    return labelled(ax, title, y=meaning)


def _bars(
    ax: Axes,
    x: np.ndarray,
    mean: np.ndarray,
    width: float,
    kinds: Sequence[tuple[str, str]],
    titles: Mapping[str, str],
) -> None:
    """Draw the bars of each matching in its colour, and those of each kernel with a hatch of its own."""
    styles, distinct = rule_styles(matching for matching, _ in kinds), list(dict.fromkeys(kinds))
    kernels = list(dict.fromkeys(kernel for _, kernel in distinct))
    for matching, kernel in distinct:
        mine = [kind == (matching, kernel) for kind in kinds]
        named = [titles.get(matching, matching), kernel if len(kernels) > 1 else ""]
        ax.bar(
            x[mine],
            mean[mine],
            0.94 * width,
            facecolor=[_WHITE + (1 - _WHITE) * part for part in to_rgb(styles[matching].colour)],
            edgecolor=styles[matching].colour,
            linewidth=0.5,
            hatch=_HATCHES[kernels.index(kernel) % len(_HATCHES)],
            label=", ".join(part for part in named if part) or "RSM",
            zorder=2,
        )


def _limits(ax: Axes, parts: Sequence[np.ndarray]) -> None:
    """Make room for the marks above the bars."""
    values = np.concatenate([[0.0], *parts])
    values = values[np.isfinite(values)]
    low, high = values.min(), values.max()
    span = high - low or 1.0
    ax.set_ylim(low - 0.04 * span if low < 0 else 0, low + span * (1 + _ROOM))


def _scale() -> float:
    """How much larger text is than in print, for which marks are sized."""
    return font_points("legend.fontsize") / _PRINTED


def _mark(
    ax: Axes, x: np.ndarray, y: np.ndarray, points: float | np.ndarray, label: str, *, hollow: bool = False, **look: Any
) -> None:
    """Draw marks some points above values."""
    scale = _scale()
    colours = {"facecolor": "white", "edgecolor": "black"} if hollow else {"color": "black"}
    options: dict[str, Any] = {"s": 5.0, "linewidths": 0.5, "zorder": 4, **colours, **look}
    options["s"] *= scale**2
    distances = np.broadcast_to(points, x.shape)
    for distance in np.unique(distances):
        mine = distances == distance
        lifted = ax.transData + ScaledTranslation(0, scale * distance / 72, ax.figure.dpi_scale_trans)
        ax.scatter(x[mine], y[mine], label=label, transform=lifted, **options)
