"""The page of a sweep: what its run stores, checked against the store and new matchings, and what the page says."""

import re
from dataclasses import replace
from html import unescape

import altair
import numpy as np
import pytest
import torch
from large_page import random_sweep
from PIL import Image

import rsm_probe
from rsm_probe.comparison.mini_batches import bootstrap_batch_samples
from rsm_probe.matching import match
from rsm_probe.report.default import write_report
from rsm_probe.report.write import page_html
from rsm_probe.sources import from_tensor, photos, scenes
from rsm_probe.storage.files import open_dataset
from rsm_probe.streaming import SweepResult
from rsm_probe.streaming.rsm_store import StoredModel
from rsm_probe.studies.registry import read_study
from rsm_probe.studies.sweep import SweepConfig
from rsm_probe.studies.sweep_report.bootstrapping import DIAGONAL_ONLY, intervals_of
from rsm_probe.studies.sweep_report.choosing import changed_pairs, query_images, rank_shares, sorted_by_label
from rsm_probe.studies.sweep_report.page import sweep_page, write_result_report
from rsm_probe.studies.sweep_report.rsm_views import packed_rsms
from rsm_probe.studies.sweep_report.shared_pictures import SharedPictures
from rsm_probe.studies.sweep_report.shown import SHOWN, Shown, settings_hash
from rsm_probe.studies.sweep_report.summary import Cell

COUNT, BATCH = 90, 70


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 5, 2)).eval()


def pictures():
    images = torch.rand(COUNT, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return from_tensor(images, labels=["<script>" if k % 2 else "plain" for k in range(COUNT)])


def config(**changes):
    settings = {
        "study": "sweep", "models": [{"name": "net", "source": "given"}], "images": {"source": "digits"},
        "layers": ["0", "2"], "matchings": ["identity", "optimal"], "kernels": ["cosine", "linear"],
        "centering": "location-mean", "batch_size": BATCH, "workers": 1, "max_hours": None, **changes,
    }  # fmt: skip
    return SweepConfig.model_validate(settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "run"
    result = config().run(out, models={"net": network()}, images=pictures())
    return out, result, Shown.open(out)


def test_the_rsms_on_the_page_are_those_of_the_store(run):
    out, result, shown = run
    store = rsm_probe.RsmStore.open(out)
    labels = dict(zip(pictures().ids, pictures().labels, strict=True))
    assert shown.ids == store.ids[0]
    assert shown.labels == [labels[name] for name in shown.ids]
    assert [key.label() for key in shown.keys] == [str(name) for name in result.cka["rsm_a"].values]
    for key, values in zip(shown.keys, shown.rsms, strict=True):
        whole = store.rsm(key.model, key.layer, key.matching, key.kernel).values
        np.testing.assert_allclose(values, whole[np.ix_(shown.order, shown.order)], rtol=1e-6)
    assert len(shown.order) == len(shown.ids) == 45  # two mini-batches, neither thinned out
    in_order = [shown.labels[k] for k in shown.order]
    assert in_order == sorted(in_order)


def test_ranks_are_the_shares_of_less_similar_pairs_of_the_whole_mini_batch(run):
    out, _, shown = run
    store = rsm_probe.RsmStore.open(out)
    key = shown.keys[1]
    whole = store.rsm(key.model, key.layer, key.matching, key.kernel).values
    pairs = whole[np.tril_indices(len(whole), -1)]
    for i, j in ((3, 0), (0, 3), (40, 17)):
        less = (pairs < whole[shown.order[i], shown.order[j]]).sum() / (len(pairs) - 1)
        assert shown.ranks[1][i, j] == pytest.approx(less, abs=1e-5)
    assert np.isnan(np.diagonal(shown.ranks[1])).all()


def test_pairs_are_those_whose_rank_changes_most(run):
    out, _, shown = run
    store = rsm_probe.RsmStore.open(out)
    for layer in ("0", "2"):
        ranks = []
        for matching in ("optimal", "identity"):
            values = store.rsm("net", layer, matching, "cosine").values
            pairs = [(a, b) for a in range(len(values)) for b in range(a + 1, len(values))]
            order = sorted(pairs, key=lambda pair, values=values: values[pair])
            ranks.append({pair: place / (len(pairs) - 1) for place, pair in enumerate(order)})
        change = {pair: ranks[0][pair] - ranks[1][pair] for pair in pairs}
        of_layer = [one for one in shown.changes if one.layer == layer]
        assert of_layer[0].images == max(change, key=change.get)
        assert of_layer[4].images == min(change, key=change.get)
        for one in of_layer:
            assert one.semantic - one.identity == pytest.approx(change[one.images])


def test_lines_join_the_locations_that_the_sweep_matched(run):
    _, _, shown = run
    images, index = pictures(), {name: k for k, name in enumerate(pictures().ids)}
    module = network()
    every = torch.stack([images[k] for k in range(COUNT)])
    with torch.no_grad():
        maps = {"0": module[0](every), "2": module(every)}
    for one in (shown.changes[0], shown.changes[-1]):
        tokens = maps[one.layer].flatten(2).transpose(1, 2)
        a, b = ((tokens - tokens.mean(0))[index[shown.ids[k]]] for k in one.images)
        matched, side = match(a, b), maps[one.layer].shape[-1]
        best = int(np.argmax(matched.affinities))
        ends = [((k % side + 0.5) / side, (k // side + 0.5) / side) for k in (best, int(matched.permutation[best]))]
        assert one.lines[0] == pytest.approx([*ends[0], *ends[1], 1.0], abs=1e-3)
        assert one.locations == side**2
        assert len(one.lines) == 12


def test_neighbours_are_the_most_similar_images(run):
    out, _, shown = run
    store = rsm_probe.RsmStore.open(out)
    one = shown.neighbours[-1]
    for matching, images in (("optimal", one.semantic), ("identity", one.identity)):
        row = store.rsm(one.model, one.layer, matching, "cosine").values[one.query].copy()
        row[one.query] = -np.inf
        assert list(images) == np.argsort(-row)[:5].tolist()


def test_a_page_changes_nothing_in_the_result(run, tmp_path):
    out, _, _ = run
    options = {"layers": ["0", "2"], "kernels": ["cosine", "linear"], "centering": "location-mean", "batch_size": BATCH}
    rsm_probe.sweep({"net": network()}, pictures(), out=tmp_path / "plain", workers=1, **options)
    plain, with_page = open_dataset(tmp_path / "plain" / "result.zarr"), open_dataset(out / "result.zarr")
    assert with_page.equals(plain)
    products, means = (
        [{f.relative_to(where): f.read_bytes() for f in where.rglob(pattern) if f.is_file()}
         for where in (out, tmp_path / "plain")]
        for pattern in ("rsms.zarr/products/**/c/**/*", "means/*")
    )  # fmt: skip
    assert products[0]
    assert products[0] == products[1]
    assert means[0].keys() == means[1].keys()


def test_the_page_says_what_came_out_and_where_it_comes_from(run):
    out, result, shown = run
    page = config().runner(out).page()
    diagonal = np.diagonal(result.grid("net", "net", "optimal", "identity", "cosine").values)
    least = ["0", "2"][int(diagonal.argmin())]
    assert f"agree least in {least} of net (CKA {diagonal.min():.3f}, 95% bootstrap interval" in page.answer
    difference = result.grid("net", "net", "optimal", kernel="cosine") - result.grid("net", "net", kernel="cosine")
    extreme = difference.values.flat[np.abs(difference.values).argmax()]
    assert f"by {extreme:+.3f} (95% bootstrap interval " in page.answer
    assert page.answer.endswith("These values are for the cosine kernel.")
    ends = [one for one in shown.intervals if one.kernel == "cosine"]
    overlap = int(max(one.low for one in ends) <= min(one.high for one in ends))
    assert (
        f"; the intervals of {overlap} other layers overlap that of the lowest, and of {overlap} that of the highest."
        in page.answer
    )
    assert page.title == f"Layers of net on {COUNT} images of tensor (run folder {out.name})"
    assert page.command == f"rsm-probe run {out}/config.yaml --out {out}"
    assert "90 images of the set tensor, in 2 mini-batches" in page.setting
    headings = [page.title, page.setting, page.answer, *(section.title for section in page.sections)]
    assert not any(str(out) in text for text in headings)
    assert page.provenance["Cost"].startswith(f"{2 * 45 * 44 // 2:,} pairs of images matched in each of 2 layers")
    assert "torch" in page.provenance["Versions"]
    assert any("the first of 2 mini-batches (45 of 90 images)" in note for note in page.notes)
    one = shown.intervals[0]
    assert one.low <= one.value <= one.high


def test_both_kinds_of_uncertainty_are_named(run):
    out, result, shown = run
    text = config().runner(out).page().sections[0].text
    matching, sampling = text.split("\n\n")
    assert matching.startswith("Matching error (certificate): ")
    assert sampling.startswith("Sampling error (95% bootstrap interval): ")
    assert (
        "no bootstrap intervals"
        in sweep_page(result, replace(shown, repeats=0, intervals=[]), "t", "c").sections[0].text
    )
    assert "no bootstrap interval)" in sweep_page(result, None, "t", "c").answer


def test_intervals_of_cells_are_those_of_the_bootstrap(run):
    out, result, shown = run
    store = rsm_probe.RsmStore.open(out).select(kernels=["linear"])
    samples = bootstrap_batch_samples(store, "cka", shown.repeats)
    at = {(key.layer, key.matching): k for k, key in enumerate(store.keys)}
    place = {(key.layer, key.matching): k for k, key in enumerate(shown.keys) if key.kernel == "linear"}
    for matching in ("identity", "optimal"):
        values = samples[:, at["0", matching], at["2", matching]]
        ends = shown.cells[place["0", matching], place["2", matching]]
        np.testing.assert_allclose(ends, np.quantile(values, [0.025, 0.975]), atol=1e-6)
    # Images are the same in both, so that their difference is surer than either.
    change = samples[:, at["0", "optimal"], at["2", "optimal"]] - samples[:, at["0", "identity"], at["2", "identity"]]
    ends = shown.differences[place["0", "optimal"], place["2", "optimal"]]
    np.testing.assert_allclose(ends, np.quantile(change, [0.025, 0.975]), atol=1e-6)
    packed = sweep_page(result, shown, "t", "c").sections[0].parts[0].chart["datasets"]["grids"]
    (row,) = (one for one in packed if one["kernel"] == "linear")
    assert row["change_ends"][2:4] == pytest.approx(ends, abs=6e-4)  # the cell of the layers 0 and 2
    assert shown.cells.shape == shown.differences.shape == (8, 8, 2)


def test_where_cells_have_no_intervals_the_page_says_so(run, monkeypatch):
    out, result, shown = run
    monkeypatch.setattr("rsm_probe.studies.sweep_report.bootstrapping._MOST_CELLS", 7)
    store = rsm_probe.RsmStore.open(out).select(kernels=["cosine", "linear"])
    numbers = {key._replace(depth=0): k for k, key in enumerate(store.keys)}
    some = intervals_of(store, shown.keys, numbers, "optimal", result)
    assert (some.cells.size, some.note) == (0, DIAGONAL_ONLY)
    for one, other in zip(some.diagonal, shown.intervals, strict=True):
        assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=1e-6)
    page = sweep_page(result, replace(shown, cells=some.cells, differences=some.differences), "t", "c")
    assert "cells have none" in page.sections[0].text
    assert "(no bootstrap interval)" in page.answer
    assert "change_ends" not in page.sections[0].parts[0].chart["datasets"]["grids"][0]


def test_images_of_one_picture_are_said_to_be():
    crops = SharedPictures.of(photos(size=64, count=20))
    assert (crops.kind, crops.composition) == ("photograph", "20 crops of 18 photographs")
    assert crops.of_images(["china-0-00000", "china-0-00018"]) == ["china", "china"]
    frames = SharedPictures.of(scenes(size=48, count=3, frames=2))
    assert (frames.kind, frames.composition) == ("scene", "3 frames of 2 scenes")
    for images in (photos(size=64, count=18), scenes(size=48, count=3), pictures(), None):
        assert SharedPictures.of(images) == SharedPictures()


def test_pairs_and_neighbours_of_one_photograph_are_marked():
    result, shown = random_sweep(models=1, layers=2, images=16, shown_images=4)
    a, b = shown.changes[0].images
    sources = [f"source {k}" for k in range(len(shown.ids))]
    sources[b] = sources[a]
    one = replace(shown, pictures=sources, picture="photograph", composition="16 crops of 9 photographs")
    page, plain = sweep_page(result, one, "t", "c"), sweep_page(result, shown, "t", "c")
    assert "16 crops of 9 photographs, of the set random" in page.setting
    assert "16 crops of 9 photographs" in page.sections[0].text
    captions = [caption for part in page.sections[2].parts[:2] for caption in (each.caption for each in part.pictures)]
    assert sum(text.endswith("; both from the same photograph") for text in captions) >= 1
    html = page_html(page)
    assert "of 5 from the same photograph)" in html
    assert "photograph" not in page_html(plain)


def test_pairs_that_rise_and_pairs_that_fall_have_their_own_headings():
    result, shown = random_sweep(models=1, layers=2, images=16, shown_images=4)
    up, down = sweep_page(result, shown, "t", "c").sections[2].parts[:2]
    assert (up.title, down.title) == (
        "Pairs whose rank rises most in any layer",
        "Pairs whose rank falls most in any layer",
    )
    for part, sign in ((up, 1), (down, -1)):
        for one in part.pictures:
            before, after = map(int, re.findall(r"rank (\d+)%", one.caption))
            assert sign * (after - before) >= 0


def test_captions_cite_the_figures_of_the_paper_and_say_how_to_read_them():
    result, shown = random_sweep(models=2, layers=24, images=16, shown_images=4)
    page = sweep_page(result, shown, "t", "c")
    grids, diagonal = page.sections[0].parts[0].caption, page.sections[1].parts[0].caption
    assert "Figure 16 of Wald et al. 2024 (one model) or Figure 17 (two models)" in grids
    assert "Figure 15 of Wald et al. 2024" in diagonal
    assert "Figure 4 of Wald et al. 2024" in page.sections[3].text
    assert "columns follow the order of the rows" in grids
    assert "Only some layers are named at the axes" in grids
    assert "Only some layers are named" not in caption_of(random_sweep(models=1, layers=2, images=8, shown_images=4))
    for word in ("Hover", "hover", "lie beyond"):
        assert word not in grids + diagonal


def test_labels_are_escaped_and_the_page_is_the_same_when_written_again(run, tmp_path):
    out, _, _ = run
    study = config()
    first = write_report(study, out).read_bytes()
    assert write_report(study, out, tmp_path / "again.html").read_bytes() == first
    text = first.decode()
    assert text.count("<script") == 2 + len(re.findall(r'<script type="application/json"', text))
    assert "&lt;script&gt;" in text


def test_a_run_stores_its_page_once(run):
    out, _, _ = run
    before = (out / SHOWN).stat().st_mtime_ns
    config().run(out, models={"net": network()}, images=pictures())
    assert (out / SHOWN).stat().st_mtime_ns == before


def test_a_sweep_in_python_has_a_page_that_says_what_is_missing(tmp_path):
    rsm_probe.sweep({"net": network()}, pictures(), layers=["0", "2"], out=tmp_path / "run", workers=1)
    text = write_result_report(tmp_path / "run").read_text(encoding="utf-8")
    assert f"the folder has no {SHOWN}" in text
    assert "Nearest neighbours" not in text
    assert "rsm_probe.sweep(..., out=" in re.sub("</?span>", "", text)


def test_what_belongs_to_other_settings_is_not_shown(run):
    out, result, _ = run
    assert Shown.of(out, result) is not None
    other = SweepResult(result.dataset.assign_attrs(settings="{}"))
    assert Shown.of(out, other) is None
    assert settings_hash(other) != settings_hash(result)


def test_thinning_is_said(tmp_path):
    images = from_tensor(torch.rand(80, 3, 6, 6, generator=torch.Generator().manual_seed(1)))
    config(layers=["0"], kernels=["linear"], batch_size=80).run(
        tmp_path / "run", models={"net": network()}, images=images
    )
    shown = Shown.open(tmp_path / "run")
    assert shown.rsms.shape == (2, 64, 64)
    assert any(f"RSMs show 64 of {len(shown.ids)} images, evenly spread over labels" in note for note in shown.notes)
    assert "RSMs show 64 of" in write_report(read_study_of(tmp_path / "run"), tmp_path / "run").read_text()


def read_study_of(out):
    return read_study(out / "config.yaml", stored=True)


@pytest.mark.parametrize("matchings", [["identity"], ["optimal"]])
def test_a_sweep_with_one_kind_of_rsm_has_a_page_with_one_grid(tmp_path, matchings):
    study = config(matchings=matchings, kernels=["linear"], layers=["0"])
    study.run(tmp_path / "run", models={"net": network()}, images=pictures())
    page = study.runner(tmp_path / "run").page()
    assert [section.title for section in page.sections] == ["CKA between layers", "Models"]
    spec = page.sections[0].parts[0].chart
    assert len(spec["concat"]) == 1
    page_html(page)


def test_images_are_chosen_by_label_and_pairs_without_repeating_an_image():
    labels = ["b", "a", "b", "a", "c", "a"]
    assert sorted_by_label(labels, 9).tolist() == [1, 3, 5, 0, 2, 4]
    assert [labels[k] for k in sorted_by_label(labels, 3)] == ["a", "a", "c"]
    assert [labels[k] for k in query_images(labels, 3)] == ["a", "b", "c"]
    assert query_images([""] * 9, 2) == [0, 8]
    difference = np.zeros((5, 5))
    for (a, b), value in {(0, 1): 0.9, (0, 2): 0.8, (2, 3): 0.5, (1, 4): -0.7}.items():
        difference[a, b] = difference[b, a] = value
    assert changed_pairs(difference, 4) == [(0, 1), (2, 3)]
    assert changed_pairs(-difference, 4) == [(1, 4)]


def test_ranks_are_shares_of_the_other_pairs():
    rsm = np.array([[9.0, 1, 3], [1, 9, 2], [3, 2, 9]])
    np.testing.assert_array_equal(rank_shares(rsm), [[np.nan, 0, 1], [0, np.nan, 0.5], [1, 0.5, np.nan]])


def test_the_page_of_3_models_16_layers_and_500_images_stays_below_15_mb():
    result, shown = random_sweep()
    assert len(page_html(sweep_page(result, shown, "large", "command")).encode()) < 15e6


def drawn(chart):
    """The texts in a chart, drawn as it first appears."""
    vl_convert = pytest.importorskip("vl_convert")
    svg = vl_convert.vegalite_to_svg(chart.chart, vl_version=".".join(altair.SCHEMA_VERSION[1:].split(".")[:2]))
    return re.findall(r"<(?:text|tspan)[^>]*>([^<]+)</", svg)  # a text, or each of its lines


def test_charts_show_the_selected_layers_and_the_similarities_of_two_images():
    result, shown = random_sweep(models=2, layers=3, images=20, shown_images=6)
    page = sweep_page(result, shown, "small", "command")
    texts = drawn(page.sections[0].parts[0])
    cell = Cell(result, result.models)
    first = {(key.model, key.depth, key.matching): rsm[1, 0] for key, rsm in zip(shown.keys, shown.rsms, strict=True)}
    headings = [k for k, text in enumerate(texts) if text.startswith(f"{cell.model}, blocks.")]
    layers = [(depth, matching) for depth in (cell.depth_a, cell.depth_b) for matching in ("identity", "optimal")]
    for number, (depth, matching) in zip(headings, layers, strict=True):
        layer, *pair, said = texts[number : number + 4]
        assert layer == f"{cell.model}, blocks.{depth}"
        assert [unescape(name)[-9:] for name in pair] == [shown.named(k)[-9:] for k in shown.order[:2]]
        value = float(said.rpartition(" ")[2].replace("−", "-"))
        assert value == pytest.approx(first[cell.model, depth, matching], abs=np.ptp(shown.ranges) / 900)
    assert shown.ids[shown.order[0]][:10] in "".join(texts)
    assert "model-0" in drawn(page.sections[1].parts[0])


def test_checkpoints_have_a_chart_of_their_training():
    result, _ = random_sweep(models=3, layers=2, images=20, shown_images=6)
    steps = {f"model-{k}": StoredModel("net", 10 * k) for k in range(3)}
    page = sweep_page(result.with_steps(steps), None, "training", "command")
    (chart,) = (section.parts[0] for section in page.sections if section.title == "Training dynamics")
    texts = drawn(chart)
    assert {"blocks.0", "blocks.1", "0", "10", "20"} <= set(texts)
    rows = {(row[2], row[3], row[4]): row[5] for row in chart.table.rows}
    grid = result.grid("model-1", "model-2", "optimal")
    assert rows["optimal", "blocks.1", 10] == pytest.approx(float(grid[1, 1]))
    assert rows["identity", "blocks.0", 20] == 1.0


def test_labels_beside_an_rsm_do_not_overlap_and_the_caption_says_how_many_there_are():
    result, shown = random_sweep(models=1, layers=2, images=120, shown_images=48)
    few = shown.order.tolist()
    many = replace(shown, labels=[f"label {k:02d}" for k in range(len(shown.labels))], order=np.array(sorted(few)))
    for one, some in ((shown, False), (many, True)):
        places = sorted(row["at"] for row in packed_rsms(one)["images"] if "at" in row)
        assert np.diff(places).min() >= 11
        caption = sweep_page(result, one, "small", "command").sections[0].parts[0].caption
        count = len({one.labels[k] for k in one.order})
        assert (f"{len(places)} of {count} labels fit beside an RSM" in caption) == some
        assert (len(places) < count) == some


def test_names_keep_the_ends_in_which_they_differ():
    result, shown = random_sweep(models=1, layers=2, images=8, shown_images=4)
    ids = [f"folder/with/a/very/long/name/{'x' * 90}/{k:04d}.jpeg" for k in range(len(shown.ids))]
    labels = [f"a long label that ends in {k}" for k in range(len(shown.labels))]
    rows = packed_rsms(replace(shown, ids=ids, labels=labels))["images"]
    assert [row["lines"][-2][-9:] for row in rows] == [ids[k][-9:] for k in shown.order]
    assert len({row["beside"] for row in rows if "beside" in row}) == len([row for row in rows if "beside" in row])
    axis = sweep_page(result, shown, "small", "command").sections[1].parts[0].chart["layer"][0]["encoding"]["x"]["axis"]
    assert "slice(datum.label, -19)" in axis["labelExpr"]


def test_captions_name_menus_only_where_there_is_something_to_choose():
    assert "by menu" not in caption_of(random_sweep(models=1, layers=2, images=8, shown_images=4))
    assert "Choose the models by menu." in caption_of(random_sweep(models=2, layers=2, images=8, shown_images=4))


def caption_of(sweep):
    return sweep_page(*sweep, "small", "command").sections[0].parts[0].caption


def test_the_time_of_a_run_is_said_once(run):
    result, shown = random_sweep(models=1, layers=2, images=8, shown_images=4)
    alone = sweep_page(result, shown, "small", "command").provenance
    assert alone["Cost"].endswith("; 1.7 min in the last run")
    timed = sweep_page(result, shown, "small", "command", {"Time": "about 2 min"}).provenance
    assert "min" not in timed["Cost"]


def test_a_damaged_file_is_named(run, tmp_path):
    (tmp_path / SHOWN).write_bytes((run[0] / SHOWN).read_bytes()[:-200])
    with pytest.raises(rsm_probe.RsmProbeError, match=r"shown\.npz"):
        Shown.open(tmp_path)


def test_images_of_a_folder_are_on_the_page_as_they_are(tmp_path):
    for label in ("<script>", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for k in range(4):
            pixels = np.random.default_rng(k).integers(0, 256, (9, 9, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f'{k}"><img src=x>.png')
    images = rsm_probe.sources.as_images(tmp_path / "images")
    study = config(layers=["0"], kernels=["linear"])
    study.run(tmp_path / "run", models={"net": network()}, images=images)
    shown = Shown.open(tmp_path / "run")
    assert {one.size for one in shown.thumbnails.values()} == {(9, 9)}
    assert "<img src=x" not in write_report(study, tmp_path / "run").read_text()


def test_equal_values_have_equal_colours_and_no_difference_has_none():
    result, _ = random_sweep(models=2, layers=3, images=20, shown_images=4)
    cka = result.dataset["cka"]
    cka.values[:] = np.abs(cka.values) * 0.5 + 0.4  # nothing near 0
    matched = cka["matching_a"].values == "optimal"
    cka.values[np.ix_(matched, matched)] += 0.05  # and all differences of one sign
    from rsm_probe.studies.sweep_report.cka_grids import cka_chart

    views = cka_chart(result, None, result.models).chart["concat"]
    grids = [view["layer"][0] for view in views]
    # Some versions of Altair number the names.
    names = [re.sub(r"_\d+$", "", grid["name"]) for grid in grids]
    domains = {name: grid["encoding"]["color"]["scale"]["domain"] for name, grid in zip(names, grids, strict=True)}
    assert domains["grid_identity"] == domains["grid_semantic"] == [0.0, 1.0]
    low, high = domains["grid_difference"]
    pairs = [(a, b) for a in result.models for b in result.models]
    largest = max(np.abs((result.grid(a, b, "optimal") - result.grid(a, b)).values).max() for a, b in pairs)
    assert high == -low == pytest.approx(largest, abs=1e-3)
