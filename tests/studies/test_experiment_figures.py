"""Figures of experiments, from made-up results: what is marked, named and shared in them."""

import matplotlib

matplotlib.use("Agg")

from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from rsm_probe.paper.retrieval.figures import PicturedNeighbours, _lines, retrieval_figures
from rsm_probe.paper.translation.figures import PicturedCrops, translation_figures
from rsm_probe.runs.tables import TableResult
from rsm_probe.sources import ImageSet

DOLLARS = r"net$\frac$"


def drawn(figure):
    FigureCanvasAgg(figure).draw()
    return figure


def images_with(name, notes):
    ids = [f"{name}-{k}" for k in range(len(notes))]
    return ImageSet(name, ids, lambda index: Image.new("RGB", (40, 30), (index, 0, 0)), annotations=notes)


def retrieval_of(score="f1", similarities=True, hidden=False):
    queries = images_with("queries", [{"counts": {"cat": 2, "dog": 1}, "boxes": [["cat", 0, 0, 10, 10]] * 2}])
    cat, car = ["cat", 5, 5, 15, 20], ["car", 20, 5, 35, 20]
    database = images_with(
        "database",
        [
            {"counts": {"cat": 2, "dog": 1}, "boxes": [cat, cat]},
            {"counts": {"cat": 1, "car": 3}, "boxes": [cat, car]},
            {"counts": {"$x$": 1}},
        ],
    )
    images = {"queries": queries, "database": database}
    objects = {name: list(part.annotations) for name, part in images.items()}
    if hidden:
        objects["database"][1] = {"counts": {"cat": 1}, "boxes": [cat]}
    key = (0, "identity")
    neighbours = {key: np.array([0, 1, 2, -1])}
    pictured = PicturedNeighbours(
        DOLLARS, "layer4", "cosine", images, objects, 4, neighbours, {key: None}, score,
        {key: np.array([1.0, 2 / 7, 0.0, np.nan])},
        {key: np.array([0.9, 0.5, 0.1, np.nan])} if similarities else {},
    )  # fmt: skip
    settings = {"score": score, "database_sizes": [3], "pictured": [0]}
    rows = [
        {
            "model": model, "layer": "layer4", "locations": 49, "database": 3, "kernel": "cosine", "matching": matching,
            "score": 0.5, "low": 0.4, "high": 0.6,
        }
        for model in (DOLLARS, "other")
        for matching in ("identity", "optimal", "gem")
    ]  # fmt: skip
    return retrieval_figures(TableResult(rows, Path("run"), settings, [pictured]))


def test_neighbours_show_score_similarity_and_whether_they_are_right():
    figure = drawn(retrieval_of()[f"neighbours-{DOLLARS}"])
    query, same, partly, none, missing = figure.axes[:5]
    assert query.get_title() == "query 0\nnone"
    assert [ax.get_title() for ax in (same, partly, none)] == [
        "1  ✓ F1 1.00\nsimilarity 0.9", "2  ≈ F1 0.29\nsimilarity 0.5", "3  ✗ F1 0.00\nsimilarity 0.1",
    ]  # fmt: skip
    frames = [(ax.spines["top"].get_edgecolor(), str(ax.spines["top"].get_linestyle())) for ax in (same, partly, none)]
    # By colour and by line, so that nobody depends on colours.
    assert all(len(set(kinds)) == 3 for kinds in zip(*frames, strict=True))
    assert not missing.axison
    text = figure.get_supxlabel()
    assert all(sign in text for sign in "✓≈✗–")


def test_neighbours_name_their_objects_by_what_the_query_has():
    query, same, partly, none = retrieval_of()[f"neighbours-{DOLLARS}"].axes[:4]
    words = [ax.get_xlabel().replace("\u00a0", " ").replace("\n", " ") for ax in (query, same, partly, none)]
    assert words == [
        "cat ×2, dog",
        "✓ cat ×2, ✓ dog",
        "✓ cat, ✗ car ×3, – cat, – dog",
        "✗ $x$, – cat ×2, – dog",
    ]
    partly = retrieval_of("iou", similarities=False)[f"neighbours-{DOLLARS}"].axes[2]
    assert partly.get_title() == "2  ≈ IoU 0.29"
    assert partly.get_xlabel().replace("\u00a0", " ").replace("\n", " ") == "✓ cat, ✗ car, – dog"


def edges(ax):
    """Colours of the boxes of a panel, without the lines below them."""
    return [patch.get_edgecolor()[:3] for patch in ax.patches if patch.get_edgecolor()[:3] != (1, 1, 1)]


def test_boxes_of_objects_say_whether_the_query_has_them_and_whether_they_count():
    query, same, partly, none = retrieval_of()[f"neighbours-{DOLLARS}"].axes[:4]
    assert len(edges(query)) == len(edges(same)) == len(edges(partly)) == 2
    assert edges(none) == [], "without boxes, nothing is drawn"
    right, wrong = edges(partly)
    assert edges(same) == [right, right]
    assert wrong != right
    box = partly.patches[1]
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (4.5, 4.5, 10, 15)
    uncounted = retrieval_of(hidden=True)[f"neighbours-{DOLLARS}"].axes[2]
    assert edges(uncounted)[0] == right
    assert edges(uncounted)[1] not in (right, wrong)
    assert "car" not in uncounted.get_xlabel()


def test_many_objects_are_counted_where_their_names_do_not_fit():
    entries = [f"✗ kind, number {k:02d}" for k in range(30)]
    lines = _lines(entries).replace("\u00a0", " ").splitlines()
    assert lines == [*(f"{entry}," for entry in entries[:3]), "and 27 more"]


def crops_of(kernel="rbf", **seen):
    rng = np.random.default_rng(0)
    layers, matchings = (
        ["a.long.beginning.of.names.layer1", "a.long.beginning.of.names.layer2"],
        ["identity", "optimal"],
    )
    keys = [(layer, matching) for layer in layers for matching in matchings]
    rsms = {key: np.eye(6) + rng.uniform(size=(6, 6)) * (k + 1) for k, key in enumerate(keys)}
    kinds = {key: {"overlapping crops": rng.uniform(size=9), "unrelated crops": rng.uniform(size=20)} for key in keys}
    pictures = (np.zeros((32, 32, 3)), np.ones((32, 32, 3)))
    pictured = PicturedCrops(DOLLARS, kernel, rsms, kinds, pictures, ((0, 8, 32, 32), (0, 0, 32, 24)))
    rows = [
        {
            "model": DOLLARS, "layer": layer, "locations": 16, "kernel": kernel, "matching": matching, "auroc": 0.75,
            "low": 0.7, "high": 0.8, "apart": np.nan, "apart_low": np.nan, "apart_high": np.nan, **seen,
        }
        for layer, matching in keys
    ]  # fmt: skip
    return translation_figures(TableResult(rows, Path("run"), {}, [pictured]))


def test_figure_2_shows_two_crops_with_what_they_share():
    upper, lower = crops_of()[f"figure2-{DOLLARS}"].axes[:2]
    areas = [ax.patches[0] for ax in (upper, lower)]
    assert [(area.get_y(), area.get_height()) for area in areas] == [(7.5, 24), (-0.5, 24)]
    assert [ax.get_title() for ax in (upper, lower)] == ["upper crop", "lower crop"]
    assert lower.get_xlabel() == "marked: shared,\n32 x 24 pixels"
    lower = crops_of(seen_width=28.0, seen_height=28.0, seen_shared=20.0)[f"figure2-{DOLLARS}"].axes[1]
    assert lower.get_xlabel() == "marked: shared,\n32 x 24 pixels;\nthe network sees\n28 x 20"


def test_figure_2_has_one_scale_letters_and_named_axes():
    figure = drawn(crops_of()[f"figure2-{DOLLARS}"])
    rsms = [ax for ax in figure.axes[2:] if ax.images]
    assert len(rsms) == 4
    assert len({id(ax.images[0].norm) for ax in rsms}) == 1
    assert len(figure.axes) == 2 + 4 + 4 + 1, "and one colour bar"
    assert figure.axes[-1].get_ylabel() == "RBF similarity"
    letters = [letter for ax in figure.axes if (letter := ax.get_title(loc="left"))]
    assert letters == ["(a)", "(b)", "(c)", "(d)", "(e)", "(f)"]
    assert [rsms[k].get_title() for k in (0, 1)] == ["…layer1", "…layer2"]
    assert "… = a.long.beginning.of.names." in figure.get_suptitle()
    named = {ax.get_ylabel() for ax in figure.axes}
    assert {
        "spatio-semantic\ncrop",
        "semantic (PI)\ncrop",
        "spatio-semantic\ndensity",
        "semantic (PI)\ndensity",
    } <= named
    assert [label.get_text() for label in rsms[2].get_xticklabels()] == ["upper", "lower"]
    densities = figure.axes[6:10]
    assert {ax.get_title() for ax in densities} == {"AUROC 0.75\n[0.70, 0.80]"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["overlapping crops", "unrelated crops"]


def test_figure_2_of_a_kernel_without_bounds_has_a_scale_per_layer():
    figure = drawn(crops_of("linear")[f"figure2-{DOLLARS}"])
    norms = [id(ax.images[0].norm) for ax in figure.axes[2:6]]
    assert (norms[0], norms[1]) == (norms[2], norms[3])
    assert norms[0] != norms[1]


@pytest.mark.parametrize("name", ["figure3", f"neighbours-{DOLLARS}"])
def test_names_are_drawn_as_they_are(tmp_path, name):
    figure = retrieval_of()[name]
    figure.savefig(tmp_path / "figure.png", dpi=30)
    texts = [text.get_text() for text in figure.axes[0].get_xticklabels()] + [figure.get_suptitle()]
    assert any(DOLLARS in text for text in texts)


def test_without_parts_of_photographs_the_separation_has_one_column():
    figure = crops_of()["separation-rbf"]
    assert len(figure.axes) == 1
    assert figure.axes[0].get_title() == f"{DOLLARS}: against other photographs"
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["…layer1", "…layer2"]
