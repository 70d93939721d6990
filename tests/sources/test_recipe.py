"""The recipes that come with the project, and the command that reads them."""

import inspect
from pathlib import Path

import pytest
from torch import nn
from typer.testing import CliRunner

from rsm_probe.cli import app, train
from rsm_probe.config import read_yaml
from rsm_probe.errors import ModelError
from rsm_probe.execution.devices import find_device
from rsm_probe.sources.training.recipe import TrainingConfig

FILES = sorted((Path(__file__).parents[2] / "configs").glob("train_*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_recipe_is_valid_and_its_comment_names_it(file):
    TrainingConfig.parse(read_yaml(file), str(file))
    assert f"rsm-probe train {file.stem} " in file.read_text()


def test_there_is_a_recipe_for_each_kind_of_images():
    found = {TrainingConfig.parse(read_yaml(file)).images for file in FILES}
    assert {"digits", "scenes", "photos", "cifar100"} < found


def test_command_trains_on_the_device_that_it_is_told(monkeypatch, tmp_path):
    devices, move = [], nn.Module.to
    monkeypatch.setattr(nn.Module, "to", lambda self, *to, **kept: (devices.append(to), move(self, *to, **kept))[1])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 10\nsize: 8\nbatch_size: 8\nnetwork: {widths: [8, 8, 8, 8], stem_stride: 2}\n")
    for seed, options in enumerate(([], ["--device", "cpu:0"])):
        command = ["train", str(recipe), "--seed", str(seed), "--out", str(tmp_path), *options]
        assert CliRunner().invoke(app, command).exit_code == 0
        assert (find_device(options[-1] if options else "auto"),) in devices
        devices.clear()
    assert inspect.signature(train).parameters["device"].default == "auto"
    refused = CliRunner().invoke(app, ["train", str(FILES[0]), "--device", "abacus"]).exception
    assert isinstance(refused, ModelError)
    assert "'abacus'" in str(refused)
