"""The recipes that come with the project, and the command that reads them."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rsm_probe.cli import app
from rsm_probe.config import read_yaml
from rsm_probe.errors import ModelError
from rsm_probe.sources.training import train as training
from rsm_probe.sources.training.recipe import TrainingConfig

FILES = sorted((Path(__file__).parents[2] / "configs").glob("train_*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_recipe_is_valid_and_its_comment_names_it(file):
    TrainingConfig.parse(read_yaml(file), str(file))
    assert f"rsm-probe train configs/{file.name}" in file.read_text()


def test_there_is_a_recipe_for_each_kind_of_images():
    found = {TrainingConfig.parse(read_yaml(file)).images for file in FILES}
    assert {"digits", "scenes", "photos", "cifar100"} < found


def test_command_trains_on_the_device_that_it_is_told(monkeypatch, tmp_path):
    devices = []
    monkeypatch.setattr(training, "train_or_load", lambda *args: devices.append(args[3]) or (None, 0.5))
    for options in ([], ["--device", "cpu:0"]):
        command = ["train", str(FILES[0]), "--seed", "0", "--out", str(tmp_path), *options]
        assert CliRunner().invoke(app, command).exit_code == 0
    assert devices == ["auto", "cpu:0"]
    refused = CliRunner().invoke(app, ["train", str(FILES[0]), "--device", "abacus"]).exception
    assert isinstance(refused, ModelError)
    assert "'abacus'" in str(refused)
