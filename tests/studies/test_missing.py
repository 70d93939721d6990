"""What a dry run lists without a connection: everything that is missing, where to get it, and times on paper."""

import json
import re
import socket
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from rsm_probe.cli import app
from rsm_probe.errors import ModelError
from rsm_probe.runs.missing.architectures import architecture_of
from rsm_probe.runs.missing.listing import missing_of
from rsm_probe.runs.missing.on_paper import matchings_per_second, on_paper
from rsm_probe.runs.missing.weights import required_weights
from rsm_probe.runs.model_config import ModelConfig
from rsm_probe.sources import build_network
from rsm_probe.studies import read_study

CONFIGS = Path(__file__).parents[2] / "configs"
PAPER = sorted(file.name for file in CONFIGS.glob("*_paper.yaml"))
TABLES = {
    "outputs_paper.yaml": 8, "table4_paper.yaml": 8, "table2_paper.yaml": 6, "retrieval_paper.yaml": 5,
    "retrieval_sam_paper.yaml": 2,
    "cityscapes_paper.yaml": 7, "approximation_paper.yaml": 3, "figure15_paper.yaml": 3, "figure16_paper.yaml": 3,
    "figure17_paper.yaml": 3, "translation_paper.yaml": 2, "translation_vit_b_16_paper.yaml": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_caches(tmp_path, monkeypatch):
    """Empty caches of all libraries, an empty working directory, and no network."""
    from huggingface_hub import constants

    def refused(*args):
        raise AssertionError("a dry run opens a connection")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    yield
    torch.hub.set_dir(before)


def in_hub(folder: Path, repository: str, **files: str) -> None:
    """Put files into the cache of the hub as it lays them out."""
    home = folder / "hub" / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text("abc")
    (home / "snapshots" / "abc").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (home / "snapshots" / "abc" / name.replace("__", ".").replace("_of_", "-of-")).write_text(text)


def test_every_configuration_of_the_paper_is_known_here():
    assert set(TABLES) <= set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_all_that_a_configuration_of_the_paper_lacks_is_listed_at_once(name, tmp_path):
    study = read_study(CONFIGS / name)
    missing = missing_of(study, tmp_path / "out", CONFIGS)
    assert missing
    assert len(missing.absent) == TABLES.get(name, len(missing.absent))
    text = str(missing)
    for source in set(re.findall(r"(?:hf|hf-classifier|torchvision):[\w./-]+", str(study.model_dump()))):
        assert f"weights of {source} " in text
    for one in missing.absent:
        assert re.search(r"hf download |curl -L |rsm-probe train |https?://", one.way), one
    lines = text.splitlines()[: len(missing.absent) + 1]
    columns = [lines[0].index(title) for title in ("size", "where to get it")]
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines for column in columns)
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing behind"


def test_networks_of_a_recipe_are_trained_by_the_command_that_is_given(tmp_path):
    text = str(missing_of(read_study(CONFIGS / "translation_paper.yaml"), tmp_path / "out", CONFIGS))
    assert "rsm-probe train train_folder --seed 0 --out runs/models" in text
    assert "tiny-imagenet-200.zip" in text


def test_torchvision_weights_are_looked_up_by_the_name_in_their_address(tmp_path):
    needed = required_weights("torchvision:resnet18")
    assert not needed.there
    assert needed.size == pytest.approx(46.8e6, rel=0.01)
    file = Path(re.search(r"-o (\S+) https", needed.get)[1])
    file.parent.mkdir(parents=True)
    file.touch()
    assert required_weights("torchvision:resnet18").there
    with pytest.raises(ModelError, match="no model 'resnet-18'; nearest: 'resnet18'"):
        required_weights("torchvision:resnet-18")


def test_weights_of_the_hub_are_there_with_all_their_files(tmp_path):
    source, repository = "hf:some/model", "some/model"
    assert required_weights(source).get == "hf download some/model"
    in_hub(tmp_path, repository, config__json="{}", model__safetensors="")
    assert not required_weights(source).there, "the preprocessing is missing"
    in_hub(tmp_path, repository, preprocessor_config__json="{}")
    assert required_weights(source).there
    shards = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    in_hub(tmp_path, "split/model", config__json="{}", preprocessor_config__json="{}")
    home = tmp_path / "hub" / "models--split--model" / "snapshots" / "abc"
    (home / "model.safetensors.index.json").write_text(json.dumps(shards))
    (home / "model-1-of-2.safetensors").touch()
    assert not required_weights("hf:split/model").there
    (home / "model-2-of-2.safetensors").touch()
    assert required_weights("hf:split/model").there


def test_weights_of_timm_may_lie_in_either_cache(tmp_path):
    import timm

    known = timm.get_pretrained_cfg("resnet18")
    assert required_weights("timm:resnet18").get == f"hf download {known.hf_hub_id}"
    in_hub(tmp_path, known.hf_hub_id, model__safetensors="")
    assert required_weights("timm:resnet18").there
    with_address = timm.get_pretrained_cfg("resnet50")
    if with_address.url:
        file = tmp_path / "torch" / "checkpoints" / with_address.url.rpartition("/")[2]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        assert required_weights("timm:resnet50").there


def test_other_sources(tmp_path):
    pytest.importorskip("open_clip")
    assert not required_weights("open_clip:ViT-B-32/laion2b_s34b_b79k").there
    in_hub(tmp_path, "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", open_clip_model__safetensors="")
    assert required_weights("open_clip:ViT-B-32/laion2b_s34b_b79k").there
    assert not required_weights("torch.hub:facebookresearch/dinov2:dinov2_vits14").there
    (tmp_path / "torch" / "facebookresearch_dinov2_main").mkdir(parents=True)
    assert required_weights("torch.hub:facebookresearch/dinov2:dinov2_vits14").there
    assert not required_weights("hf:./folder").there
    assert required_weights("file.py:function") is None


def test_a_network_that_is_there_needs_no_images_to_train_on(tmp_path):
    recipe = {"images": str(tmp_path / "photos"), "size": 32, "steps": 20, "network": {"widths": [4, 4, 4, 4]}}
    images = {"source": "digits", "split": "test", "count": 10}
    file = tmp_path / "c.yaml"
    models = [{"name": "net", "seeds": [0, 1], "recipe": recipe}]
    file.write_text(yaml.safe_dump({"study": "sweep", "models": models, "images": images}))
    study = read_study(file)
    assert [one.what.split()[0] for one in missing_of(study, tmp_path / "out").absent] == ["train", "test"]
    for seed in (0, 1):
        (tmp_path / "out" / "models").mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / "models" / f"net-{seed}.safetensors").touch()
    assert not missing_of(study, tmp_path / "out")
    # An estimate of both, as long as each other.
    (model,) = on_paper(study, tmp_path / "out")
    assert (model.title, model.networks, model.pairs) == ("net", 2, 45)
    assert model.architecture.layers[0].locations == 32 * 32
    assert 0 < model.gpu_seconds < 60
    assert model.seconds > 0


def test_sizes_are_those_of_the_model_itself():
    config = ModelConfig.model_validate({"name": "net", "recipe": {"images": "digits", "size": 32}})
    known = architecture_of(config, "blocks")
    module = build_network(config.recipe.network, config.recipe.questions).eval()
    assert known.parameter_bytes == 4 * sum(p.numel() for p in module.parameters())
    with torch.no_grad():
        first = module.layer1(module.maxpool(module.act1(module.bn1(module.conv1(torch.zeros(1, 3, 32, 32))))))
    of_first = next(layer for layer in known.layers if layer.name.startswith("layer1"))
    assert (of_first.locations, of_first.channels) == (first.shape[2] * first.shape[3], first.shape[1])
    assert architecture_of(ModelConfig(source="hf:nobody/knows"), "blocks") is None


def test_rates_between_the_measured_sizes_fall_with_the_size():
    rates = [matchings_per_second(size) for size in (16, 64, 100, 256, 500, 1024, 4096)]
    assert rates[1] == pytest.approx(3.23e6)
    assert rates[3] == pytest.approx(306e3)
    assert rates == sorted(rates, reverse=True)


def test_the_command_lists_and_estimates_and_says_that_a_run_would_fail(tmp_path):
    shown = CliRunner().invoke(app, ["run", str(CONFIGS / "translation_vit_b_16_paper.yaml"), "--dry-run"])
    assert shown.exit_code == 1, shown.output
    assert "weights of torchvision:vit_b_16  346 MB" in shown.stdout
    assert re.search(r"ViT-B/16  12 of 197 +19,000 +\d", shown.stdout)
    assert "one NVIDIA H100 with 16 CPU cores" in shown.stdout
    assert not list(tmp_path.iterdir())
