"""`rsm-probe layers` of models that are called, read or loaded in ways of their own."""

import warnings

import pytest
import torch
import torchvision
import yaml
from typer.testing import CliRunner

from rsm_probe.cli import app
from rsm_probe.errors import ConfigError, LayerError, ModelError

FILE = """
import torch
from torch import nn

class Timed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.time, self.mixed = nn.Conv2d(3, 4, 8, 8), nn.Embedding(9, 4), nn.Linear(4, 5)

    def forward(self, x, t, words=None):
        tokens = self.conv(x).flatten(2).mT + self.time(t)[:, None]
        return self.mixed(tokens.cumsum(1).sort(1).values)

def timed():
    return Timed()

def call(model, batch):
    return model(batch, torch.zeros(len(batch), dtype=torch.long))

def silent(model, batch):
    return batch
"""


def layers(*words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(app, ["layers", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


@pytest.fixture
def code(tmp_path):
    (tmp_path / "m.py").write_text(FILE)
    return tmp_path / "m.py"


def test_a_call_with_timesteps_is_made_by_a_function(code):
    options = ("--preprocess", "resize-crop", "--size", 32)
    with pytest.raises(LayerError, match=r"does not run .*'t'.*--forward file\.py:function"):
        layers(f"{code}:timed", *options)
    listed = layers(f"{code}:timed", "--forward", f"{code}:call", "--all", *options)
    assert ["conv", "Conv2d", "4x4x4", "16", "4", "4x4", "0"] in [line.split() for line in listed.splitlines()]
    assert "mixed: " in listed  # is not captured
    read = layers(f"{code}:timed", "--forward", f"{code}:call", "--all", "--layout", "mixed=NTC", *options)
    assert ["mixed", "Linear", "16x5", "16", "5", "-", "0"] in [line.split() for line in read.splitlines()]
    assert "mixed: " not in read
    assert "conv" in layers(f"{code}:timed", "--forward", f"{code}:call", "--input", "x", *options)


@pytest.mark.parametrize(
    ("words", "error", "told"),
    [
        (["--forward", "m.py"], ModelError, r"--forward takes file\.py:function, found 'm\.py'"),
        (["--forward", "{code}:silent"], LayerError, "forward= did not call Timed itself"),
        (["--forward", "{code}:call", "--layout", "mixed"], ConfigError, "--layout takes LAYER=LAYOUT"),
        (["--forward", "{code}:call", "--layout", "mix=NTC"], LayerError, "no probed layer matches 'mix'.*mixed"),
        (["--forward", "{code}:call", "--input", "y"], Exception, "no argument 'y'"),
    ],
)
def test_wrong_options_are_named(words, error, told, code):
    with pytest.raises(error, match=told):
        layers(f"{code}:timed", *(word.format(code=code) for word in words))


def test_options_hold_for_a_yaml_file_too(tmp_path):
    model, weights = tmp_path / "m.yaml", tmp_path / "part.pt"
    state = torchvision.models.resnet18().state_dict()
    torch.save({name: value for name, value in state.items() if "layer4" not in name}, weights)
    model.write_text(yaml.safe_dump({"source": "torchvision:resnet18", "weights": str(weights)}))
    with pytest.raises(ModelError, match=r"missing: layer4.*--no-strict"):
        layers(model)
    assert "layer4.1" in layers(model, "--no-strict")
    torch.save(torchvision.models.resnet18(), weights)
    with pytest.raises(ModelError, match="--allow-pickle"):
        layers(model)
    assert "layer4.1" in layers(model, "--allow-pickle")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hubconf.py").write_text(
        "import torchvision\ndef net():\n return torchvision.models.resnet18()\n"
    )
    model.write_text(yaml.safe_dump({"source": f"torch.hub:{tmp_path / 'hub'}:net"}))
    with pytest.raises(ConfigError, match="--allow-code"):
        layers(model, "--trust-remote-code")
    assert "layer4.1" in layers(model, "--allow-code")
