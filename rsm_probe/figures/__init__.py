"""Results -> matplotlib Axes.

Nothing here computes or saves; every function draws on the Axes it is given and returns it.
"""

from rsm_probe.figures.curves import common_legend, diagonal_plot, interval_plot, panel_letter
from rsm_probe.figures.distributions import distributions, joint_density, spreads
from rsm_probe.figures.heatmaps import DIVERGING, SEQUENTIAL, cka_heatmap, difference_heatmap, rsm_heatmap
from rsm_probe.figures.pictures import matched_locations, picture

__all__ = [
    "DIVERGING",
    "SEQUENTIAL",
    "cka_heatmap",
    "common_legend",
    "diagonal_plot",
    "difference_heatmap",
    "distributions",
    "interval_plot",
    "joint_density",
    "matched_locations",
    "panel_letter",
    "picture",
    "rsm_heatmap",
    "spreads",
]
