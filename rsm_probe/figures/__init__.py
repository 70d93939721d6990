"""Figures: draw results on matplotlib Axes.

Functions draw on the Axes they are given and return it; none computes results or saves files.
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.figures.ceilings import ceiling_bars
    from rsm_probe.figures.curves import common_legend, diagonal_plot, interval_plot
    from rsm_probe.figures.densities import distributions, joint_density, share_counts, spreads
    from rsm_probe.figures.heatmaps import (
        DIVERGING,
        SEQUENTIAL,
        beyond,
        cka_heatmap,
        colour_bar,
        difference_heatmap,
        rsm_heatmap,
        rsm_scale,
        symmetric,
        tall_bar,
    )
    from rsm_probe.figures.line_styles import RuleStyle, rule_styles
    from rsm_probe.figures.pictures import boxes, displayed, matched_locations, picture
    from rsm_probe.figures.style import COLOURS, lettered, names_as_written, panel_letter, print_style
    from rsm_probe.figures.ticks import short_names, thinned
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "COLOURS",
    "DIVERGING",
    "SEQUENTIAL",
    "RuleStyle",
    "beyond",
    "boxes",
    "ceiling_bars",
    "cka_heatmap",
    "colour_bar",
    "common_legend",
    "diagonal_plot",
    "difference_heatmap",
    "displayed",
    "distributions",
    "interval_plot",
    "joint_density",
    "lettered",
    "matched_locations",
    "names_as_written",
    "panel_letter",
    "picture",
    "print_style",
    "rsm_heatmap",
    "rsm_scale",
    "rule_styles",
    "share_counts",
    "short_names",
    "spreads",
    "symmetric",
    "tall_bar",
    "thinned",
]
