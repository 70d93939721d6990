"""The configurations of the paper's models: they load, and their layers give what their comments say."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rsm_probe import Probe
from rsm_probe.cli import app
from rsm_probe.config import read_yaml
from rsm_probe.errors import ConfigError
from rsm_probe.probe.layers import resolve
from rsm_probe.runs.model_config import ModelConfig
from rsm_probe.sources.models.hub_architectures import HUB_ARCHITECTURES, hub_config
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.studies.sweep import SweepConfig

FOLDER = Path(__file__).parents[2] / "configs" / "models"


def clip_config(cls, vision, **options):
    text = {"num_hidden_layers": 1}
    return cls(text_config=text, vision_config={"num_hidden_layers": 12, **vision}, **options)


def hub_folder(name: str, folder: Path) -> Path:
    """What the hub holds of a model, without its weights: structure at full width, and preprocessing."""
    import transformers as t

    square = {"height": 224, "width": 224}
    config, processor = {
        # Of 40 blocks, the first two: the whole takes 4.5 GB and a minute.
        "dinov2_giant": (
            t.Dinov2Config(
                hidden_size=1536,
                num_attention_heads=24,
                num_hidden_layers=2,
                use_swiglu_ffn=True,
                patch_size=14,
                image_size=518,
            ),
            t.BitImageProcessor(size={"shortest_edge": 256}, crop_size=square),
        ),
        "clip_vit_b_32": (clip_config(t.CLIPConfig, {"patch_size": 32}), t.CLIPImageProcessor()),
        "clipseg_rd64": (
            clip_config(t.CLIPSegConfig, {"patch_size": 16}),
            t.ViTImageProcessor(size={"height": 352, "width": 352}),
        ),
        # Of 12 blocks, two: 4 096 locations take their time.
        "sam_vit_b": (
            t.SamConfig(vision_config={"num_hidden_layers": 2, "global_attn_indexes": [1]}),
            t.SamImageProcessor(),
        ),
        "bit_50": (t.BitConfig(), t.BitImageProcessor(size={"shortest_edge": 256}, crop_size=square)),
    }[name]  # fmt: skip
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


# Layer -> (S, C), grid, prefix; number of layers.
EXPECTED = {
    "resnet18": ("layer4.1", (49, 512), (7, 7), 0, 8),
    "resnet34": ("layer4.2", (49, 512), (7, 7), 0, 16),
    "resnet50": ("layer4.2", (49, 2048), (7, 7), 0, 16),
    "resnet101": ("layer4.2", (49, 2048), (7, 7), 0, 33),
    "convnextv2_base": ("stages.3.blocks.2", (49, 1024), (7, 7), 0, 36),
    "vit_b_16": ("encoder.layers.encoder_layer_11", (196, 768), (14, 14), 1, 12),
    "vit_l_32": ("encoder.layers.encoder_layer_23", (49, 1024), (7, 7), 1, 24),
    "dinov2_giant": ("encoder.layer.1", (256, 1536), (16, 16), 1, 1),
    "clip_vit_b_32": ("encoder.layers.11", (49, 768), (7, 7), 1, 1),
    "clipseg_rd64": ("encoder.layers.11", (484, 768), (22, 22), 1, 1),
    "sam_vit_b": ("neck", (4096, 256), (64, 64), 0, 1),
    "efficientnet_lite0": ("blocks.6.0", (49, 320), (7, 7), 0, 3),
    "bit_50": ("encoder.stages.3.layers.2", (49, 2048), (7, 7), 0, 1),
}


def test_every_configuration_of_a_model_is_tested():
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.slow
def test_configured_layers_of_the_papers_models_are_captured(name, tmp_path):
    entry = ModelConfig.parse(read_yaml(FOLDER / f"{name}.yaml"), name)
    layer, shape, grid, prefix, count = EXPECTED[name]
    changes = {"weights": None}
    if entry.source.startswith("hf:"):
        changes["source"] = f"hf:{hub_folder(name, tmp_path)}"
    loaded: LoadedModel = next(entry.model_copy(update=changes).load(tmp_path))[1]
    layers = layer if name == "dinov2_giant" else entry.layers
    assert len(resolve(loaded.module, layers)) == count
    with torch.no_grad(), Probe(loaded.module, layer) as probe:
        loaded.module(loaded.blank_input())
    kept = probe.representations[layer]
    assert (tuple(kept.tokens.shape[1:]), kept.grid, kept.prefix.shape[1]) == (shape, grid, prefix)


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.slow
def test_layers_of_the_papers_models_are_shown_without_a_network(name, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    # Two blocks of the largest: the whole takes 5 and 17 GB, and minutes.
    fewer = {"num_hidden_layers": 2}
    for model, title, changes in (
        ("dinov2_giant", "facebook/dinov2-giant", fewer),
        ("sam_vit_b", "facebook/sam-vit-base", {"vision_config": fewer}),
    ):
        if name == model:
            known = HUB_ARCHITECTURES[title]
            monkeypatch.setitem(HUB_ARCHITECTURES, title, replace(known, config={**known.config, **changes}))
    run = CliRunner().invoke(app, ["layers", str(FOLDER / f"{name}.yaml"), "--all"])
    assert run.exit_code == 0, run.exception
    layer, (locations, channels), grid, prefix, _ = EXPECTED[name]
    row = next(line.strip("* ").split() for line in run.output.splitlines() if line.strip("* ").startswith(f"{layer} "))
    assert row[3:] == [str(locations), str(channels), "x".join(map(str, grid)), str(prefix)]


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("google/bit-50", 23_500_352), ("openai/clip-vit-base-patch32", 151_277_313),
        ("CIDAS/clipseg-rd64-refined", 149_620_737), ("facebook/dinov2-giant", 1_136_480_768),
        ("facebook/sam-vit-base", 93_735_728),
    ],
)  # fmt: skip
def test_architectures_have_as_many_weights_as_the_models_of_the_hub(name, weights):
    import transformers

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        assert name in HUB_ARCHITECTURES
        module = transformers.AutoModel.from_config(hub_config(name))
    assert sum(parameter.numel() for parameter in module.parameters()) == weights


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("microsoft/resnet-18", 11_689_512), ("microsoft/resnet-50", 25_557_032), ("microsoft/resnet-101", 44_549_160),
        ("facebook/convnextv2-base-1k-224", 88_717_800), ("google/vit-base-patch16-224", 86_567_656),
        ("google/vit-large-patch32-384", 306_632_680),
        ("facebook/dinov2-giant-imagenet1k-1-layer", 1_136_480_768 + 3072 * 1000 + 1000),
    ],
)  # fmt: skip
def test_architectures_of_classifiers_have_as_many_weights_as_those_of_table_1(name, weights):
    import transformers

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        module = transformers.AutoModelForImageClassification.from_config(hub_config(name))
    assert sum(parameter.numel() for parameter in module.parameters()) == weights


def test_study_takes_the_configuration_of_a_model_from_its_file():
    file = str(FOLDER / "clip_vit_b_32.yaml")
    config = SweepConfig.parse({"models": [file], "images": {"source": "digits"}}, "test")
    assert config.models[0].part == "vision_model"
    assert config.models[0].layers == "encoder.layers.11"
    # What is written into the run folder stands on its own.
    assert file not in config.to_yaml()


def test_configurations_run_no_code():
    with pytest.raises(ConfigError, match=r"source: configurations do not run code.*'mine.py:build'"):
        ModelConfig.parse({"source": "mine.py:build"}, "test")
    for key in ("allow_pickle", "trust_remote_code"):
        with pytest.raises(ConfigError, match=f"{key}: unknown key"):
            ModelConfig.parse({"source": "timm:resnet18", key: True}, "test")
