"""Pages of experiments, from made-up results: what they say, what they show, and that names are shown as they are."""

import base64
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from rsm_probe.paper.approximation.page import approximation_page
from rsm_probe.paper.outputs.page import outputs_page
from rsm_probe.paper.page_words import joint_answer, semantic_answer
from rsm_probe.paper.retrieval.figures import PicturedNeighbours
from rsm_probe.paper.retrieval.page import chosen_queries, retrieval_page, shown_neighbours
from rsm_probe.paper.shown import ShownModel, pair_cells, pair_counts
from rsm_probe.paper.translation.page import matched_crops, translation_page
from rsm_probe.report.page import BOXES, Group, Pictures
from rsm_probe.report.thumbnails import thumbnail
from rsm_probe.report.write import page_html
from rsm_probe.runs.tables import TableResult
from rsm_probe.sources.models.view.region import Region
from rsm_probe.storage.files import load_arrays, save_arrays

EVIL = "</script><script>alert(1)</script>"


def row(matching, value, difference=(math.nan,) * 3, model="net", layer="layer4", kernel="cosine", **more):
    keys = ("difference", "difference_low", "difference_high")
    return {
        "model": model, "network": model, "untrained": False, "layer": layer, "locations": 49, "kernel": kernel,
        "matching": matching, "score": value, "low": value - 0.05, "high": value + 0.05, "semantic": "optimal",
        **dict(zip(keys, difference, strict=True)), **more,
    }  # fmt: skip


def answer(rows):
    return semantic_answer(rows, ("score", "low", "high"), "difference", "F1@1", 0.95)


def test_an_answer_claims_no_more_than_its_intervals():
    said = answer([row("optimal", 0.7), row("identity", 0.6, (0.1, -0.02, 0.2)), row("pooled", 0.5, (0.2, 0.1, 0.3))])
    assert "F1@1 of the semantic RSM is higher than that of equal locations in 0 of 1 cells" in said
    assert "lower in 0, and undecided in 1; higher/undecided/lower against the other baselines" in said
    assert "average pooling 1/0/0" in said
    assert said.endswith("a difference of 0.100 [-0.020, 0.200], which is undecided.")
    assert "0.700 [0.650, 0.750] for the semantic RSM and 0.600 [0.550, 0.650] for equal locations" in said
    said = answer([row("optimal", 0.5), row("identity", 0.6, (-0.1, -0.2, -0.02))])
    assert "lower in 1, and undecided in 0" in said
    assert said.endswith("by which the baseline is the better of the two.")


def test_lower_values_can_be_better():
    rows = [row("optimal", -0.5), row("identity", -0.3, (-0.2, -0.3, -0.1))]
    said = semantic_answer(rows, ("score", "low", "high"), "difference", "r", 0.9, lower_is_better=True)
    assert "r of the semantic RSM is higher than that of equal locations in 1 of 1 cells" in said


def test_untrained_models_are_no_part_of_the_answer():
    rows = [row("optimal", 0.5), row("identity", 0.4, (0.1, 0.05, 0.2))]
    untrained = [{**one, "model": "net-untrained", "untrained": True} for one in rows]
    assert answer([*rows, *untrained]) == answer(rows)
    assert "an untrained model" in answer(untrained)


def test_without_a_semantic_rsm_the_answer_gives_the_range():
    rows = [{**row("identity", 0.4), "semantic": ""}, {**row("pooled", 0.6, layer="a"), "semantic": ""}]
    said = answer(rows)
    assert said.startswith("F1@1 lies between 0.400 [0.350, 0.450] (equal locations, layer4 of net) and 0.600")
    assert said.endswith("No semantic RSM is compared with a baseline in this run.")


def test_several_studies_are_counted_apart():
    rows = [row("optimal", 0.5), row("identity", 0.4, (0.1, 0.05, 0.2)), row("identity", 0.4, (0.1, -0.05, 0.2))]
    correlations = [
        {**one, **{f"pearson_{key}": one[key] for key in one if key.startswith("difference")}} for one in rows
    ]
    said = joint_answer(
        {"scenes": ("retrieval", rows), "out": ("outputs", correlations), "fast": ("approximation", [])}
    )
    assert "scenes 1/1/0, out 0/1/1." in said


def test_queries_are_those_asked_for_and_the_extremes_in_both_directions():
    scores = {"identity": np.array([0.5, 0.0, 1.0, 0.5, np.nan]), "optimal": np.array([0.5, 1.0, 0.0, 0.6, 1.0])}
    chosen = chosen_queries([3], scores)
    assert list(chosen) == [3, 1, 2]
    assert [reason.split(" ")[0] for reason in chosen.values()] == ["named", "among", "among"]
    assert "gain" in chosen[1]
    assert "lose" in chosen[2]
    assert list(chosen_queries([0], {"identity": np.ones(4), "optimal": np.ones(4)})) == [0]
    assert list(chosen_queries([0], {"identity": np.ones(4)})) == [0]


def test_matched_crops_count_locations_that_follow_their_content():
    # A grid of 5 x 4 whose content lies one row higher in the lower crop.
    grid, locations = (5, 4), np.arange(20)
    follows = np.where(locations >= 4, locations - 4, -1)
    found = matched_crops("layer", "optimal", grid, follows, np.ones(20), 1.0)
    assert (found["shared"], found["right"]) == (16, 16)
    upside_down = matched_crops("layer", "optimal", grid, locations[::-1].copy(), np.ones(20), 3.0)
    # Rows 3 and 4 lie in the lower crop, as rows 0 and 1. They are matched to rows 1 and 0, and to the opposite column,
    # which is next to the right one in the middle.
    assert (upside_down["shared"], upside_down["right"]) == (8, 4)
    assert "right" not in matched_crops("layer", "optimal", grid, follows, np.ones(20), None)
    assert "right" not in matched_crops("layer", "optimal", (2, 2), np.arange(4), np.ones(4), 0.5)


def test_counts_of_pairs_keep_every_pair():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 500))
    cells = pair_cells(json.loads(json.dumps(pair_counts(x, y))), model="m")
    assert sum(cell["pairs"] for cell in cells) == 500
    one = max(cells, key=lambda cell: cell["pairs"])
    inside = (one["x"] <= x) & (x < one["x2"]) & (one["y"] <= y) & (y < one["y2"])
    assert inside.sum() == one["pairs"]
    assert cells[0]["model"] == "m"


def test_what_a_run_stores_is_read_again(tmp_path):
    image = thumbnail(Image.new("RGB", (40, 30), (200, 10, 10)), EVIL, "label")
    arrays = ShownModel({"kernel": "rbf", "text": EVIL}, {"q0": image}).pack()
    save_arrays(tmp_path / "shown.npz", {name: np.asarray(values)[None] for name, values in arrays.items()})
    assert ShownModel.read(tmp_path / "shown.npz") == ShownModel({"kernel": "rbf", "text": EVIL}, {"q0": image})
    assert ShownModel.read(tmp_path / "nothing.npz") is None
    assert load_arrays(tmp_path / "shown.npz")["image-q0"].dtype == np.uint8


SETTINGS = {
    "images": {"source": EVIL}, "level": 0.95, "centering": "location-mean", "score": "f1", "queries": 3, "top": 2,
    "query_images": None, "database_sizes": [9], "batches": 2, "batch": 3, "edge": 40, "crop": 32,
    "kernels": ["cosine"], "solvers": [], "solver_pairs": 2, "matchings": ["identity", "optimal"],
}  # fmt: skip


def retrieval_result():
    rows = [
        row(name, 0.5, difference, model=EVIL, layer=f"{EVIL}.{k}", database=9, queries=3, best=0.6, best_low=0.5,
            best_high=0.7, best_difference=0.1, best_difference_low=-0.1, best_difference_high=0.2, objects=EVIL)
        for k in range(2)
        for name, difference in (("optimal", (math.nan,) * 3), ("identity", (0.1, 0.05, 0.2)))
    ]  # fmt: skip
    return TableResult(rows, Path("run"), SETTINGS)


def retrieval():
    images = {key: thumbnail(Image.new("RGB", (9, 9), (k, 0, 0)), f"{EVIL}{key}", EVIL)
              for k, key in enumerate(("q0", "d4", "d7"))}  # fmt: skip
    neighbours = [
        {"index": index, "score": score, "similarity": 0.5, "objects": [f"✓ {EVIL}"]}
        for index, score in ((4, 1.0), (7, 0.25))
    ]
    lines = [[0.25, 0.25, 0.75, 0.75, 1.0]]
    queries = [
        {"query": 0, "why": "asked for", "matching": name, "objects": [EVIL], "neighbours": neighbours, "lines": lines}
        for name in ("identity", "optimal")
    ]
    shown = {EVIL: ShownModel({"layer": EVIL, "kernel": "cosine", "queries": queries}, images)}
    return retrieval_page(retrieval_result(), shown)


def translation():
    rows = [
        row(name, 0.5, model=EVIL, auroc=0.8, apart=math.nan, apart_low=math.nan, apart_high=math.nan, d_prime=1.0,
            partner_first=0.5, partner_rank=1.5, overlapping_pairs=6)
        for name in ("optimal", "identity")
    ]  # fmt: skip
    rows[1] |= {"difference": 0.1, "difference_low": 0.05, "difference_high": 0.2}
    curves = [{"layer": EVIL, "matching": "optimal", "kernel": "cosine", "kind": "overlapping crops", "pairs": 3,
               "values": [0.1, 0.2]}]  # fmt: skip
    crops = [{"layer": EVIL, "matching": "optimal", "grid": [2, 2], "lines": [[0.5] * 4 + [1.0]], "pair": 0,
              "shared": 3, "right": 2}]  # fmt: skip
    images = {key: thumbnail(Image.new("L", (9, 9)), EVIL, EVIL) for key in ("upper0", "lower0")}
    shown = {EVIL: ShownModel({"distributions": curves, "crops": crops}, images)}
    return translation_page(TableResult(rows, Path("run"), SETTINGS), shown)


def outputs():
    values = {f"{key}{end}": -0.2 for key in ("pearson", "spearman") for end in ("", "_low", "_high")}
    gains = {f"{key}_difference{end}": -0.1 for key in ("pearson", "spearman") for end in ("", "_low", "_high")}
    rows = [row(name, 0.5, model=EVIL, images=24, **values, **gains) for name in ("optimal", "identity")]
    counts = {"matching": "optimal", "kernel": "cosine", **pair_counts(np.arange(9.0), np.arange(9.0))}
    shown = {EVIL: ShownModel({"pairs": [counts], "count": 9}, {})}
    return outputs_page(TableResult(rows, Path("run"), SETTINGS), shown)


def approximation():
    rows = [
        {
            "model": EVIL, "layer": EVIL, "locations": 64, "channels": 8, "method": method, "share": share,
            "low": share - 0.01, "high": share, "share_5": 0.5, "share_median": 0.6, "share_95": 0.7,
            "milliseconds": time, "timed": 8, "pairs": 8, "untrained": False,
        }
        for method, share, time in (("optimal", 1.0, 0.5), ("identity", 0.7, 0.01))
    ]  # fmt: skip
    counts = {"layer": EVIL, **pair_counts(np.arange(9.0), np.arange(9.0))}
    settings = {**SETTINGS, "centering": None}
    return approximation_page(TableResult(rows, Path("run"), settings), {EVIL: ShownModel({"products": [counts]}, {})})


PAGES = {"retrieval": retrieval, "translation": translation, "outputs": outputs, "approximation": approximation}


@pytest.mark.parametrize("name", PAGES)
def test_names_are_shown_and_not_run(name):
    html = page_html(PAGES[name]())
    assert EVIL not in html, "as it is, a browser would run it"
    assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in html
    specs = re.findall(r'<script type="application/json" id="[^"]*">(.*?)</script>', html, re.DOTALL)
    assert specs
    # Charts show names as they are, too.
    assert any(EVIL in json.dumps(json.loads(spec), ensure_ascii=False) for spec in specs)


@pytest.mark.parametrize("name", PAGES)
def test_every_chart_is_a_valid_one(name):
    import vl_convert

    html = page_html(PAGES[name]())
    for spec in re.findall(r'<script type="application/json" id="[^"]*">(.*?)</script>', html, re.DOTALL):
        picture = vl_convert.vegalite_to_svg(json.loads(spec))
        assert "<path" in picture or "<line" in picture


@pytest.mark.parametrize("name", PAGES)
def test_the_same_result_has_the_same_page(name):
    assert page_html(PAGES[name]()) == page_html(PAGES[name]())


def parts_of(page):
    waiting = [part for section in page.sections for part in section.parts]
    while waiting:
        part = waiting.pop(0)
        yield part
        waiting += list(part.parts) if isinstance(part, Group) else []


def test_neighbours_stand_beside_their_query_with_sign_score_and_matched_locations():
    page = retrieval()
    pictures = [part for part in parts_of(page) if isinstance(part, Pictures)]
    assert [one.caption for one in pictures] == ["Nearest by equal locations", "Nearest by semantic (optimal)"]
    first, second = pictures[0].pictures
    assert [image.name for image in first.images] == [f"{EVIL}q0", f"{EVIL}d4"]
    assert first.lines == [(0.25, 0.25, 0.75, 0.75, 1.0)]
    assert first.caption == f"1. ✓ F1@1 1.00, similarity 0.5: ✓ {EVIL}".replace("F1@1", "F1")
    assert second.caption.startswith("2. ≈ F1 0.25")
    assert not second.lines


def test_boxes_lie_on_the_part_of_an_image_that_is_shown():
    # The model sees the pixels 10 to 30 across and 0 to 20 down of an image of 40 x 20.
    note = {"boxes": [["cup", 5, 5, 20, 15], ["dog", 15, 0, 25, 10], ["car", 31, 2, 39, 9]], "counts": {}}
    counted = {**note, "boxes": note["boxes"][1:]}
    images = SimpleNamespace(ids=["a"], labels=[""], annotations=[note])
    pictured = PicturedNeighbours(
        "net", "layer4", "cosine", {"queries": images, "database": images},
        {"queries": [counted], "database": [counted]}, 1, {}, {}, "f1", {}, {},
    )  # fmt: skip
    shown = shown_neighbours(pictured, {}, {"d0": np.zeros((20, 20, 3))}, {"d0": Region(10, 0, 30, 20)})
    assert shown.facts["boxes"] == {
        "d0": [[0.0, 0.25, 0.5, 0.75, "cup", False], [0.25, 0.0, 0.75, 0.5, "dog", True]],
    }  # fmt: skip
    assert not shown_neighbours(pictured, {}, {"d0": np.zeros((20, 20, 3))}, {}).facts["boxes"]


def test_boxes_are_coloured_by_what_they_share_with_the_query():
    boxes = {
        "q0": [[0, 0, 1, 1, "cup", True]],
        "d4": [[0, 0, 1, 1, name, counts] for name, counts in (("cup", True), ("dog", True), ("cup", False))],
    }
    line = {"query": 0, "why": "asked for", "matching": "optimal", "objects": [], "classes": ["cup"], "lines": [],
            "neighbours": [{"index": 4, "score": 1.0, "similarity": 0.5, "objects": []}]}  # fmt: skip
    images = {key: thumbnail(Image.new("RGB", (9, 9)), key) for key in ("q0", "d4")}
    facts = {"layer": "layer4", "kernel": "cosine", "queries": [line], "boxes": boxes}
    page = retrieval_page(retrieval_result(), {"net": ShownModel(facts, images)})
    (picture,) = next(part for part in parts_of(page) if isinstance(part, Pictures)).pictures
    assert [[box[-1] for box in of_image] for of_image in picture.boxes] == [
        ["asked"], ["shared", "other", "uncounted"],
    ]  # fmt: skip
    html = page_html(page)
    assert [html.count(f'stroke="{colour}"') for colour, _ in BOXES.values()] == [1, 1, 1, 1]
    assert "dotted grey, objects that do not count" in html
    assert "dotted grey" not in page_html(retrieval())  # without boxes


def test_a_downloaded_table_has_all_numbers():
    html = page_html(approximation())
    tables = [base64.b64decode(text).decode() for text in re.findall(r"csv;charset=utf-8;base64,([^\"]+)", html)]
    assert any("share,low,high" in table and ",0.7,0.69," in table for table in tables)


def test_a_tie_of_the_approximation_answer_names_share_time_and_interval():
    said = approximation().answer
    assert "equal locations 0.700 [0.690, 0.700]" in said
    assert "equal locations 0.01 ms" in said
    assert "semantic (optimal) 0.5 ms" in said
