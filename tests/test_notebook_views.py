"""What a notebook shows of results: tables whose names are text and never markup, and one-line figures."""

import re
import warnings
from collections import OrderedDict
from html.parser import HTMLParser

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import nn

import rsm_probe
from rsm_probe import RSM, Probe, match
from rsm_probe.errors import ComparisonError, MatchingError
from rsm_probe.html_table import html_table
from rsm_probe.sources import ImageSet, load_model

# A name of everything: a model, a layer, an image, a label.
SCRIPT = "<script>alert('1')</script>&amp;$x$"
LAYERS = [SCRIPT, *(f"conv{k}" for k in range(1, 15))]


class Reader(HTMLParser):
    """Tags, attributes, and cells of a table as texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.rows: list[list[str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open.append(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def views(tmp_path_factory) -> dict[str, object]:
    """An object of each class; models, layers, images and labels have hostile names, and layers are many."""
    torch.manual_seed(0)
    images = torch.rand(12, 3, 6, 6)
    labels = [SCRIPT if k % 2 else "cat" for k in range(12)]
    named = ImageSet("own", [f"{SCRIPT}{k}" for k in range(12)], images.__getitem__, labels)
    model = nn.Sequential(OrderedDict((name, nn.Conv2d(3, 3, 3, padding=1)) for name in LAYERS)).eval()
    with torch.no_grad(), Probe(model, LAYERS) as probe:
        model(images)
    z = probe.representations[SCRIPT].tokens
    capture = rsm_probe.capture(model, named, LAYERS, out=tmp_path_factory.mktemp("views") / "c.zarr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = rsm_probe.sweep({SCRIPT: load_model(model, name=SCRIPT)}, named, LAYERS[:3], batch_size=12)
    return {
        "SweepResult": result,
        "RSM": rsm_probe.rsm(capture[SCRIPT], kernel="cosine", out=tmp_path_factory.mktemp("views") / "p.zarr"),
        "Capture": capture,
        "Match": match(z[0], z[1]),
        "Probe": probe,
        "Probe before": Probe(model, LAYERS),
    }


KINDS = ["SweepResult", "RSM", "Capture", "Match", "Probe", "Probe before"]


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_text_and_the_table_is_small_and_has_no_colours(views, kind):
    html = views[kind]._repr_html_()
    shown = Reader(html)
    assert set(shown.tags) <= {"div", "strong", "table", "thead", "tbody", "tr", "th", "td"}
    assert shown.attributes <= {"style", "scope", "colspan"}
    assert "script" not in html.replace("&lt;script&gt;", "").replace("&lt;/script&gt;", "")
    if kind != "Match":  # which knows no names
        assert SCRIPT in shown.text
    assert shown.text.startswith(kind.partition(" ")[0])
    # Text has the colour of the notebook, which may be dark.
    styles = set(re.findall(r'style="([^"]*)"', html))
    assert not any(re.search(r"(?<!-)\bcolor:|background|font", style) for style in styles)
    assert len(html) < 8000
    assert len(shown.rows) <= 14


@pytest.mark.parametrize("kind", ["Capture", "Probe", "Probe before"])
def test_long_tables_say_what_they_leave_out(views, kind):
    rows = Reader(views[kind]._repr_html_()).rows
    assert len(rows) == 14  # the head, twelve layers, and what is missing
    assert rows[-1] == ["… and 3 more"]


def test_a_sweep_says_where_its_rsms_differ_most(views):
    result = views["SweepResult"]
    head, row = Reader(result._repr_html_()).rows
    diagonal = np.diagonal(result.grid(SCRIPT, SCRIPT, "optimal", "identity").values)
    assert row[:4] == [SCRIPT, "3", SCRIPT, "conv2"]
    assert head[4] == "lowest CKA, optimal against identity"
    lowest = int(np.nanargmin(diagonal))
    assert row[4] == f"{diagonal[lowest]:.3f} at {LAYERS[lowest]}"
    assert "images 12" in Reader(result._repr_html_()).text


def test_an_rsm_names_the_nearest_of_the_first_images(views):
    rsm = views["RSM"]
    rows = Reader(rsm._repr_html_()).rows
    for number in range(12):
        others = [k for k in range(12) if k != number]
        best = max(others, key=lambda k: rsm.values[number, k])
        labels = [f"{rsm.ids[k]} ({SCRIPT if k % 2 else 'cat'})" for k in (number, best)]
        assert rows[1 + number] == [*labels, f"{rsm.values[number, best]:.4g}"]


def test_an_image_may_be_most_similar_to_its_namesake_in_another_set():
    rsm = RSM.from_array(np.eye(2, 3), ["a", "b"], ["a", "b", "c"])
    assert Reader(rsm._repr_html_()).rows[1:] == [["a", "a", "1"], ["b", "b", "1"]]
    alone = RSM.from_array(np.ones((1, 1)), ["a"])
    assert Reader(alone._repr_html_()).rows[1:] == []


def test_a_match_lists_the_strongest_pairs(views):
    best = views["Match"]
    shown = Reader(best._repr_html_())
    order = sorted(range(36), key=lambda k: -best.affinities[k])
    expected = [[str(k), str(best.permutation[k]), f"{best.affinities[k]:.4g}"] for k in order[:12]]
    assert shown.rows[1:13] == expected
    assert f"{(best.permutation == np.arange(36)).sum()} of 36 matched locations" in shown.text
    score = match(torch.rand(4, 2), torch.rand(4, 2), "late-interaction")
    assert "pairs no locations" in Reader(score._repr_html_()).text


def test_a_capture_and_a_probe_give_shapes(views):
    assert Reader(views["Capture"]._repr_html_()).rows[1][:4] == [SCRIPT, "36", "6 x 6", "3"]
    assert Reader(views["Probe"]._repr_html_()).rows[1][:4] == [SCRIPT, "12 x 36 x 3", "12 x 0 x 3", "6 x 6"]
    assert Reader(views["Probe before"]._repr_html_()).rows[1] == [SCRIPT, "Conv2d"]
    assert repr(views["Probe"]).startswith("Probe(Sequential, 1 forward passes; layers <script>")
    assert " at 0x" not in repr(views["Probe before"])


def test_what_a_reducer_returned_is_named_by_its_type():
    model = nn.Sequential(nn.Conv2d(3, 2, 1))
    with torch.no_grad(), Probe(model, "0", reduce=lambda name, representation: [1]) as probe:
        model(torch.rand(2, 3, 4, 4))
    assert Reader(probe._repr_html_()).rows[1][:2] == ["0", "reduced to list"]


@pytest.mark.parametrize(
    ("value", "text"), [(float("nan"), "undefined"), (0.123456, "0.1235"), (7, "7"), ("x" * 200, "x" * 99 + "…")]
)
def test_cells_are_short(value, text):
    assert Reader(html_table("T", {}, ["c"], [[value]], count=1)).rows[1] == [text]


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def test_a_sweep_draws_a_grid_of_it(views):
    result = views["SweepResult"]
    ax = result.plot()
    np.testing.assert_array_equal(ax.images[0].get_array(), result.grid(SCRIPT).values)
    given = Figure().subplots()
    assert result.plot(matching_a="optimal", matching_b="identity", ax=given) is given
    grid = result.grid(SCRIPT, SCRIPT, "optimal", "identity")
    np.testing.assert_array_equal(given.images[0].get_array(), grid.values)
    assert given.images[0].norm.vmin == min(0.0, grid.values.min())
    assert (given.get_ylabel(), given.get_xlabel()) == (f"layers of {SCRIPT}, optimal", f"layers of {SCRIPT}, identity")
    assert pyplot.get_fignums() == [1]  # what is given makes no figure
    given.figure.savefig("/dev/null", format="png")
    with pytest.raises(ComparisonError, match="no matching 'greedy'"):
        result.plot(matching_a="greedy")


def test_an_rsm_is_drawn_sorted_by_label(views):
    rsm = views["RSM"]
    ax = rsm.plot()
    order = [*range(1, 12, 2), *range(0, 12, 2)]  # "<script>..." sorts before "cat"
    np.testing.assert_array_equal(ax.images[0].get_array(), rsm.values[np.ix_(order, order)])
    assert [label.get_text() for label in ax.get_yticklabels()] == [SCRIPT, "cat"]
    ax.figure.savefig("/dev/null", format="png")


def test_an_rsm_of_two_sets_is_drawn_whole():
    values = np.arange(6.0).reshape(2, 3)
    rsm = RSM.from_array(values, ["a", "b"], ["x", "y", "z"])
    rsm.dataset = rsm.dataset.assign_coords(label_b=("image_b", ["q", "p", "q"]))
    ax = rsm.plot()
    np.testing.assert_array_equal(ax.images[0].get_array(), values[:, [1, 0, 2]])
    assert (ax.images[0].norm.vmin, ax.images[0].norm.vmax) == (0, 5)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["p", "q"]
    assert [label.get_text() for label in ax.get_yticklabels()] == []


def test_a_match_joins_its_locations():
    x, y = np.random.default_rng(0).normal(size=(2, 24, 3))
    best = match(x, y[:6])
    assert best.locations == (24, 6)
    # 24 locations on 40 x 60 pixels: 4 x 6 cells of 10; 6 on 20 x 30: 2 x 3 cells of 10.
    ax = best.plot(np.zeros((40, 60)), np.zeros((20, 30)))
    starts = np.array([segment[0] for segment in ax.collections[0].get_segments()])
    matched = np.flatnonzero(best.permutation >= 0)
    centres = {(10 * (k % 6) + 5, 10 * (k // 6) + 5) for k in matched}
    assert {tuple(point) for point in starts.round().astype(int).tolist()} == centres
    given = Figure().subplots()
    assert best.plot(np.zeros((40, 60)), np.zeros((9, 9)), given, grids=((4, 6), (3, 2)), most=2) is given
    assert len(given.collections[0].get_segments()) == 2


def test_a_match_without_a_grid_is_not_drawn():
    x = np.random.default_rng(0).normal(size=(2, 13, 3))
    with pytest.raises(MatchingError, match=r"13 locations form no grid .* 40 x 60 pixels; give grids="):
        match(*x).plot(np.zeros((40, 60)), np.zeros((40, 60)))
    assert not pyplot.get_fignums()
    with pytest.raises(ComparisonError, match="has 12 locations"):
        match(*x).plot(np.zeros((40, 60)), np.zeros((40, 60)), grids=((3, 4), (3, 4)))
    with pytest.raises(MatchingError, match="pairs no locations"):
        match(*x, "late-interaction").plot(np.zeros((4, 4)), np.zeros((4, 4)))


def test_affinities_know_their_numbers_of_locations():
    (one,) = rsm_probe.match_affinity(np.ones((1, 3, 5)))
    assert one.locations == (3, 5)
