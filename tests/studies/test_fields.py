"""What the keys of studies may hold: every study refuses what is wrong, and names the place."""

import math

import pytest

from rsm_probe.errors import ConfigError
from rsm_probe.paper.approximation.study import ApproximationConfig
from rsm_probe.paper.outputs.study import OutputsConfig
from rsm_probe.paper.registry import PaperConfig
from rsm_probe.paper.retrieval.study import RetrievalConfig
from rsm_probe.paper.translation.study import TranslationConfig
from rsm_probe.runs.images_config import ImagesConfig
from rsm_probe.runs.model_config import ModelConfig
from rsm_probe.studies.pairs import PairsConfig
from rsm_probe.studies.sweep import SweepConfig
from rsm_probe.studies.sweeps import SweepsConfig

STUDIES = [SweepConfig, PairsConfig, TranslationConfig, RetrievalConfig, OutputsConfig, ApproximationConfig]
PLAIN = {"models": [{"name": "net", "recipe": {"steps": 0}}], "images": {"source": "digits", "count": 8}}


def refusal(kind, **settings):
    base = {**PLAIN, "images": {"source": "photos"}} if kind is TranslationConfig else PLAIN
    with pytest.raises(ConfigError) as caught:
        kind.parse({**base, **settings})
    return str(caught.value)


@pytest.mark.parametrize("kind", STUDIES)
@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("workers", [0, -1, True, 1.5, math.nan, math.inf]),
        ("batch_size", [0, True, 2.5]),
        ("memory", ["", "0GB", -1, True, math.nan, "9" * 400 + "GB", "two"]),
        ("layers", [[], "", [""], ["blocks", "blocks"], 3, True]),
        ("kernels", [[], ["linear", "linear"], ["line"], "linear", None]),
        ("networks", ["", "s3://bucket/models", "file:/models", "http://host/models", 3]),
        ("device", [3, True]),
        ("models", [[], PLAIN["models"] * 2]),
    ],
)
def test_values_that_no_study_takes(kind, key, values):
    for value in values:
        assert f"\n  {key}" in refusal(kind, **{key: value}), value


@pytest.mark.parametrize("kind", STUDIES)
def test_matchings_are_named_once(kind):
    name = "identity" if kind is not ApproximationConfig else "greedy"
    assert f"matchings: {name!r} occurs more than once" in refusal(kind, matchings=[name, name])
    assert "matchings: " in refusal(kind, matchings=[])


@pytest.mark.parametrize(
    ("kind", "key", "values"),
    [
        (SweepConfig, "max_hours", [math.nan, math.inf, -1, 0, True, "long"]),
        (PairsConfig, "max_hours", [math.nan, -math.inf, -1, 0, False]),
        (SweepConfig, "batch_size", [1]),
        (SweepConfig, "seed", [-1, 2**63, True, 0.5]),
        (OutputsConfig, "seed", [-1, 2**70, False]),
        (SweepConfig, "estimators", [["unbiased", "unbiased"], [], ["best"]]),
        (SweepConfig, "keep", [["a", "a"]]),
        (OutputsConfig, "level", [0, 1, math.nan, -0.5, True]),
        (OutputsConfig, "repeats", [1, 10**12, True]),
        (OutputsConfig, "tile", [0, True]),
        (RetrievalConfig, "database_sizes", [[], [5, 5], [0], [10**12]]),
        (RetrievalConfig, "pictured", [[0, 0], [-1], [True]]),
        (RetrievalConfig, "top", [0, True]),
        (RetrievalConfig, "queries", [0, 10**12, True]),
        (ApproximationConfig, "windows", [[128, 128], [0]]),
        (ApproximationConfig, "solvers", [["lap", "lap"]]),
        (TranslationConfig, "crop", [64 + 20, 42, 10**9]),
        (TranslationConfig, "batch", [1, True]),
        (PairsConfig, "store", ["", "s3:/bucket", "nonsense://bucket"]),
    ],
)
def test_values_that_one_study_does_not_take(kind, key, values):
    for value in values:
        message = refusal(kind, **{key: value})
        assert f"  {key}" in message or f"  (top level): {key}" in message, value


@pytest.mark.parametrize(
    ("kind", "data", "place"),
    [
        (ImagesConfig, {"source": "digits", "size": 10**6}, "size"),
        (ImagesConfig, {"source": "scenes", "count": 10**12}, "count"),
        (ImagesConfig, {"source": "scenes", "count": True}, "count"),
        (ImagesConfig, {"source": "digits", "seed": -1}, "seed"),
        (ImagesConfig, {"source": ""}, "source"),
        (ModelConfig, {"recipe": {}, "seeds": [0, 0]}, "seeds"),
        (ModelConfig, {"recipe": {}, "seeds": []}, "seeds"),
        (ModelConfig, {"recipe": {}, "seeds": [2**64]}, "seeds"),
        (ModelConfig, {"recipe": {}, "dilated": [1, 1]}, "dilated"),
        (ModelConfig, {"recipe": {}, "layers": []}, "layers"),
        (ModelConfig, {"recipe": {}, "name": "x" * 501}, "name"),
        (ModelConfig, {"recipe": {}, "name": "net.partial"}, "name"),
        (ModelConfig, {"recipe": {}, "name": "net-dilated1"}, "name"),
    ],
)
def test_values_that_entries_do_not_take(kind, data, place):
    with pytest.raises(ConfigError, match=rf"\n  (\(top level\): )?{place}"):
        kind.parse(data)


@pytest.mark.parametrize(
    "models",
    [
        [{"name": "net", "seeds": [0, 1]}, {"name": "net-1"}],
        [{"name": "net", "control": True}, {"name": "net-untrained"}],
        [{}, {}],
        [{"recipe": None, "source": "timm:resnet18"}, {"recipe": None, "source": "torchvision:resnet18"}],
    ],
)
def test_models_of_one_name_are_refused_before_anything_is_loaded(models):
    models = [{"recipe": {"steps": 0}, **model} for model in models]
    for kind in STUDIES:
        assert "models: two models are called" in refusal(kind, models=models)


def test_a_captured_database_is_no_model():
    models = [{"name": name, "recipe": {"steps": 0}} for name in ("net", "net-database")]
    assert PairsConfig.parse({**PLAIN, "models": models})
    assert "'net-database'" in refusal(PairsConfig, models=models, database={"source": "digits"})


@pytest.mark.parametrize("name", ["..", "a/b", "a\\b", ".a", "con", "", "a.", "x" * 300, "Figures", "a|b"])
def test_names_of_folders_stay_in_the_run_folder(name):
    outputs = {"study": "outputs", **PLAIN}
    with pytest.raises(ConfigError, match="names become folders"):
        PaperConfig.parse({"studies": {name: outputs}})
    sweep = {**PLAIN, "kernels": ["linear"]}
    with pytest.raises(ConfigError, match="names become folders"):
        SweepsConfig.parse({"figure": "figure15", "sweeps": {name: sweep}})


def test_two_folders_never_differ_in_case_alone():
    with pytest.raises(ConfigError, match="each name once"):
        PaperConfig.parse({"studies": {name: {"study": "outputs", **PLAIN} for name in ("Out", "out")}})
