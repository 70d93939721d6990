"""The paper's experiments, end to end at their smallest, and what they do with bad input."""

import csv
import os
import shutil
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

import rsm_probe
from rsm_probe.captures.captured_layers import Capture
from rsm_probe.comparison.correlations import PearsonRSA
from rsm_probe.comparison.intervals import auroc
from rsm_probe.comparison.measures import MEASURES
from rsm_probe.errors import StorageError
from rsm_probe.execution.devices import find_device
from rsm_probe.forward.logits import logits
from rsm_probe.paper.outputs.divergence import jensen_shannon, probabilities
from rsm_probe.paper.registry import PaperConfig
from rsm_probe.paper.retrieval.object_counts import count_f1
from rsm_probe.paper.retrieval.study import class_counts
from rsm_probe.paper.shown import SHOWN, ShownModel
from rsm_probe.report.default import write_report
from rsm_probe.report.page import Chart
from rsm_probe.runs.images_config import ImagesConfig
from rsm_probe.sources.loading import load_model
from rsm_probe.studies.registry import read_study

ROOT = Path(__file__).parents[2]
RECIPE = {"images": "digits", "size": 16, "steps": 0, "network": {"widths": [8, 8, 16, 16], "stem_stride": 2}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All experiments by one command."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        study = read_study("configs/smoke/paper.yaml")
    finally:
        os.chdir(before)
    folder = tmp_path_factory.mktemp("runs") / "paper"
    return study, folder, study.run(folder)


@pytest.mark.slow
def test_all_experiments_run_by_one_command_and_share_their_networks(finished):
    study, folder, results = finished
    assert list(results) == ["translation", "retrieval", "outputs", "approximation"]
    assert sorted(f.name for f in (folder / "models").iterdir()) == [
        "digits-untrained.safetensors", "digits.safetensors", "scenes.safetensors",
    ]  # fmt: skip
    for name, result in results.items():
        files = {f.name for f in (folder / name).iterdir()}
        assert {"table.csv", "report.md", "config.yaml", "provenance.json", "captures", "parts"} <= files
        with (folder / name / "table.csv").open() as stream:
            assert len(list(csv.DictReader(stream))) == len(result.table)
        assert "The paper's numbers are not shown" in (folder / name / "report.md").read_text() or name == "translation"
    report = (folder / "report.md").read_text()
    assert all(title in report for title in ("Translation sensitivity", "Table 2", "Tables 1 and 4", "Table 5"))
    assert PaperConfig.parse(PaperConfig.model_validate(study.model_dump(mode="json")).model_dump()) == study


def computed(folder, *names):
    """When each file was written that holds networks, captures, or what was computed of them."""
    names = names or ("models", "captures", "parts")
    files = [path for path in folder.rglob("*") if path.is_file() and set(names) & set(path.parts)]
    assert files
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.slow
def test_run_again_they_compute_nothing(finished):
    study, folder, results = finished
    before = computed(folder)
    again = study.run(folder)
    assert computed(folder) == before
    assert {name: str(result.table) for name, result in again.items()} == {
        name: str(result.table) for name, result in results.items()
    }


@pytest.mark.slow
def test_every_figure_is_drawn(finished):
    study, folder, _ = finished
    drawn = study.figures(folder)
    wanted = ("translation-figure2-digits", "translation-separation-rbf", "retrieval-figure3", "retrieval-locations",
              "retrieval-neighbours-digits", "outputs-correlations", "outputs-pairs-01-scenes",
              "approximation-figure5-digits", "approximation-figure6-digits")  # fmt: skip
    assert set(wanted) <= set(drawn)
    for name in wanted:
        FigureCanvasAgg(drawn[name]).draw()


def refuses(*arguments, **keywords):
    raise AssertionError("a page computes nothing")


@pytest.mark.slow
def test_a_page_shows_what_the_run_stored_and_computes_nothing(finished, monkeypatch):
    study, folder, results = finished
    for name in ("load", "load_source"):
        monkeypatch.setattr(ImagesConfig, name, refuses)
    monkeypatch.setattr(Capture, "open", refuses)
    monkeypatch.setattr("rsm_probe.matching.matches.match", refuses)
    html = write_report(study, folder).read_text(encoding="utf-8")
    pages = {name: part.page(folder / name) for name, part in study.parts(folder).items()}
    for name, result in results.items():
        page = pages[name]
        assert f"{name}: {page.title}" in html
        assert escape(page.answer) in html
        assert page.command == f"rsm-probe run {folder / name}/config.yaml --out {folder / name}"
        assert {"Models", "Time", "Versions"} <= page.provenance.keys()
        assert "digits" in page.provenance["Models"]
        first = next(part for section in page.sections for part in section.parts if isinstance(part, Chart))
        assert first.table is not None
        assert len(first.table.rows) == len(result.table)
    titles = [section.title for section in pages["retrieval"].sections]
    assert "Queries and their nearest images" in titles
    assert "Scores by the number of locations" in titles
    assert "Certificate" in pages["retrieval"].provenance
    assert "Which location was matched to which" in [section.title for section in pages["translation"].sections]
    assert len(html) < 15e6


@pytest.mark.slow
def test_the_pictured_neighbours_are_those_of_the_table(finished):
    study, folder, _ = finished
    runner = study.studies["retrieval"].runner(folder / "retrieval")
    subject = next(runner.subjects())
    shown = ShownModel.read(subject.folder / SHOWN)
    lines = shown.facts["queries"]
    assert {line["query"] for line in lines} >= set(study.studies["retrieval"].pictured)
    assert {line["matching"] for line in lines} == {"identity", "optimal"}
    database = subject.images["database"]
    neighbours = runner.neighbours(subject, 0)
    for line in lines:
        expected = neighbours[line["matching"], "cosine"][32][line["query"]]
        assert [one["index"] for one in line["neighbours"]] == expected.tolist()
        for one in line["neighbours"]:
            assert shown.images[f"d{one['index']}"].name == database.ids[one["index"]]
        assert line["lines"], "the query is joined with its nearest image"


@pytest.mark.slow
def test_a_finished_run_of_an_earlier_version_has_a_page_without_pictures(finished, tmp_path):
    study, folder, _ = finished
    shutil.copytree(folder / "outputs", tmp_path / "run")
    for file in (tmp_path / "run").rglob(SHOWN):
        file.unlink()
    page = study.studies["outputs"].page(tmp_path / "run")
    assert any("run stored none" in note for note in page.notes)
    assert page.answer == study.studies["outputs"].page(folder / "outputs").answer


@pytest.mark.slow
def test_models_are_compared_on_the_same_queries(finished, tmp_path):
    study, folder, _ = finished
    config = study.studies["retrieval"]
    (entry,) = config.models
    both = (entry.model_copy(update={"dilated": (0,), "control": True}),)
    config = config.model_copy(update={"models": both, "networks": str(folder / "models")})
    result = config.run(tmp_path / "run")
    figure = config.figures(tmp_path / "run")["models"]
    titles = [title for ax in figure.axes if (title := ax.get_title()) and not title[0].isdigit()]
    assert titles == ["digits\nnone", "digits\nPI", "digits-untrained\nnone", "digits-untrained\nPI"]
    assert {row["model"] for row in result.table} == {"digits", "digits-untrained"}


@pytest.mark.slow
def test_translation_states_what_the_rsms_of_its_crops_say(finished):
    study, folder, results = finished
    config = study.studies["translation"]
    (subject, _untrained) = config.runner(folder / "translation").subjects()
    layer = subject.layers["crops"]["layer1.0"]
    images, n = subject.images["crops"], config.batch
    positive, negative = [], []
    for b in range(config.batches):
        numbers = [*range(b * n, b * n + n), *range(len(images) // 2 + b * n, len(images) // 2 + b * n + n)]
        tokens = torch.cat([layer.tokens(slice(k, k + 1)) for k in numbers])
        values = rsm_probe.rsm(tokens, kernel="rbf", centering="location-mean").values
        for i, j in zip(*np.triu_indices(2 * n, 1), strict=True):
            names = images.ids[numbers[i]].rpartition("/")[0], images.ids[numbers[j]].rpartition("/")[0]
            if names[0] == names[1]:
                positive.append(values[i, j])
            elif images.labels[numbers[i]] != images.labels[numbers[j]]:
                negative.append(values[i, j])
    row = results["translation"].only(model="digits", layer="layer1.0", kernel="rbf", matching="optimal")
    assert row["auroc"] == pytest.approx(auroc(np.array(positive), np.array(negative)), abs=2e-3)
    assert (row["overlapping_pairs"], row["unrelated_pairs"]) == (len(positive), len(negative))
    assert row["low"] <= row["auroc"] <= row["high"]
    identity = results["translation"].only(model="digits", layer="layer1.0", kernel="rbf", matching="identity")
    assert row["gain"] == pytest.approx(row["auroc"] - identity["auroc"])


@pytest.mark.slow
def test_retrieval_states_the_f1_of_the_nearest_image(finished):
    study, folder, results = finished
    config = study.studies["retrieval"]
    subject = next(config.runner(folder / "retrieval").subjects())
    queries, database = subject.images["queries"], subject.images["database"]
    assert not set(queries.ids) & set(database.ids)
    layers = subject.layers["queries"]["layer4.0"], subject.layers["database"]["layer4.0"]
    values = rsm_probe.rsm(layers[0].tokens(), layers[1].tokens(), kernel="cosine", centering="location-mean").values
    truth = count_f1(*class_counts([queries, database]))
    for size in (16, 32):
        scores = truth[np.arange(8), values[:, :size].argmax(axis=1)]
        row = results["retrieval"].only(model="digits", kernel="cosine", matching="optimal", database=size)
        assert row["score"] == pytest.approx(scores.mean())
        order = np.argsort(-values[:, :size], axis=1)[:, :5]
        assert row["best"] == pytest.approx(np.take_along_axis(truth, order, axis=1).max(axis=1).mean())
    assert {row["locations"] for row in results["retrieval"].table} == {9, 36}


@pytest.mark.slow
def test_outputs_state_the_correlation_over_pairs(finished):
    study, folder, results = finished
    config = study.studies["outputs"]
    _, subject = config.runner(folder / "outputs").subjects()
    assert subject.title == "scenes"
    network = load_model(folder / "models" / "scenes.safetensors")
    network.module.to(find_device(config.device))  # where the study ran: convolutions of a GPU are in TF32 by default
    images = subject.images["images"]
    answers = logits(network, images, np.arange(len(images)))
    assert answers.shape == (20, 10, 4)  # ten questions
    divergence = jensen_shannon(probabilities(answers))
    layer = subject.layers["images"]["layer4.0"]
    values = rsm_probe.rsm(layer.tokens(), kernel="cosine", centering="location-mean").values
    triangle = np.triu_indices(20, 1)
    row = results["outputs"].only(model="scenes", kernel="cosine", matching="optimal")
    expected = np.corrcoef(divergence[triangle], values[triangle])[0, 1]
    assert row["pearson"] == pytest.approx(expected, abs=1e-5)
    assert row["pearson_low"] <= row["pearson"] <= row["pearson_high"]


@pytest.mark.slow
def test_shares_of_the_optimum_are_ratios_of_sums(finished):
    _, _, results = finished
    for row in results["approximation"].table:
        assert 0 < row["share"] <= 1 + 1e-6
        assert row["milliseconds"] > 0
        if row["method"] in ("optimal", "scipy"):
            assert row["share"] == pytest.approx(1.0, abs=1e-6)
    assert results["approximation"].only(layer="layer1.0", method="scipy")["timed"] == 3
    assert results["approximation"].only(layer="layer1.0", method="identity")["share"] < 0.99


@pytest.mark.slow
def test_exact_top_finds_the_same_neighbours(finished, tmp_path):
    study, folder, results = finished
    config = study.studies["retrieval"].model_copy(
        update={"exact_top": True, "tile": None, "database_sizes": (32,), "networks": str(folder / "models")}
    )
    found = config.run(tmp_path / "exact")
    for row in found.table:
        if row["kernel"] != "rbf":  # the width of a tile changes the order between tiles
            keys = {key: row[key] for key in ("model", "kernel", "matching", "database")}
            assert row["score"] == results["retrieval"].only(**keys)["score"]


@pytest.mark.slow
def test_parts_of_other_networks_or_images_are_not_taken(finished, tmp_path):
    study, folder, results = finished
    config = study.studies["approximation"]
    shutil.copytree(folder / "approximation", tmp_path / "run")
    (entry,) = config.models
    other = entry.model_copy(update={"recipe": entry.recipe.model_copy(update={"steps": 12})})
    changed = config.model_copy(update={"models": (other,), "networks": str(tmp_path / "models")})
    with pytest.raises(StorageError, match="different models"):
        changed.run(tmp_path / "run")
    # As if somebody had removed the captures, and kept what was computed of them.
    shutil.rmtree(tmp_path / "run" / "captures")
    (tmp_path / "run" / "config.yaml").write_text(changed.to_yaml())
    found, fresh = (changed.run(tmp_path / name) for name in ("run", "fresh"))
    shares = [[row["share"] for row in result.table] for result in (found, fresh, results["approximation"])]
    assert shares[0] == shares[1] != shares[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("translation", {"matchings": ("late-interaction",), "kernels": ("cosine", "rbf")}),
        # Nothing to gain over.
        ("translation", {"matchings": ("optimal", "pooled")}),
        ("retrieval", {"matchings": ("optimal", "pooled")}),
        ("outputs", {"matchings": ("optimal", "pooled")}),
        ("outputs", {"matchings": ("pooled",)}),
    ],
)
def test_what_has_no_matching_to_show_is_reported_all_the_same(finished, tmp_path, name, settings):
    study, folder, _ = finished
    config = study.studies[name]
    # One model of each study: what is reported is the same for all.
    config = config.model_copy(update={**settings, "models": config.models[:1], "networks": str(folder / "models")})
    assert config.run(tmp_path / "run").table
    assert config.figures(tmp_path / "run")


class Interrupted(PearsonRSA):
    """A measure during which the user interrupts the run."""

    def grid(self, a, b, weights=None):
        raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_run_continues(finished, tmp_path, monkeypatch):
    study, folder, results = finished
    config = study.studies["outputs"].model_copy(update={"networks": str(folder / "models")})
    with monkeypatch.context() as patched:
        patched.setitem(MEASURES, "rsa-pearson", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            config.run(tmp_path / "outputs")
        with pytest.raises(StorageError, match="no finished run"):
            config.open(tmp_path / "outputs")
        # Of the first model all pairs are there, and all logits.
        before = computed(tmp_path / "outputs")
        with pytest.raises(KeyboardInterrupt):
            config.run(tmp_path / "outputs")
        assert computed(tmp_path / "outputs") == before
    assert str(config.run(tmp_path / "outputs").table) == str(results["outputs"].table)
    assert computed(tmp_path / "outputs").items() > before.items()
    with pytest.raises(StorageError, match="different kernels"):
        config.model_copy(update={"kernels": ("rbf",)}).run(tmp_path / "outputs")


@pytest.mark.slow
def test_a_run_of_another_study_is_not_taken_over(finished):
    study, folder, _ = finished
    with pytest.raises(StorageError, match="'translation'"):
        study.studies["outputs"].run(folder / "translation")
    with pytest.raises(StorageError, match="'paper'"):
        study.studies["outputs"].run(folder)


@pytest.mark.slow
def test_sets_whose_matrices_do_not_fit_are_refused_before_they_are_matched(finished, tmp_path):
    study, folder, _ = finished
    config = study.studies["outputs"].model_copy(update={"networks": str(folder / "models"), "memory": "1kB"})
    with pytest.raises(rsm_probe.errors.CostError, match=r"all pairs of 24 images take about .* above memory: 1kB"):
        config.run(tmp_path / "run")
