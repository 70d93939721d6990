"""docs/recipes.md: every piece of code runs, on tiny models of the libraries that it names."""

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import rsm_probe
from rsm_probe.cli import main

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
SECTIONS = {
    heading: re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for heading, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
}
# Heading -> function that adds what the code takes for granted, and returns what stands for names of real models.
SETUPS: dict[str, Callable[[dict[str, Any], pytest.MonkeyPatch], dict[str, str]]] = {}
CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {}


def setup(heading: str) -> Callable[..., Any]:
    return lambda function: SETUPS.setdefault(heading, function)


def check(heading: str) -> Callable[..., Any]:
    return lambda function: CHECKS.setdefault(heading, function)


def tiny_vit() -> torch.nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3).eval()


def at(result: Any, model: str) -> list[str]:
    """The layers of a model in a result, once each."""
    models, layers = result.cka["model_a"].values, result.cka["layer_a"].values
    return list(dict.fromkeys(str(layer) for name, layer in zip(models, layers, strict=True) if name == model))


def photographs(folder: Path, count: int = 12) -> None:
    """Parts of photographs in files of different sizes, in folders of three classes."""
    from PIL import Image
    from skimage import data

    whole = Image.fromarray(data.astronaut())
    for number in range(count):
        target = folder / "abc"[number % 3]
        target.mkdir(parents=True, exist_ok=True)
        width, height = 60 + 7 * number, 90 - 3 * number
        whole.crop((20 * number, 10, 20 * number + width, 10 + height)).save(target / f"{number}.png")


@setup("Your checkpoint and your photographs")
def _(names, monkeypatch):
    from torchvision.models import resnet18

    torch.save(resnet18(num_classes=3).state_dict(), "finetuned.pth")
    photographs(Path("my_photos"), 5)
    return {"batch_size=50": "batch_size=5"}


@check("Your checkpoint and your photographs")
def _(names):
    state = torch.load("finetuned.pth", weights_only=True)
    assert all(torch.equal(value, state[key]) for key, value in names["model"].module.state_dict().items())
    assert at(names["result"], "resnet18")[-1] == "layer4.1"
    (config,) = re.findall(r"```yaml\n(study: sweep.*?)```", PAGE, re.DOTALL)
    Path("finetuned.yaml").write_text(config.replace("batch_size: 50", "batch_size: 5"))
    for command in ("check", "run"):
        assert f"rsm-probe {command} finetuned.yaml" in PAGE
        monkey = ["rsm-probe", command, "finetuned.yaml"]
        with mock.patch.object(sys, "argv", monkey), pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
    assert list(Path("runs/finetuned/figures").glob("*.png"))
    stored = rsm_probe.streaming.SweepResult.open("runs/finetuned/result.zarr")
    assert stored.models == ["finetuned"]


@setup("In a notebook")
def _(names, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    return {"batch_size=50": "batch_size=12"}


@check("In a notebook")
def _(names):
    from matplotlib import pyplot

    drawn = [len(pyplot.figure(number).axes[0].images) for number in pyplot.get_fignums()]
    pyplot.close("all")
    assert drawn == [1, 1, 2]
    assert "<td" in names["result"]._repr_html_()


@setup("Video")
def _(names, monkeypatch):
    from torchvision.models import video

    monkeypatch.setattr(video, "r3d_18", lambda weights: video.VideoResNet(
        video.resnet.BasicBlock, [video.resnet.Conv3DSimple] * 4, [1] * 4, video.resnet.BasicStem
    ).eval())  # fmt: skip
    names["clips"] = torch.rand(6, 3, 4, 24, 24)
    for scene in range(2):  # of three clips with nine frames each
        photographs(Path("my_clips") / f"scene{scene}", 27)
    return {"batch_size=50": "batch_size=6", "size=112": "size=24"}


@check("Video")
def _(names):
    assert at(names["result"], "VideoResNet") == ["layer1", "layer2", "layer3", "layer4"]
    with torch.no_grad(), rsm_probe.Probe(names["video"], "layer2") as probe:
        names["video"](names["clips"])
    assert probe.representations["layer2"].grid == (2, 6, 6)
    assert len(names["frames"]) == 6
    assert at(names["from_files"], "VideoResNet") == ["layer1", "layer2", "layer3", "layer4"]


@setup("Volumes")
def _(names, monkeypatch):
    names["volumes"] = torch.rand(6, 1, 8, 8, 8)
    return {"batch_size=50": "batch_size=6"}


@check("Volumes")
def _(names):
    assert np.isfinite(names["result"].grid("UNet").values).all()


@setup("Audio")
def _(names, monkeypatch):
    from transformers import ASTConfig, ASTModel

    config = ASTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_length=64,
        num_mel_bins=32, frequency_stride=10, time_stride=10,
    )  # fmt: skip
    monkeypatch.setattr(ASTModel, "from_pretrained", lambda name: ASTModel(config))
    names["spectrograms"] = torch.rand(6, 64, 32)
    return {}


@check("Audio")
def _(names):
    representation = names["probe"].representations["layers.0"]
    assert representation.grid == (2, 5)
    assert representation.prefix.shape == (6, 2, 16)


@setup("A DataLoader")
def _(names, monkeypatch):
    from torch.utils.data import TensorDataset
    from torchvision.models import ResNet
    from torchvision.models.resnet import BasicBlock

    names["dataset"] = TensorDataset(names["images"], torch.arange(12) % 3)
    names["model"] = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3).eval()
    return {"batch_size=50": "batch_size=6"}


@check("A DataLoader")
def _(names):
    models = {"vit": names["vit"], "resnet": names["model"]}
    batches = np.arange(12).reshape(2, 6)
    accumulator = rsm_probe.Accumulator()
    probes = {name: rsm_probe.Probe(model, "blocks") for name, model in models.items()}
    with accumulator, torch.no_grad():
        for numbers in batches:
            for name, model in models.items():
                with probes[name]:
                    model(names["images"][numbers])
            accumulator.update(probes)
    np.testing.assert_allclose(names["result"].cka.values, accumulator.cka.values, atol=1e-9)


@setup("Image towers")
def _(names, monkeypatch):
    import open_clip
    from transformers import CLIPConfig, CLIPModel

    tiny = open_clip.CLIP(
        16, {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
    )  # fmt: skip
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda name, pretrained: (tiny, None, None))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=sizes | {"vocab_size": 50}, vision_config=sizes | {"image_size": 32, "patch_size": 8}
    )
    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda name: CLIPModel(config))
    return {}


@check("Image towers")
def _(names):
    assert at(names["result"], "clip") == [f"visual.transformer.resblocks.{k}" for k in range(2)]
    representation = names["probe"].representations["vision_model.encoder.layers.1"]
    with torch.no_grad():
        hidden = names["clip"].vision_model(names["images"], output_hidden_states=True).hidden_states[2]
    assert torch.equal(representation.tokens, hidden[:, 1:])
    assert representation.grid == (4, 4)


@setup("Two views")
def _(names, monkeypatch):
    class Stereo(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.near, self.far = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(3, 4, 5)

        def forward(self, left, right):
            return self.near(left).mean() - self.far(right).mean()

    names["stereo"] = Stereo().eval()
    return {}


@check("Two views")
def _(names):
    read = names["probe"].representations
    assert {name: layer.input for name, layer in read.items()} == {"near": "left", "far": "right"}
    with torch.no_grad():
        expected = names["stereo"].far(names["images"].flip(-1))
    assert torch.equal(read["far"].tokens, expected.flatten(2).mT)


@setup("Diffusion")
def _(names, monkeypatch):
    from diffusers import UNet2DModel

    tiny = UNet2DModel(
        sample_size=32, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    monkeypatch.setattr(UNet2DModel, "from_pretrained", lambda name: tiny)
    return {"batch_size=50": "batch_size=12"}


@check("Diffusion")
def _(names):
    result, unet = names["result"], names["unet"]
    assert at(result, "step 50") == at(result, "step 750") != []
    outputs = []
    handle = unet.down_blocks[0].register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    with torch.no_grad():
        names["at_step"](50)(unet, names["images"])
        names["at_step"](750)(unet, names["images"])
    handle.remove()
    rsms = [rsm_probe.rsm(x.flatten(2).mT, matching="identity", kernel="linear") for x in outputs]
    grid = result.grid("step 50", "step 750", matching_a="identity", matching_b="identity")
    assert float(grid[0, 0]) == pytest.approx(rsm_probe.cka(*rsms), abs=1e-5)


@setup("LoRA before and after")
def _(names, monkeypatch):
    return {"batch_size=50": "batch_size=12"}


@check("LoRA before and after")
def _(names):
    change = names["change"].values
    assert change.shape == (2, 2)
    assert (change < 1 - 1e-6).all()
    expected = names["tuned"].merge_and_unload().state_dict()
    state = names["merged"].module.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value)
    assert not torch.equal(state["blocks.0.attn.qkv.weight"], names["vit"].blocks[0].attn.qkv.weight)


@setup("Class tokens and pooled vectors")
def _(names, monkeypatch):
    return {"batch_size=50": "batch_size=12"}


@check("Class tokens and pooled vectors")
def _(names):
    (model,) = set(map(str, names["result"].cka["model_a"].values))
    assert at(names["result"], model)[:3] == ["blocks.0", "blocks.0@class", "blocks.0@mean"]


@setup("Queries, keys and values")
def _(names, monkeypatch):
    return {"batch_size=50": "batch_size=12"}


@check("Queries, keys and values")
def _(names):
    layers = at(names["result"], "VisionTransformer")
    assert layers[-4:] == ["blocks.1.attn[key]", "blocks.1.attn[value.0]", "blocks.1.attn[value.1]", "blocks.1"]


def test_every_section_with_code_is_run():
    assert {heading for heading, blocks in SECTIONS.items() if blocks} == set(SETUPS) == set(CHECKS)


# These take some ten seconds each.
SLOW = {"Diffusion", "Video", "Volumes"}


@pytest.mark.parametrize(
    "heading", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in SETUPS]
)
@pytest.mark.slow
def test_recipe(heading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    names: dict[str, Any] = {"rsm_probe": rsm_probe, "torch": torch, "np": np, "vit": tiny_vit(), "images": images}
    code = "\n".join(SECTIONS[heading])
    for shown, substitute in SETUPS[heading](names, monkeypatch).items():
        assert shown in code, f"the page does not say {shown!r}"
        code = code.replace(shown, substitute)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, names)
    CHECKS[heading](names)
