"""What CONTRIBUTING.md says about adding things: each example is one file with one line that registers it, and runs."""

import re
import runpy
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml

import rsm_probe
from rsm_probe.comparison import MEASURES
from rsm_probe.errors import ConfigError
from rsm_probe.matching import METHODS
from rsm_probe.paper import EXPERIMENTS
from rsm_probe.runs.images_config import ImagesConfig
from rsm_probe.runs.run_folder import save_figures
from rsm_probe.sources import IMAGE_SETS, LIBRARIES
from rsm_probe.sources.training.recipe import TrainingConfig
from rsm_probe.studies import STUDIES, read_study

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
REGISTRIES = {"shift": METHODS, "stripes": IMAGE_SETS, "largest-difference": MEASURES, "plain": LIBRARIES}
REGISTRIES["norms"] = EXPERIMENTS
SETTINGS = {
    "models": [
        {"name": "plain", "source": "plain:8", "weights": None, "layers": ["0", "2"]},
        {
            "name": "trained",
            "recipe": {"images": "stripes", "size": 16, "count": 32, "steps": 10, "batch_size": 16,
                       "network": {"widths": [8, 8, 8, 8], "stem_stride": 2}},
        },
    ],
    "images": {"source": "stripes", "size": 16, "count": 6},
    "matchings": ["identity", "shift"],
    "kernels": ["linear"],
}  # fmt: skip


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    """The examples as files, which run; the registries are restored afterwards."""
    folder = tmp_path_factory.mktemp("examples")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == len(REGISTRIES)
    with ExitStack() as restored:
        for registry in REGISTRIES.values():
            restored.enter_context(mock.patch.dict(registry))
        for (name, registry), block in zip(REGISTRIES.items(), blocks, strict=True):
            *_, line = block.strip().splitlines()
            assert re.fullmatch(rf'[A-Z_]+\["{name}"\] = .*', line), "the last line registers what is above it"
            file = folder / f"{name}.py"
            file.write_text(block)
            assert name not in registry
            runpy.run_path(str(file), run_name="example")
            assert name in registry
        yield


def test_the_matching_finds_a_planted_shift(added):
    torch.manual_seed(0)
    x = torch.randn(9, 5)
    found = rsm_probe.match(x, x.roll(4, dims=0), "shift")
    assert list(found.permutation) == [(k + 4) % 9 for k in range(9)]
    assert found.value == pytest.approx(float((x**2).sum()), rel=1e-6)
    assert list(rsm_probe.match(x, x[2:4], "shift").permutation) == [-1, -1, 0, 1, -1, -1, -1, -1, -1]


def test_the_image_set_is_named_in_configurations_and_recipes(added):
    images = ImagesConfig(source="stripes", size=16, count=4).load()
    assert list(images.labels) == ["horizontal", "vertical"] * 2
    assert images[0].size == (16, 16)
    assert TrainingConfig(images="stripes").questions == 1
    with pytest.raises(ConfigError, match="frames: applies to scenes and composed only"):
        ImagesConfig.parse({"source": "stripes", "frames": 2})
    with pytest.raises(ConfigError, match="strict: applies to images on disk only"):
        ImagesConfig.parse({"source": "stripes", "strict": True})


def test_the_measure_compares(added):
    rsms = {name: rsm_probe.RSM.from_array(np.eye(4) * scale, list("abcd")) for name, scale in (("a", 1.0), ("b", 3.0))}
    assert rsm_probe.compare(rsms, measure="largest-difference").values[0, 1] == 2.0


def test_the_experiment_runs_from_its_file_and_continues(added, tmp_path):
    file = tmp_path / "norms.yaml"
    file.write_text(yaml.safe_dump({"study": "norms", **SETTINGS}))
    result = read_study(file).run(tmp_path / "run")
    rows = {(row["model"], row["layer"]): row["norm"] for row in result.table}
    assert {layer for model, layer in rows if model == "plain"} == {"0", "2"}
    capture = rsm_probe.Capture.open(tmp_path / "run" / "captures" / "00-plain-images.zarr")
    assert rows["plain", "0"] == pytest.approx(float(capture["0"].tokens().norm(dim=2).mean()))
    assert "| model | layer | norm |" in (tmp_path / "run" / "report.md").read_text()
    again = read_study(tmp_path / "run" / "config.yaml")
    assert again.open(tmp_path / "run").table == result.table
    assert list(save_figures(again, tmp_path / "run")) == []
    with pytest.raises(rsm_probe.errors.StorageError, match="holds a run with different squared"):
        again.model_copy(update={"squared": True}).run(tmp_path / "run")


def test_the_experiment_is_one_of_several(added, tmp_path):
    study = STUDIES["paper"].parse({"studies": {"a": {"study": "norms", **SETTINGS, "models": SETTINGS["models"][:1]}}})
    assert [row["model"] for row in study.run(tmp_path / "run")["a"].table] == ["plain", "plain"]
    assert STUDIES["paper"].parse(study.model_dump(mode="json")) == study
    with pytest.raises(ConfigError, match=r"x: study: must be one of translation, .*, norms, found 'norm'"):
        STUDIES["paper"].parse({"studies": {"x": {"study": "norm"}}})


def test_other_studies_take_the_matching(added, tmp_path):
    study = STUDIES["pairs"].parse({**SETTINGS, "models": SETTINGS["models"][:1], "layers": "2"})
    table = study.run(tmp_path / "run").table
    assert [row["matching"] for row in table] == ["identity", "shift"] * 2


def test_a_set_without_splits_has_no_split(monkeypatch):
    monkeypatch.setitem(IMAGE_SETS, "whole", IMAGE_SETS["digits"].__class__(lambda count=3: None, questions=1))
    with pytest.raises(ConfigError, match="split: whole has no splits; leave it out"):
        ImagesConfig.parse({"source": "whole", "split": "test"})
    with pytest.raises(ConfigError, match=r"or the path of a folder, such as './whole'"):
        TrainingConfig.parse({"images": "whole"})
