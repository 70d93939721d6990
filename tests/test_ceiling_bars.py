"""Bars of layers against the noise ceiling: what is drawn where, and that many layers stay readable."""

from itertools import pairwise

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from rsm_probe import figures


def evaluated(layers=3, models=("net",), matchings=("identity", "optimal"), kernels=("cosine",), **changes):
    """An evaluation as `rsm_probe.brains.evaluate` returns it, with means 0.1, 0.2, ... of unlike RSMs."""
    keys = [
        (model, f"layer{k}", k, matching, kernel)
        for model in models
        for k in range(layers)
        for matching in matchings
        for kernel in kernels
    ]
    mean = changes.get("mean", 0.1 + 0.6 * np.arange(len(keys)) / len(keys))
    values = {
        "mean": mean, "low": mean - 0.05, "high": mean + 0.05, "p_corrected": np.full(len(keys), 0.01),
        "p_ceiling_corrected": np.full(len(keys), 0.5), **changes,
    }  # fmt: skip
    names = ("model", "layer", "depth", "matching", "kernel")
    return xr.Dataset(
        {
            **{name: ("rsm", value) for name, value in values.items() if not name.startswith("ceiling")},
            "ceiling_low": changes.get("ceiling_low", 0.6),
            "ceiling_high": changes.get("ceiling_high", 0.7),
        },
        coords={
            "rsm": ["/".join(str(part) for n, part in enumerate(key) if n != 2) for key in keys],
            **{name: ("rsm", [key[k] for key in keys]) for k, name in enumerate(names)},
        },
        attrs={"level": 0.95, "measure": "rsa-spearman"},
    )


def panel(evaluation, size=(3.4, 2.2), **options):
    figure = Figure(figsize=size, layout="constrained")
    ax = figures.ceiling_bars(figure.subplots(), evaluation, **options)
    FigureCanvasAgg(figure).draw()
    return ax


def marks(ax, label):
    """The x positions of the marks of a kind."""
    of_kind = [c for c in ax.collections if isinstance(c, PathCollection) and c.get_label() == label]
    return sorted(round(float(x), 6) for c in of_kind for x in c.get_offsets()[:, 0])


def bars(ax):
    return [bar for container in ax.containers if hasattr(container, "patches") for bar in container.patches]


def test_a_bar_per_rsm_stands_at_its_layer_and_notions_stand_side_by_side():
    evaluation = evaluated()
    ax = panel(evaluation)
    heights = {}
    for container in ax.containers:
        if hasattr(container, "patches"):
            for bar in container.patches:
                layer = round(bar.get_x() + bar.get_width() / 2)
                heights[f"layer{layer}", container.get_label()] = bar.get_height()
    titles = {"identity": "spatio-semantic", "optimal": "semantic"}
    keys = zip(evaluation["layer"].values, evaluation["matching"].values, strict=True)
    expected = {(str(a), titles[str(b)]): m for (a, b), m in zip(keys, evaluation["mean"].values, strict=True)}
    assert heights == pytest.approx(expected)
    ends = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars(ax))
    assert all(right <= left + 1e-9 for (_, right), (left, _) in pairwise(ends))


def test_marks_say_what_the_tests_say():
    p = np.array([0.01, 0.2, np.nan, 0.05, 0.01, 0.01])
    below = np.array([0.01, 0.01, 0.01, 0.2, np.nan, 0.01])
    mean = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.9])
    ax = panel(evaluated(mean=mean, p_corrected=p, p_ceiling_corrected=below))
    centre = np.array([bar.get_x() + bar.get_width() / 2 for bar in bars(ax)])
    at = {round(float(h.get_height()), 3): round(float(x), 6) for x, h in zip(centre, bars(ax), strict=True)}
    assert marks(ax, "above chance") == [at[0.1], at[0.4], at[0.5], at[0.9]]
    # The last differs from the ceiling, and lies above it.
    assert marks(ax, "below the noise ceiling") == [at[0.1], at[0.2], at[0.3]]


def test_the_best_and_those_like_it_are_marked():
    evaluation = evaluated()
    names = [str(name) for name in evaluation["rsm"].values]
    ax = panel(evaluation, best=names[5], tied={names[3], names[5]})
    assert len(marks(ax, "best")) == 1
    assert len(marks(ax, "not told apart from the best")) == 1
    assert round(marks(ax, "best")[0]) == 2
    assert round(marks(ax, "not told apart from the best")[0]) == 1
    assert not marks(panel(evaluation), "best")


def test_marks_stay_within_the_panel_and_clear_of_each_other():
    evaluation = evaluated(p_ceiling_corrected=np.full(6, 0.01), ceiling_low=0.65)
    ax = panel(evaluation, best=str(evaluation["rsm"].values[5]))
    points = []
    for collection in ax.collections:
        if isinstance(collection, PathCollection):
            points += collection.get_offset_transform().transform(collection.get_offsets()).tolist()
    box = ax.get_window_extent()
    assert len(points) == 13
    assert all(box.contains(x, y) for x, y in points)
    distances = [abs(a[1] - b[1]) for a in points for b in points if a != b and abs(a[0] - b[0]) < 1]
    assert min(distances) * 72 / ax.figure.dpi > 3


def test_without_a_ceiling_there_is_no_band_and_without_values_no_bar():
    with_band, without = panel(evaluated()), panel(evaluated(ceiling_low=np.nan, ceiling_high=np.nan))
    assert "noise ceiling" in with_band.get_legend_handles_labels()[1]
    assert "noise ceiling" not in without.get_legend_handles_labels()[1]
    nothing = np.full(6, np.nan)
    ax = panel(evaluated(mean=nothing, low=nothing, high=nothing, p_corrected=nothing))
    assert not marks(ax, "above chance")
    assert np.isfinite(ax.get_ylim()).all()


def test_negative_means_are_drawn_below_zero():
    mean = np.linspace(-0.2, 0.3, 6)
    ax = panel(evaluated(mean=mean, low=mean - 0.05, high=mean + 0.05))
    assert ax.get_ylim()[0] < -0.25


def test_kernels_have_hatches_and_names_of_their_own():
    ax = panel(evaluated(kernels=("cosine", "rbf")))
    named = ax.get_legend_handles_labels()[1]
    assert {"semantic, cosine", "semantic, rbf", "spatio-semantic, rbf"} <= set(named)
    assert len({bar.get_hatch() for bar in bars(ax)}) == 2


def test_forty_eight_layers_have_thinned_names_that_do_not_overlap():
    ax = panel(evaluated(layers=48), size=(7.0, 2.4))
    boxes = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
    assert 10 < len(boxes) <= 48
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    assert len(bars(ax)) == 96
    assert min(bar.get_window_extent().width for bar in bars(ax)) * 72 / ax.figure.dpi > 2
