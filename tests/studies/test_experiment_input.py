"""What the paper's experiments do with bad or unusual input: images, models, settings and tables."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

import rsm_probe
from rsm_probe.errors import ConfigError, ImageError, ModelError
from rsm_probe.forward.logits import logits
from rsm_probe.paper.approximation.study import ApproximationConfig
from rsm_probe.paper.outputs.study import OutputsConfig
from rsm_probe.paper.registry import PaperConfig
from rsm_probe.paper.retrieval.study import RetrievalConfig, videos
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
            "dilated: applies only to networks of a recipe",
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
    if study.study in ("sweep", "sweeps", "paper"):  # a study of several names the files of the others
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
