"""Code on the pages of docs/: every piece runs, on tiny models and few images in place of those that it names."""

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
import xarray as xr
import yaml
from matplotlib import pyplot

import rsm_probe
from rsm_probe.cli import main
from rsm_probe.config import ConfigFolder
from rsm_probe.errors import ModelError
from rsm_probe.runs.images_config import ImagesConfig
from rsm_probe.runs.model_config import ModelConfig
from rsm_probe.sources import NetworkConfig, TrainingConfig, build_network
from rsm_probe.sources.checkpoint_sequences import checkpoint_files
from rsm_probe.studies import read_study
from rsm_probe.studies.sweep import SweepConfig

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The pieces of code of a page, in its order."""
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)


# Tutorials run from an empty folder, as they stand: see test_tutorials.py.
PAGES = [
    page
    for file in sorted(DOCS.rglob("*.md"))
    if not (page := file.relative_to(DOCS).with_suffix("").as_posix()).startswith(("tutorials/", "reference/api/"))
    and blocks(page, "python")
]
# Page -> function that adds what the code takes for granted, and returns what stands for names of real models.
SETUPS: dict[str, Callable[[dict[str, Any], pytest.MonkeyPatch], dict[str, str]]] = {}
CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {}


def setup(page: str) -> Callable[..., Any]:
    return lambda function: SETUPS.setdefault(page, function)


def check(page: str) -> Callable[..., Any]:
    return lambda function: CHECKS.setdefault(page, function)


def commands(page: str) -> list[list[str]]:
    """The commands of a page, word by word."""
    return [line.split() for block in blocks(page, "bash") for line in block.splitlines()]


def run(command: list[str]) -> None:
    """Runs a command of the command line in this process."""
    with mock.patch.object(sys, "argv", command), pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code


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


@setup("how-to/compare-two-checkpoints")
def _(names, monkeypatch):
    from torchvision.models import resnet18

    for name in ("before", "after"):
        torch.save(resnet18(num_classes=3).state_dict(), f"{name}.pth")
    photographs(Path("my_photos"), 5)
    return {"batch_size=50": "batch_size=5"}


@check("how-to/compare-two-checkpoints")
def _(names):
    state = torch.load("after.pth", weights_only=True)
    assert all(torch.equal(value, state[key]) for key, value in names["models"]["after"].module.state_dict().items())
    assert at(names["result"], "before")[-1] == "layer4.1"
    assert (np.diagonal(names["grid"]) < 1 - 1e-6).all()
    (config,) = blocks("how-to/compare-two-checkpoints", "yaml")
    assert config.startswith("# checkpoints.yaml\n")
    Path("checkpoints.yaml").write_text(config.replace("batch_size: 50", "batch_size: 5"))
    for command in commands("how-to/compare-two-checkpoints"):
        run(command)
    assert list(Path("runs/checkpoints/figures").glob("*.png"))
    stored = rsm_probe.streaming.SweepResult.open("runs/checkpoints/result.zarr")
    assert stored.models == ["before", "after"]


@setup("how-to/look-in-a-notebook")
def _(names, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    return {"batch_size=50": "batch_size=12"}


@check("how-to/look-in-a-notebook")
def _(names):
    drawn = [len(pyplot.figure(number).axes[0].images) for number in pyplot.get_fignums()]
    pyplot.close("all")
    assert drawn == [1, 1, 2]
    assert "<td" in names["result"]._repr_html_()


@setup("how-to/read-videos")
def _(names, monkeypatch):
    from torchvision.models import video

    monkeypatch.setattr(video, "r3d_18", lambda weights: video.VideoResNet(
        video.resnet.BasicBlock, [video.resnet.Conv3DSimple] * 4, [1] * 4, video.resnet.BasicStem
    ).eval())  # fmt: skip
    names["clips"] = torch.rand(6, 3, 4, 24, 24)
    for scene in range(2):  # of three clips with nine frames each
        photographs(Path("my_clips") / f"scene{scene}", 27)
    return {"batch_size=50": "batch_size=6", "size=112": "size=24"}


@check("how-to/read-videos")
def _(names):
    assert at(names["result"], "VideoResNet") == ["layer1", "layer2", "layer3", "layer4"]
    with torch.no_grad(), rsm_probe.Probe(names["video"], "layer2") as probe:
        names["video"](names["clips"])
    assert probe.representations["layer2"].grid == (2, 6, 6)
    assert len(names["frames"]) == 6
    assert at(names["from_files"], "VideoResNet") == ["layer1", "layer2", "layer3", "layer4"]


@setup("how-to/read-volumes")
def _(names, monkeypatch):
    names["volumes"] = torch.rand(6, 1, 8, 8, 8)
    return {"batch_size=50": "batch_size=6"}


@check("how-to/read-volumes")
def _(names):
    assert np.isfinite(names["result"].grid("UNet").values).all()


@setup("how-to/read-spectrograms")
def _(names, monkeypatch):
    from transformers import ASTConfig, ASTModel

    config = ASTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_length=64,
        num_mel_bins=32, frequency_stride=10, time_stride=10,
    )  # fmt: skip
    monkeypatch.setattr(ASTModel, "from_pretrained", lambda name: ASTModel(config))
    names["spectrograms"] = torch.rand(6, 64, 32)
    return {}


@check("how-to/read-spectrograms")
def _(names):
    representation = names["probe"].representations["layers.0"]
    assert representation.grid == (2, 5)
    assert representation.prefix.shape == (6, 2, 16)


@setup("how-to/use-a-dataloader")
def _(names, monkeypatch):
    from torch.utils.data import TensorDataset
    from torchvision.models import ResNet
    from torchvision.models.resnet import BasicBlock

    names["dataset"] = TensorDataset(names["images"], torch.arange(12) % 3)
    names["resnet"] = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3).eval()
    return {"batch_size=50": "batch_size=6"}


@check("how-to/use-a-dataloader")
def _(names):
    models = {"vit": names["vit"], "resnet": names["resnet"]}
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


@setup("how-to/read-image-towers")
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


@check("how-to/read-image-towers")
def _(names):
    assert at(names["result"], "clip") == [f"visual.transformer.resblocks.{k}" for k in range(2)]
    representation = names["probe"].representations["vision_model.encoder.layers.1"]
    with torch.no_grad():
        hidden = names["clip"].vision_model(names["images"], output_hidden_states=True).hidden_states[2]
    assert torch.equal(representation.tokens, hidden[:, 1:])
    assert representation.grid == (4, 4)


@setup("how-to/read-two-views")
def _(names, monkeypatch):
    class Stereo(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.near, self.far = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(3, 4, 5)

        def forward(self, left, right):
            return self.near(left).mean() - self.far(right).mean()

    names["stereo"] = Stereo().eval()
    return {}


@check("how-to/read-two-views")
def _(names):
    read = names["probe"].representations
    assert {name: layer.input for name, layer in read.items()} == {"near": "left", "far": "right"}
    with torch.no_grad():
        expected = names["stereo"].far(names["images"].flip(-1))
    assert torch.equal(read["far"].tokens, expected.flatten(2).mT)


@setup("how-to/read-diffusion-models")
def _(names, monkeypatch):
    from diffusers import UNet2DModel

    tiny = UNet2DModel(
        sample_size=32, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    monkeypatch.setattr(UNet2DModel, "from_pretrained", lambda name: tiny)
    return {"batch_size=50": "batch_size=12"}


@check("how-to/read-diffusion-models")
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


@setup("how-to/compare-lora")
def _(names, monkeypatch):
    return {"batch_size=50": "batch_size=12"}


@check("how-to/compare-lora")
def _(names):
    change = names["change"].values
    assert change.shape == (2, 2)
    assert (change < 1 - 1e-6).all()
    expected = names["tuned"].merge_and_unload().state_dict()
    state = names["merged"].module.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value)
    assert not torch.equal(state["blocks.0.attn.qkv.weight"], names["vit"].blocks[0].attn.qkv.weight)


@setup("how-to/compare-class-tokens")
def _(names, monkeypatch):
    return {"batch_size=50": "batch_size=12"}


@check("how-to/compare-class-tokens")
def _(names):
    (model,) = set(map(str, names["result"].cka["model_a"].values))
    assert at(names["result"], model)[:3] == ["blocks.0", "blocks.0@class", "blocks.0@mean"]


@setup("how-to/read-attention-keys")
def _(names, monkeypatch):
    return {"batch_size=50": "batch_size=12"}


@check("how-to/read-attention-keys")
def _(names):
    layers = at(names["result"], "VisionTransformer")
    assert layers[-4:] == ["blocks.1.attn[key]", "blocks.1.attn[value.0]", "blocks.1.attn[value.1]", "blocks.1"]


@setup("how-to/follow-a-training")
def _(names, monkeypatch):
    from torchvision.models import resnet18

    Path("runs/net").mkdir(parents=True)
    for step in (0, 100):
        torch.manual_seed(step)
        torch.save(resnet18(num_classes=10).state_dict(), f"runs/net/net_{step:04}.pth")
    photographs(Path("my_photos"), 6)
    return {"batch_size=50": "batch_size=6", '["layer1.*", "layer4.*"]': '["layer4.*"]'}


@check("how-to/follow-a-training")
def _(names):
    assert names["result"].networks == {"resnet": {0: "resnet@0", 100: "resnet@100"}}
    sweep, trainer, recipe = blocks("how-to/follow-a-training", "yaml")
    for step in (500, 1000):
        Path(f"out/checkpoint-{step}").mkdir(parents=True)
    models = SweepConfig.parse(yaml.safe_load(sweep)).models
    assert [title for entry in models for title in entry.titles()] == ["resnet@0", "resnet@100"]
    (entry,) = yaml.safe_load(trainer)["models"]
    assert ModelConfig.parse(entry).titles() == ["vit@500", "vit@1000"]
    steps = TrainingConfig.parse(yaml.safe_load(recipe)).checkpoint_steps
    assert f"checkpoints: {len(steps)} " in recipe
    assert f"# {', '.join(map(str, steps))};" in recipe


@setup("how-to/watch-a-training")
def _(names, monkeypatch):
    names |= {
        "model": build_network(NetworkConfig(widths=(4, 4, 8, 8)), 3), "images": names["images"][:6],
        "batches": [(None, None)] * 101, "train": lambda *_: None, "logged": [],
    }  # fmt: skip
    names["log"] = names["logged"].append
    return {"batch_size=50": "batch_size=6"}


@check("how-to/watch-a-training")
def _(names):
    assert [line["rsm/cka_first/optimal/layer4.0"] for line in names["logged"]] == pytest.approx([1, 1], abs=1e-12)
    assert names["store"].models == ["model@0", "model@100"]


@setup("how-to/use-your-own-loop")
def _(names, monkeypatch):
    names["model"] = build_network(NetworkConfig(widths=(8, 8, 16, 16), stem_stride=2), 10)
    names["batches"] = names["images"].split(6)
    names["accumulators"] = []
    make = rsm_probe.Accumulator

    def made(**options):
        names["accumulators"].append(make(**options))
        return names["accumulators"][-1]

    monkeypatch.setattr(rsm_probe, "Accumulator", made)
    return {}


@check("how-to/use-your-own-loop")
def _(names):
    at_once, layer_by_layer = names["accumulators"]
    xr.testing.assert_allclose(at_once.cka, layer_by_layer.cka)
    assert at_once.cka.sizes["rsm_a"] == 4


@setup("how-to/measure-a-stored-sweep")
def _(names, monkeypatch):
    # The page shows the sweep behind the code that reads its folder.
    names["resnet"] = build_network(NetworkConfig(widths=(8, 8, 16, 16), stem_stride=2), 10).eval()
    names["few"] = rsm_probe.sources.photos(count=12, size=32)
    _, sweep = blocks("how-to/measure-a-stored-sweep", "python")
    shown = {'"torchvision:resnet18"': "resnet", '"timm:vit_tiny_patch16_224"': "vit", '"my_photos"': "few",
             "batch_size=50": "batch_size=6"}  # fmt: skip
    first = sweep
    for old, new in shown.items():
        assert old in first
        first = first.replace(old, new)
    exec(first, names)
    return shown


@check("how-to/measure-a-stored-sweep")
def _(names):
    assert {key.matching for key in names["late"].keys} == {"optimal"}
    assert names["result"].grid("resnet", "vit", matching_a="optimal").shape == (2, 2)


@setup("how-to/compare-any-rsms")
def _(names, monkeypatch):
    names |= rsms(3)
    names["brain"] = names.pop("brain").values
    return {}


@check("how-to/compare-any-rsms")
def _(names):
    assert names["grid"].shape == (2, 1)
    assert list(names["grid"]["layer_a"].values) == ["layer1.0", "layer4.1"]


@setup("how-to/compare-with-brain-data")
def _(names, monkeypatch):
    return {"print(": "shown = ("}


@check("how-to/compare-with-brain-data")
def _(names):
    assert (names["grid"].images, names["grid"].pairs) == (25, 280)
    assert names["brain"].missing == 20
    assert names["grid"].item() > 0


@setup("how-to/explain-brains")
def _(names, monkeypatch):
    return {"repeats=200": "repeats=30"}


@check("how-to/explain-brains")
def _(names):
    assert names["brains"].best(names["evaluation"]) == "net/layer1/optimal/cosine"
    assert names["evaluation"].attrs["subjects"] == 8
    # Similarities and distances of the same features agree.
    first, second = names["second"]["mean"].values
    assert first == pytest.approx(second)


def rsms(count: int) -> dict[str, Any]:
    """RSMs of random tokens, by the names of the pages."""
    made = (rsm_probe.rsm(torch.randn(12, 9, 4)) for _ in range(count))
    return dict(zip(("first", "last", "brain"), made, strict=False))


@setup("how-to/get-intervals")
def _(names, monkeypatch):
    names |= rsms(2)
    return {"repeats=200": "repeats=20"}


@check("how-to/get-intervals")
def _(names):
    assert names["intervals"]["low"].shape == (2, 2)
    assert 0 < names["test"]["p"].item() <= 1


@setup("how-to/compute-all-pairs")
def _(names, monkeypatch):
    names["network"] = build_network(NetworkConfig(widths=(8, 8, 16, 16), stem_stride=2), 10).eval()
    names["photos"] = names["images"]
    return {'"timm:resnet50"': "network", '"photos/"': "photos", "layer3.5": "layer3.0"}


@check("how-to/compute-all-pairs")
def _(names):
    assert names["rsm"].values.shape == (12, 12)


@setup("how-to/find-nearest-images")
def _(names, monkeypatch):
    network = build_network(NetworkConfig(widths=(8, 8, 16, 16), stem_stride=2), 10).eval()
    for name, images in (("queries", names["images"][:2]), ("database", names["images"][2:])):
        names[name] = rsm_probe.capture(network, images, ["layer3.0"], f"{name}.zarr")
    return {"layer3.5": "layer3.0"}


@check("how-to/find-nearest-images")
def _(names):
    assert names["neighbours"]["neighbour"].shape == (2, 5)


@setup("how-to/use-images-with-objects")
def _(names, monkeypatch):
    network = build_network(NetworkConfig(widths=(8, 8, 16, 16), stem_stride=2), 10).eval()
    names["loaded"] = rsm_probe.load_model(network, name="net")
    generator = np.random.default_rng(0)
    names["data"] = [
        {"image": pixels, "objects": {"bbox": [[2, 3, 10, 12]], "category": [k % 2]}}
        for k, pixels in enumerate(torch.tensor(generator.random((14, 3, 32, 32)), dtype=torch.float32))
    ]
    names["logits"] = torch.randn(4, 3)
    Path("retrieval.yaml").write_text(
        'study: retrieval\nmodels: [{name: x, source: "timm:resnet10t", weights: null}]\nimages: {source: digits}\n'
        "layers: layer4.0\nqueries: 4\ndatabase_sizes: [10]\nrepeats: 20\nkernels: [cosine]\n"
        "matchings: [identity, optimal]\n"
    )
    return {}


@check("how-to/use-images-with-objects")
def _(names):
    assert len(names["images"]) == 14
    assert Path("out/report.md").is_file()
    (entries,) = blocks("how-to/use-images-with-objects", "yaml")
    for line in entries.splitlines():
        ImagesConfig.parse(yaml.safe_load(line)["images"], home=ConfigFolder.of("mine.yaml", allow_code=True))
    assert names["jensen_shannon"](names["probabilities"](names["logits"])).shape == (4, 4)


@setup("reference/matchings")
def _(names, monkeypatch):
    x, y = torch.randn(16, 8), torch.randn(12, 8)
    names |= {"x": x, "y": y, "z": torch.randn(4, 16, 8), "affinity": x @ y.T}
    return {}


@setup("explanation/certificates")
def _(names, monkeypatch):
    names |= {"x": torch.randn(16, 8), "y": torch.randn(16, 8)}
    return {}


@check("explanation/certificates")
def _(names):
    assert names["best"].value <= names["best"].bound
    assert 0.99 < names["best"].share <= 1


@setup("how-to/draw-matched-locations")
def _(names, monkeypatch):
    from matplotlib.figure import Figure

    picture = torch.rand(32, 32, 3).numpy()
    names |= {"z": torch.randn(2, 16, 8), "ax": Figure().subplots(), "grid": (4, 4)}
    names |= {"picture_a": picture, "picture_b": picture}
    return {}


@check("how-to/draw-matched-locations")
def _(names):
    assert len(names["ax"].images) == 2


def test_every_page_with_code_is_run():
    assert set(PAGES) == set(SETUPS) >= set(CHECKS)


# Real models of libraries, some ten seconds each.
SLOW = {
    *("how-to/compare-two-checkpoints", "how-to/read-videos", "how-to/read-volumes", "how-to/read-spectrograms"),
    *("how-to/use-a-dataloader", "how-to/read-image-towers", "how-to/read-two-views", "how-to/read-diffusion-models"),
    *("how-to/compare-lora", "how-to/compare-class-tokens", "how-to/read-attention-keys"),
}


@pytest.mark.parametrize(
    "page", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in PAGES]
)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pyplot.close("all")  # figures of tests that ran before in this process
    torch.manual_seed(0)
    images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    names: dict[str, Any] = {"rsm_probe": rsm_probe, "torch": torch, "np": np, "vit": tiny_vit(), "images": images}
    code = "\n".join(blocks(page, "python"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for shown, substitute in SETUPS[page](names, monkeypatch).items():
            assert shown in code, f"the page does not say {shown!r}"
            code = code.replace(shown, substitute)
        exec(code, names)
    if page in CHECKS:
        CHECKS[page](names)


def test_an_experiment_of_the_page_is_valid(tmp_path):
    (config,) = blocks("how-to/run-the-papers-experiments", "yaml")
    (tmp_path / "mine.yaml").write_text(config)
    study = read_study(tmp_path / "mine.yaml")
    assert (study.study, study.edge, study.crop) == ("translation", 96, 64)


def test_steps_of_files_are_those_of_the_table(tmp_path):
    text = (DOCS / "how-to/follow-a-training.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    checked = 0
    for number, (files, steps) in enumerate(rows):
        names = re.findall(r"`([^`]+)`", files)
        folder = tmp_path / str(number)
        for name in names:
            (folder / name.rstrip("/")).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                (folder / name).mkdir()
            else:
                (folder / name).touch()
        if steps.startswith("error"):
            if "beside" in files:
                (folder / "epoch=1-step=5.ckpt").touch()
            with pytest.raises(ModelError):
                checkpoint_files(str(folder / "*"))
        else:
            assert list(checkpoint_files(str(folder / "*"))) == [int(step) for step in steps.split(", ")]
        checked += 1
    assert checked == 7
