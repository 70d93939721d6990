"""Figures: draw results on matplotlib Axes.

Functions draw on the Axes they are given and return it; none computes results or saves files.
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.figures.curves import common_legend, diagonal_plot, interval_plot, panel_letter
    from rsm_probe.figures.densities import distributions, joint_density, spreads
    from rsm_probe.figures.heatmaps import DIVERGING, SEQUENTIAL, cka_heatmap, difference_heatmap, rsm_heatmap
    from rsm_probe.figures.pictures import displayed, matched_locations, picture
    from rsm_probe.figures.style import names_as_written
    from rsm_probe.figures.ticks import thinned
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "DIVERGING",
    "SEQUENTIAL",
    "cka_heatmap",
    "common_legend",
    "diagonal_plot",
    "difference_heatmap",
    "displayed",
    "distributions",
    "interval_plot",
    "joint_density",
    "matched_locations",
    "names_as_written",
    "panel_letter",
    "picture",
    "rsm_heatmap",
    "spreads",
    "thinned",
]
