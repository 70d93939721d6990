"""The paper's experiments, end to end at their smallest, and what they do with bad input."""

import csv
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

import rsm_probe
from rsm_probe.comparison.correlations import PearsonRSA
from rsm_probe.comparison.intervals import auroc
from rsm_probe.comparison.measures import MEASURES
from rsm_probe.errors import ConfigError, ImageError, ModelError, StorageError
from rsm_probe.forward.logits import logits
from rsm_probe.paper.approximation.study import ApproximationConfig
from rsm_probe.paper.outputs.divergence import jensen_shannon, probabilities
from rsm_probe.paper.outputs.study import OutputsConfig
from rsm_probe.paper.registry import PaperConfig
from rsm_probe.paper.retrieval.object_counts import count_f1
from rsm_probe.paper.retrieval.study import RetrievalConfig, class_counts, videos
from rsm_probe.paper.translation.study import TranslationConfig
from rsm_probe.runs.tables import TableResult, markdown
from rsm_probe.sources import ImageSet, from_tensor
from rsm_probe.sources.images.registry import IMAGE_SETS, NamedImageSet
from rsm_probe.sources.loading import load_model
from rsm_probe.sources.models.libraries import LIBRARIES
from rsm_probe.sources.models.loaded_model import to_tensor
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
        assert (
            "The paper's numbers are not shown" in (folder / name / "report.md").read_text()
            or name == "translation"
        )
    report = (folder / "report.md").read_text()
    assert all(title in report for title in ("Translation sensitivity", "Table 2", "Tables 1 and 4", "Table 5"))
    assert PaperConfig.parse(PaperConfig.model_validate(study.model_dump(mode="json")).model_dump()) == study


def computed(folder, *names):
    """When each file was written that holds networks, captures, or what was computed of them."""
    names = names or ("models", "captures", "parts")
    files = [path for path in folder.rglob("*") if path.is_file() and set(names) & set(path.parts)]
    assert files
    return {path: path.stat().st_mtime_ns for path in files}


def test_run_again_they_compute_nothing(finished):
    study, folder, results = finished
    before = computed(folder)
    again = study.run(folder)
    assert computed(folder) == before
    assert {name: str(result.table) for name, result in again.items()} == {
        name: str(result.table) for name, result in results.items()
    }


def test_every_figure_is_drawn(finished):
    study, folder, _ = finished
    drawn = study.figures(folder)
    wanted = ("translation-figure2-digits", "translation-separation-rbf", "retrieval-figure3", "retrieval-locations",
              "retrieval-neighbours-digits", "outputs-correlations", "outputs-pairs-01-scenes",
              "approximation-figure5-digits", "approximation-figure6-digits")  # fmt: skip
    assert set(wanted) <= set(drawn)
    for name in wanted:
        FigureCanvasAgg(drawn[name]).draw()


def test_models_are_compared_on_the_same_queries(finished, tmp_path):
    study, folder, _ = finished
    config = study.studies["retrieval"]
    (entry,) = config.models
    both = (entry.model_copy(update={"dilated": (0,), "control": True}),)
    config = config.model_copy(update={"models": both, "networks": str(folder / "models")})
    result = config.run(tmp_path / "run")
    figure = config.figures(tmp_path / "run")["models"]
    titles = [ax.get_title() for ax in figure.axes if ax.get_title() and not ax.get_title().isdigit()]
    assert titles == ["digits, none", "digits, PI", "digits-untrained, none", "digits-untrained, PI"]
    assert {row["model"] for row in result.table} == {"digits", "digits-untrained"}


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


def test_outputs_state_the_correlation_over_pairs(finished):
    study, folder, results = finished
    config = study.studies["outputs"]
    _, subject = config.runner(folder / "outputs").subjects()
    assert subject.title == "scenes"
    network = load_model(folder / "models" / "scenes.safetensors")
    images = subject.images["images"]
    answers = logits(network, images, np.arange(len(images)))
    assert answers.shape == (20, 10, 4)  # ten questions
    divergence = jensen_shannon(probabilities(answers))
    layer = subject.layers["images"]["layer4.0"]
    values = rsm_probe.rsm(layer.tokens(), kernel="cosine", centering="location-mean").values
    triangle = np.triu_indices(20, 1)
    row = results["outputs"].only(model="scenes", kernel="cosine", matching="optimal")
    expected = np.corrcoef(divergence[triangle], values[triangle])[0, 1]
    # A GPU ran the study, and its convolutions are in TF32 by PyTorch's default; these answers are the CPU's.
    assert row["pearson"] == pytest.approx(expected, abs=1e-3 if torch.cuda.is_available() else 1e-5)
    assert row["pearson_low"] <= row["pearson"] <= row["pearson_high"]


def test_shares_of_the_optimum_are_ratios_of_sums(finished):
    _, _, results = finished
    for row in results["approximation"].table:
        assert 0 < row["share"] <= 1 + 1e-6
        assert row["milliseconds"] > 0
        if row["method"] in ("optimal", "scipy"):
            assert row["share"] == pytest.approx(1.0, abs=1e-6)
    assert results["approximation"].only(layer="layer1.0", method="scipy")["timed"] == 3
    assert results["approximation"].only(layer="layer1.0", method="identity")["share"] < 0.99


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


def test_parts_of_other_networks_or_images_are_not_taken(finished, tmp_path):
    study, folder, results = finished
    config = study.studies["approximation"]
    shutil.copytree(folder / "approximation", tmp_path / "run")
    (entry,) = config.models
    other = entry.model_copy(update={"recipe": entry.recipe.model_copy(update={"steps": 12})})
    changed = config.model_copy(update={"models": (other,), "networks": str(tmp_path / "models")})
    with pytest.raises(StorageError, match="other models"):
        changed.run(tmp_path / "run")
    # As if somebody had removed the captures, and kept what was computed of them.
    shutil.rmtree(tmp_path / "run" / "captures")
    (tmp_path / "run" / "config.yaml").write_text(changed.to_yaml())
    found, fresh = (changed.run(tmp_path / name) for name in ("run", "fresh"))
    shares = [[row["share"] for row in result.table] for result in (found, fresh, results["approximation"])]
    assert shares[0] == shares[1] != shares[2]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("translation", {"matchings": ("late-interaction",), "kernels": ("cosine", "rbf")}),
        ("translation", {"matchings": ("optimal", "pooled")}),  # nothing to gain over
        ("retrieval", {"matchings": ("optimal", "pooled")}),
        ("outputs", {"matchings": ("optimal", "pooled")}),
        ("outputs", {"matchings": ("pooled",)}),
    ],
)
def test_what_has_no_matching_to_show_is_reported_all_the_same(finished, tmp_path, name, settings):
    study, folder, _ = finished
    config = study.studies[name].model_copy(update={**settings, "networks": str(folder / "models")})
    assert config.run(tmp_path / "run").table
    assert config.figures(tmp_path / "run")


class Interrupted(PearsonRSA):
    """A measure during which the user interrupts the run."""

    def grid(self, a, b, weights=None):
        raise KeyboardInterrupt


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
    with pytest.raises(StorageError, match="other kernels"):
        config.model_copy(update={"kernels": ("rbf",)}).run(tmp_path / "outputs")


def test_a_run_of_another_study_is_not_taken_over(finished):
    study, folder, _ = finished
    with pytest.raises(StorageError, match="'translation'"):
        study.studies["outputs"].run(folder / "translation")
    with pytest.raises(StorageError, match="'paper'"):
        study.studies["outputs"].run(folder)


# Bad input


def retrieval_of(tmp_path, monkeypatch, images, **settings):
    monkeypatch.setitem(IMAGE_SETS, "made", NamedImageSet(lambda: images))
    config = RetrievalConfig.parse(
        {"models": [{"recipe": RECIPE}], "images": {"source": "made"}, "layers": "layer4.0", "queries": 2,
         "database_sizes": [3], "pictured": [0], "repeats": 20, **settings}
    )  # fmt: skip
    return config.run(tmp_path / "run")


def pictures(notes):
    torch.manual_seed(0)
    images = from_tensor(torch.randn(len(notes), 3, 32, 32))
    return ImageSet("made", images.ids, images.load, annotations=notes)


def test_a_query_without_candidates_of_another_video_does_not_count(tmp_path, monkeypatch):
    images = pictures([{"counts": {"cup": 1}, "video": name} for name in "aaaab"])
    rows = retrieval_of(tmp_path, monkeypatch, images).table
    order, names = np.random.default_rng(0).permutation(5), videos(images)
    counted = sum(any(names[d] != names[q] for d in order[2:]) for q in order[:2])
    assert 0 < counted < 2
    assert {row["queries"] for row in rows} == {counted}
    assert all(row["score"] == 1.0 for row in rows)  # one class, and one object in each
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(ImageError, match="no query of made has a candidate"):
        retrieval_of(tmp_path, monkeypatch, pictures([{"counts": {"cup": 1}, "video": "a"}] * 5))


def test_tensors_are_pictured(tmp_path, monkeypatch):
    notes = [{"counts": {"cup": 1}}] * 5
    result = retrieval_of(tmp_path, monkeypatch, pictures(notes), matchings=["identity"], kernels=["linear"])
    config = read_study(tmp_path / "run" / "config.yaml")
    figure = config.figures(tmp_path / "run")["neighbours-resnet"]
    FigureCanvasAgg(figure).draw()
    shown = [np.asarray(ax.images[0].get_array()) for ax in figure.axes if ax.images]
    assert [picture.shape for picture in shown[:4]] == [(32, 32, 3)] * 4
    query = next(config.runner(tmp_path / "run").subjects()).images["queries"][0]
    pixels = query.movedim(0, -1).numpy()
    np.testing.assert_allclose(shown[0], (pixels - pixels.min()) / np.ptp(pixels), atol=1e-6)
    assert len(result.table) == 1


def test_a_share_of_what_does_not_exceed_0_is_no_share(tmp_path):
    config = ApproximationConfig.parse({"models": [{"recipe": RECIPE}], "images": {"source": "digits"}, "repeats": 20})
    values = {"optimal": np.array([-1.0, -2.0]), "greedy": np.array([-2.0, -3.0])}
    runner = config.runner(tmp_path)
    found = runner.share(values, "greedy")
    assert all(np.isnan(found[key]) for key in ("share", "low", "high", "share_5", "share_95"))
    mixed = runner.share({"optimal": np.array([4.0, -1.0]), "greedy": np.array([3.0, -2.0])}, "greedy")
    assert mixed["share"] == pytest.approx(1 / 3)
    assert mixed["share_5"] == mixed["share_95"] == 0.75


def test_images_whose_objects_nobody_knows(tmp_path, monkeypatch):
    with pytest.raises(ImageError, match="made has no object annotations"):
        retrieval_of(tmp_path, monkeypatch, pictures([{}] * 5))
    with pytest.raises(ImageError, match="no object in any image"):
        retrieval_of(tmp_path, monkeypatch, pictures([{"counts": {}}] * 5))
    with pytest.raises(ImageError, match="has 4 images, but 2 queries and a database of 3 need 5"):
        retrieval_of(tmp_path, monkeypatch, pictures([{"counts": {"cup": 1}}] * 4))


def test_images_without_objects_are_alike_and_unlike_all_others(tmp_path, monkeypatch):
    notes = [{"counts": {}}, {"counts": {"cup": 1}}] * 5
    rows = retrieval_of(tmp_path, monkeypatch, pictures(notes), queries=4, database_sizes=[6], score="iou").table
    assert all(0 <= row["score"] <= 1 for row in rows)


class _Answers(nn.Module):
    """A network whose answer is made of one convolution's output."""

    def __init__(self, answer):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.answer = answer

    def forward(self, x):
        return self.answer(self.conv(x))


def test_sets_whose_matrices_do_not_fit_are_refused_before_they_are_matched(finished, tmp_path):
    study, folder, _ = finished
    config = study.studies["outputs"].model_copy(update={"networks": str(folder / "models"), "memory": "1kB"})
    with pytest.raises(rsm_probe.errors.CostError, match=r"all pairs of 24 images take about .* above memory: 1kB"):
        config.run(tmp_path / "run")


def test_a_model_without_a_head_is_no_classifier():
    import timm

    model = load_model(timm.create_model("resnet10t", num_classes=0))
    with pytest.raises(ModelError, match="no classification head"):
        logits(model, from_tensor(torch.randn(2, 3, 32, 32)), np.arange(2))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x, r"not a classifier: for 2 images its output has shape \(2, 4, 8, 8\)"),
        (
            lambda x: {"features": x},
            "its output is a dict without logits; use a whole model with a classification head",
        ),
        (lambda x: x.mean((2, 3)).softmax(1), "net: these are probabilities"),
        (lambda x: x.mean((2, 3))[:, :1], "net: a classifier with a single class"),
        (lambda x: x.mean((2, 3)) * torch.nan, "net: logits of image 0 are not finite"),
        (lambda x: x.mean((2, 3)) * 0, "net: the classifier gives the same output for all images"),
    ],
    ids=["map", "dictionary", "probabilities", "one class", "NaN", "constant"],
)
def test_what_is_no_classifier_is_refused(tmp_path, monkeypatch, answer, message):
    images = from_tensor(torch.randn(6, 3, 8, 8))
    monkeypatch.setitem(IMAGE_SETS, "made", NamedImageSet(lambda: images))
    monkeypatch.setitem(LIBRARIES, "made", lambda title, pretrained, trust: (_Answers(answer), to_tensor))
    config = OutputsConfig.parse(
        {"models": [{"name": "net", "source": "made:net"}], "images": {"source": "made"}, "layers": "conv"}
    )
    with pytest.raises((ModelError, rsm_probe.errors.ComparisonError), match=message):
        config.run(tmp_path / "run")
    if "same output" not in message:  # which only all images show
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (TranslationConfig, {"matchings": ["optimum"]}, "matchings: unknown matching 'optimum'; nearest: 'optimal'"),
        (TranslationConfig, {"images": {"source": "photos", "count": 50}}, "20 batches of 10 need 200"),
        (
            TranslationConfig,
            {"matchings": ["late-interaction"], "kernels": ["rbf"]},
            "none of .* can be combined with the kernels",
        ),
        (RetrievalConfig, {"exact_top": True, "tile": 100}, "exact_top: needs a single database size"),
        (RetrievalConfig, {"pictured": [500]}, "pictured: must be below the number of queries, 200"),
        (ApproximationConfig, {"solvers": ["optimal"]}, "no method may be named twice"),
        (ApproximationConfig, {"centering": "location-mean"}, "makes shares of the optimum meaningless"),
        (ApproximationConfig, {"matchings": ["late-interaction"]}, "does not match locations one to one"),
        (OutputsConfig, {"models": [{"recipe": RECIPE, "images": {"sourse": "photos"}}]}, "sourse: unknown key"),
        (
            OutputsConfig,
            {"models": [{"source": "timm:resnet18", "dilated": [1]}]},
            "dilated: is for networks of a recipe",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        kind.parse({"models": [{"recipe": RECIPE}], "images": {"source": "photos"}, **settings})


def test_too_few_images_for_the_batches(tmp_path):
    config = TranslationConfig.parse(
        {"models": [{"recipe": RECIPE}], "images": {"source": "digits", "count": None, "split": "test"}, "batches": 100}
    )
    with pytest.raises(ImageError, match="has 360 images, but 100 batches need 1000"):
        config.run(tmp_path / "run")


def test_a_study_of_several_names_what_is_wrong():
    with pytest.raises(ConfigError, match="x: study: must be one of translation, retrieval"):
        PaperConfig.parse({"studies": {"x": {"study": "sweep"}}})
    with pytest.raises(ConfigError, match="names become folders"):
        PaperConfig.parse({"studies": {"../x": {"study": "outputs"}}})
    with pytest.raises(ConfigError, match=r"studies\.x is not valid"):
        PaperConfig.parse({"studies": {"x": {"study": "outputs", "modells": []}}})


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*_paper.yaml")), ids=lambda file: file.stem)
def test_the_papers_settings_are_those_of_its_configurations(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_study(file)
    if study.study in ("sweep", "sweeps"):
        return
    assert study.seed == 0
    if study.study == "approximation":
        assert 512 in study.windows
        return
    assert study.centering == "location-mean"
    assert {"identity", "batch-optimal"} <= set(study.matchings)
    assert "optimal" in study.matchings or "sam" in file.stem
    if study.study != "translation":
        assert study.tile == 100
    methods = {key[0]: found.matching for key, found in study.rules().items()}
    assert methods["batch-optimal"].window == 512


def test_tables_say_where_the_paper_has_a_number():
    from rsm_probe.paper.published_numbers import TABLE1, correlation_number, retrieval_number

    assert retrieval_number("egoobjects", "hf:facebook/sam-vit-base", 5000, "cosine", "batch-optimal") == 0.804
    assert retrieval_number("cityscapes", "hf:google/bit-50", 2975, "rbf", "identity") == 0.684
    assert np.isnan(retrieval_number("scenes", "hf:google/bit-50", 5000, "rbf", "identity"))
    assert np.isnan(retrieval_number("egoobjects", None, 5000, "rbf", "identity"))
    assert correlation_number(TABLE1, "hf-classifier:microsoft/resnet-50", "linear", "optimal") == -0.270
    assert np.isnan(correlation_number(TABLE1, "hf-classifier:microsoft/resnet-50", "linear", "pooled"))


def test_tables_in_markdown_and_on_disk(tmp_path):
    assert markdown(["a", "b"], [["x", 1.23456], ["y", float("nan")]]) == (
        "| a | b |\n| --- | ---: |\n| x | 1.235 |\n| y | - |\n"
    )
    table = TableResult([{"a": "x", "b": 1.0}, {"a": "y", "b": float("nan")}], tmp_path)
    table.save("# report\n")
    again = TableResult.open(tmp_path)
    assert np.isnan(again.only(a="y")["b"])
    with pytest.raises(rsm_probe.errors.ComparisonError, match="0 rows"):
        again.only(a="z")


# What computes; reports and figures of results need none of it.
COMPUTES = ("matching", "pairs", "neighbours", "captures", "sources.models", "forward", "streaming.layer_sweep")


SHOWS = [file for file in Path(rsm_probe.__file__).parent.glob("paper/*/*.py") if file.stem in ("report", "figures")]


@pytest.mark.parametrize("file", SHOWS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_reports_and_figures_only_show_what_results_hold(file):
    modules = re.findall(r"^(?:from|import) rsm_probe\.(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert modules
    assert not [name for name in modules if name.startswith(COMPUTES) or name.endswith(".study")]
