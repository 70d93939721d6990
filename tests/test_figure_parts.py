"""The parts of figures: where points lie, which ticks are named, which panels share a scale."""

from itertools import pairwise

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rsm_probe import figures
from rsm_probe.figures import lettered, print_style, rule_styles, short_names
from rsm_probe.matching import matching_names


def drawn(figure):
    FigureCanvasAgg(figure).draw()
    return figure


def interval_panel(positions, count=5, **options):
    lines = {f"rule {k}": [(0.1 * k, 0.1 * k - 0.05, 0.1 * k + 0.05)] * len(positions) for k in range(count)}
    figure = Figure(figsize=(3, 2), layout="constrained")
    ax = figure.subplots()
    figures.interval_plot(ax, positions, lines, **options)
    return drawn(figure), ax


@pytest.mark.parametrize("positions", [["a", "b"], [49, 196, 784]])
def test_points_lie_at_their_position_and_are_drawn_a_few_points_aside(positions):
    figure, ax = interval_panel(positions)
    x = [0, 1] if positions[0] == "a" else positions
    middle = ax.transData.transform([(x[0], 0)])[0, 0]
    asides = []
    for container in ax.containers:
        line, caps, bars = container
        assert line.get_xdata().tolist() == x
        shown = line.get_transform().transform(line.get_xydata())[0, 0]
        asides.append((shown - middle) / figure.dpi * 72)
        # Caps and bars go along with the points.
        for part in (*caps, *bars):
            ends = part.get_xydata() if hasattr(part, "get_xydata") else part.get_segments()[0]
            np.testing.assert_allclose(part.get_transform().transform(ends)[0, 0], shown)
    np.testing.assert_allclose(asides, [-6, -3, 0, 3, 6], atol=0.01)
    # The axes include all values, whatever the offset.
    low, high = ax.get_ylim()
    assert low < -0.05
    assert high > 0.45


def test_many_lines_at_many_positions_stay_with_their_own():
    _, ax = interval_panel([f"model {k}" for k in range(15)], count=8)
    first, second = ax.transData.transform([(0, 0), (1, 0)])[:, 0]
    last = ax.containers[-1][0]
    aside = last.get_transform().transform(last.get_xydata())[0, 0] - first
    assert 0 < aside < 0.4 * (second - first)


def test_numbers_have_a_logarithmic_axis_and_ticks_of_their_own():
    _, ax = interval_panel([49, 196, 784])
    at = ax.transData.transform([(x, 0) for x in (49, 196, 784)])[:, 0]
    assert at[1] - at[0] == pytest.approx(at[2] - at[1])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["49", "196", "784"]
    assert not [tick for tick in ax.xaxis.get_minor_ticks() if tick.label1.get_text()]


def test_positions_without_an_order_are_not_joined():
    _, ax = interval_panel(["a", "b"], joined=False)
    assert {container[0].get_linestyle() for container in ax.containers} == {"None"}


def test_every_rule_has_a_style_of_its_own():
    names = [*matching_names(), "pooled", "max", "gem", "class-token", *(f"batch-optimal-{b}" for b in (128, 256, 512))]
    styles = rule_styles(names)
    assert len(set(styles.values())) == len(names)
    # What else is in a figure changes nothing.
    assert rule_styles(["gem", "optimal"]) == {"gem": styles["gem"], "optimal": styles["optimal"]}
    others = rule_styles(["optimal", "mine", "yours"])
    assert len(set(others.values())) == 3


def grid_of(layers, seed=0):
    values = np.random.default_rng(seed).uniform(size=(len(layers), len(layers)))
    return xr.DataArray(values, dims=("layer_a", "layer_b"), coords={"layer_a": layers, "layer_b": layers})


@pytest.mark.parametrize("count", [1, 2, 17, 100])
def test_the_first_and_the_last_layer_are_named(count):
    layers = [f"blocks.{k}" for k in range(count)]
    with print_style():
        figure = Figure(figsize=(1.75, 1.75))
        ax = figures.cka_heatmap(figure.subplots(), grid_of(layers))
    for axis in (ax.xaxis, ax.yaxis):
        texts = [label.get_text() for label in axis.get_ticklabels()]
        assert (texts[0], texts[-1]) == (layers[0], layers[-1])
        assert len(set(texts)) == len(texts) <= 20
    boxes = [label.get_window_extent() for label in drawn(figure).axes[0].get_yticklabels()]
    assert all(below.y1 <= above.y0 + 1 for below, above in pairwise(boxes)), "names do not overlap"
    # A smaller panel has fewer names, when it is drawn.
    figure.set_size_inches(0.9, 0.9)
    fewer = [label.get_text() for label in drawn(figure).axes[0].get_yticklabels()]
    assert (fewer[0], fewer[-1]) == (layers[0], layers[-1])
    assert len(fewer) < len(texts) or len(texts) <= 2


@pytest.mark.parametrize(
    ("names", "expected", "shared"),
    [
        (["layer1.0", "layer4.1"], ["layer1.0", "layer4.1"], ""),
        (
            [f"vision_model.encoder.layers.{k}" for k in (0, 11)],
            ["…0", "…11"],
            "vision_model.encoder.layers.",
        ),
        (
            ["encoder.layers.0.attention", "encoder.layers.10.multilayer_perceptron"],
            ["…0.attention", "…10.multi…perceptron"],
            "encoder.layers.",
        ),
        (["one_very_long_name_without_components"], ["one_very_…components"], ""),
        # Names that shortening would make equal stay whole.
        (
            ["a" * 15 + "bcd" + "e" * 15, "a" * 15 + "dcb" + "e" * 15],
            ["a" * 15 + "bcd" + "e" * 15, "a" * 15 + "dcb" + "e" * 15],
            "",
        ),
        (["tower.x.y.one_long_name", "tower.x.y"], ["…y.one_long_name", "…y"], "tower.x."),
    ],
)
def test_long_names_of_layers_are_shortened(names, expected, shared):
    assert short_names(names) == (expected, shared)


def test_differences_have_0_in_the_middle_of_their_scale():
    grid = grid_of(["a", "b"]) - 0.9
    ax = figures.difference_heatmap(Figure().subplots(), grid)
    norm = ax.images[0].norm
    assert -norm.vmin == norm.vmax == pytest.approx(np.abs(grid.values).max())
    both = figures.symmetric([grid, grid * 3])
    assert both.vmax == pytest.approx(3 * norm.vmax)
    nothing = figures.symmetric([grid * np.nan])
    assert -nothing.vmin == nothing.vmax > 0


def test_a_colour_bar_is_as_high_as_its_panel():
    figure = Figure(figsize=(7, 3), layout="constrained")
    panels = list(figure.subplots(1, 2))
    for ax in panels:
        figures.cka_heatmap(ax, grid_of(["a", "b", "c"]), bar=False)
    beside = figures.colour_bar(panels[1], "CKA")
    drawn(figure)
    panel, bar = panels[1].get_window_extent(), beside.get_window_extent()
    assert (bar.y0, bar.y1) == pytest.approx((panel.y0, panel.y1), abs=0.5)
    assert panel.x1 < bar.x0 < panel.x1 + 0.1 * panel.width
    # It belongs to the panel, and takes nothing of it.
    assert panel.width == pytest.approx(panels[0].get_window_extent().width, abs=0.5)


def test_a_tall_bar_reaches_from_the_first_panel_to_the_last():
    figure = Figure(figsize=(4, 5), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1, 0.06])
    panels = [figure.add_subplot(grid[k, 0]) for k in range(2)]
    rsms = [np.eye(4) * k + np.random.default_rng(k).uniform(size=(4, 4)) for k in (1, 2)]
    norm = figures.rsm_scale(rsms)
    for ax, rsm in zip(panels, rsms, strict=True):
        figures.rsm_heatmap(ax, rsm, [], norm=norm, bar=False)
        assert ax.images[0].norm is norm
    assert figures.beyond(rsms, norm) == "max", "the diagonals are above all others"
    beside = figures.tall_bar(panels, figure.add_subplot(grid[:, 1]), "similarity")
    drawn(figure)
    bar = beside.get_window_extent()
    ends = panels[1].get_window_extent().y0, panels[0].get_window_extent().y1
    assert (bar.y0, bar.y1) == pytest.approx(ends, abs=0.5)


def test_rsms_name_the_first_and_the_last_of_many_classes():
    labels = [f"c{k:03d}" for k in range(100)]
    with print_style():
        ax = figures.rsm_heatmap(Figure().subplots(), np.eye(100), labels)
    texts = [label.get_text() for label in ax.get_xticklabels()]
    assert (texts[0], texts[-1]) == ("c000", "c099")
    assert ax.get_xticklabels()[0].get_fontsize() >= 5


def test_panels_get_letters_beyond_z():
    axes = list(Figure().subplots(4, 7).flat)
    lettered(iter(axes))
    letters = [ax.get_title(loc="left") for ax in axes]
    assert (letters[0], letters[25], letters[26], letters[27]) == ("(a)", "(z)", "(aa)", "(ab)")


def test_a_legend_has_the_lines_of_all_panels_in_rows_that_fit():
    figure = Figure(figsize=(2, 2), layout="constrained")
    for k, ax in enumerate(figure.subplots(1, 2)):
        figures.interval_plot(ax, ["a"], {f"a rule with a long name {k + n}": [(0, 0, 0)] for n in range(2)})
    with print_style():
        figures.common_legend(figure)
    drawn(figure)
    (legend,) = figure.legends
    assert [text.get_text()[-1] for text in legend.get_texts()] == ["0", "1", "2"]
    assert legend.get_window_extent().width < figure.bbox.width


def test_joint_densities_share_their_counts_and_show_numbers(tmp_path):
    rng = np.random.default_rng(0)
    with print_style():
        figure = Figure(figsize=(4, 2), layout="constrained")
        panels = list(figure.subplots(1, 2))
        for ax, spread in zip(panels, (0.1, 1.0), strict=True):
            x = rng.normal(size=2000) * spread
            figures.joint_density(ax, x, x * 0.5, line=True)
            # A narrow cloud has hexagons that can be seen.
            assert ax.get_xlim() == pytest.approx(ax.get_ylim())
        figures.share_counts(panels)
        beside = figures.colour_bar(panels[1], "pairs")
        figure.savefig(tmp_path / "figure.png")
    one, other = (ax.collections[-1].norm for ax in panels)
    assert one is other
    assert one.vmax == max(ax.collections[-1].get_array().max() for ax in panels)
    assert "100" in [label.get_text() for label in beside.get_yticklabels()]
    assert not any("mathdefault" in label.get_text() for label in beside.get_yticklabels())


def test_boxes_lie_on_the_pixels_of_a_picture():
    ax = figures.picture(Figure().subplots(), np.zeros((10, 20, 3)), framed=True, colour="#0072B2", line="--")
    figures.boxes(ax, [(0, 2, 5, 10)], "#0072B2", "--", fill=0.2)
    area, _, outline = ax.patches
    left, _, _, top = ax.images[0].get_extent()
    assert (left, top) == (-0.5, -0.5)
    for box in (area, outline):
        assert (box.get_x() - left, box.get_y() - top, box.get_width(), box.get_height()) == (0, 2, 5, 8)
    assert ax.spines["left"].get_linestyle() == "--"
