"""Models of one's own: code named in configurations, repositories, modules in studies, other precisions."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import rsm_probe
from rsm_probe import capture, load_model, sweep
from rsm_probe.cli import app
from rsm_probe.errors import ConfigError, ImageError, ModelError
from rsm_probe.streaming import SweepResult
from rsm_probe.studies import read_study

IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CODE = """
import torch
from torch import nn
def tiny(pretrained=False, **options):
    torch.manual_seed(1 if pretrained else 2)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3))
def broken(pretrained=False):
    raise KeyError("nothing here")
"""


def study(folder: Path, models: str) -> Path:
    file = folder / "study.yaml"
    file.write_text(
        f"study: sweep\nmodels: [{models}]\nimages: {{source: digits, size: 16, count: 8}}\nlayers: ['0']\n"
        f"matchings: [identity]\nbatch_size: 8\n"
    )
    return file


# Code


@pytest.mark.parametrize("source", ["own.py:plain", "torch.hub:.:tiny"])
def test_code_of_a_configuration_runs_only_where_the_command_line_allows_it(source, tmp_path):
    for name in ("own.py", "hubconf.py"):
        (tmp_path / name).write_text(CODE + "open(__file__ + '.ran', 'w').close()\n")
    file, out = study(tmp_path, f"{{source: '{source}'}}"), tmp_path / "out"
    with pytest.raises(
        ConfigError, match=r"source: configurations do not run code.*`rsm-probe run CONFIG --allow-code`"
    ):
        read_study(file)
    assert not list(tmp_path.glob("*.ran"))
    read_study(file, allow_code=True).require_free(out)
    assert not list(tmp_path.glob("*.ran"))  # reading is not running
    command = ["run", str(file), "--out", str(out), "--no-progress", "--no-figures"]
    assert isinstance(CliRunner().invoke(app, command).exception, ConfigError)
    run = CliRunner().invoke(app, [*command, "--allow-code"])
    assert run.exit_code == 0, run.exception
    assert list(tmp_path.glob("*.ran"))
    for mark in tmp_path.glob("*.ran"):
        mark.unlink()
    read_study(out / "config.yaml", stored=True).open(out)  # as for figures
    assert not list(tmp_path.glob("*.ran"))


def test_repositories_are_trusted_only_where_that_is_asked_for(tmp_path):
    (tmp_path / "hubconf.py").write_text(CODE)
    source = f"torch.hub:{tmp_path}:tiny"
    with pytest.raises(ModelError, match=r"runs the Python code of that repository.*trust_remote_code=True"):
        load_model(source)
    trained, random = (load_model(source, weights, trust_remote_code=True) for weights in ("default", None))
    assert trained.name == "tiny"
    torch.manual_seed(1)
    assert torch.equal(trained.module[0].weight, nn.Conv2d(3, 4, 3).weight)
    assert not torch.equal(trained.module[0].weight, random.module[0].weight)
    assert len(load_model(f"torch.hub:{tmp_path}:plain", trust_remote_code=True).module) == 1
    run = CliRunner().invoke(app, ["layers", source, "--trust-remote-code", "--all"])
    assert run.exit_code == 0, run.exception
    assert "Conv2d" in run.output
    for wrong, told in (
        (f"torch.hub:{tmp_path}:absent", "absent"), (f"torch.hub:{tmp_path}:broken", "KeyError: 'nothing here'"),
        ("torch.hub:tiny", "write torch.hub:owner/name:entry"), (f"torch.hub:{tmp_path}/no:tiny", "no folder at"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=told):
            load_model(wrong, trust_remote_code=True)


def test_open_clip_gives_its_image_tower(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    small = next(
        name for name in ("ViT-S-32-alt", "ViT-M-32-alt", "ViT-S-32", "ViT-B-32") if name in open_clip.list_models()
    )
    loaded = load_model(f"open_clip:{small}", weights=None, seed=0)
    whole = load_model(f"open_clip:{small}", weights=None, seed=0, method="encode_image").module
    assert loaded.name == small
    x = loaded.blank_input()
    with torch.no_grad():
        assert torch.equal(loaded.module(x), whole.encode_image(x))
    torch.save({"state_dict": {f"module.{k}": v + 1 for k, v in whole.state_dict().items()}}, tmp_path / "w.pt")
    with pytest.warns(UserWarning, match=r"prefix='module\.'"):
        own = load_model(f"open_clip:{small}", weights=tmp_path / "w.pt")
    assert torch.equal(own.module.conv1.weight, whole.visual.conv1.weight + 1)
    with pytest.raises(ModelError, match=rf"no weights 'x'.* for {small}"):
        load_model(f"open_clip:{small}/x")
    with pytest.raises(ModelError, match=r"weights by tag, as open_clip:ARCH/TAG.*weights=None"):
        load_model(f"open_clip:{small}")
    with pytest.raises(ModelError, match=r"OpenCLIP has no model 'ViT-B32'; nearest: .*'ViT-B-32'"):
        load_model("open_clip:ViT-B32", weights=None)


# Studies


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)))


def test_studies_take_modules_and_images_of_python(tmp_path):
    torch.save(Net(3).state_dict(), tmp_path / "w.pth")
    file, out = study(tmp_path, "{source: 'timm:resnet18', weights: null}"), tmp_path / "out"
    models = {"mine": load_model(Net().eval(), layers="stem"), "theirs": load_model(Net(1).eval(), layers="stem")}
    result = read_study(file).run(out, models=models, images=IMAGES)
    alone = sweep(models, IMAGES, "0", ["identity"], batch_size=8, centering="location-mean", max_hours=None)
    np.testing.assert_array_equal(result.cka.values, alone.cka.values)
    assert [str(name) for name in result.cka["model_a"].values] == ["mine", "theirs"]
    # What the folder holds stands on its own, apart from the models.
    stored = read_study(out / "config.yaml", stored=True)
    assert stored.open(out).cka.shape == (2, 2)
    with pytest.raises(ImageError, match="these images were given in Python"):
        stored.run(out)
    with pytest.raises(ModelError, match=r"model 'mine' was given in Python.*models=\{'mine': module\}"):
        stored.run(out, images=IMAGES)
    assert read_study(file).run(out, models=models, images=IMAGES).cka.shape == (2, 2)
    # Other models and images are computed, and not taken for those that the folder has.
    others = {**models, "mine": load_model(Net(9).eval(), layers="stem")}
    for number, changed in enumerate(({"models": others, "images": IMAGES}, {"models": models, "images": IMAGES + 1})):
        grown = read_study(file).run(out, **changed)
        fresh = read_study(file).run(tmp_path / f"fresh{number}", **changed)
        assert not np.array_equal(grown.cka.values, result.cka.values)
        if number == 0:
            np.testing.assert_array_equal(grown.cka.values, fresh.cka.values)


def test_pairs_take_modules_and_images_of_python(tmp_path):
    file = study(tmp_path, "{source: 'timm:resnet18', weights: null}")
    file.write_text(file.read_text().replace("study: sweep", "study: pairs"))
    result = read_study(file).run(
        tmp_path / "out", models={"mine": load_model(Net().eval(), layers="stem")}, images=IMAGES
    )
    expected = rsm_probe.rsm(
        capture(Net().eval(), IMAGES, "stem", tmp_path / "alone")["stem"],
        matching="identity",
        centering="location-mean",
    )
    np.testing.assert_allclose(result.rsm("mine", "stem", "identity").values, expected.values, rtol=1e-6)


def test_checkpoints_of_an_entry(tmp_path):
    net = load_model("torchvision:shufflenet_v2_x0_5", weights=None, seed=3, num_classes=4).module
    torch.save({"ema": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "w.pth")
    entry = (
        "source: 'torchvision:shufflenet_v2_x0_5', weights: w.pth, num_classes: 4, preprocess: resize-crop, size: 32"
    )
    with pytest.warns(UserWarning, match="key='ema', prefix='module.'"):
        _, loaded, _ = next(read_study(study(tmp_path, f"{{{entry}}}")).models[0].load(tmp_path))
    assert torch.equal(loaded.module.fc.weight, net.fc.weight)
    assert loaded.blank_input().shape == (1, 3, 32, 32)
    (tmp_path / "m.yaml").write_text(entry.replace(", ", "\n"))
    run = CliRunner().invoke(app, ["layers", str(tmp_path / "m.yaml"), "--all"])
    assert run.exit_code == 0, run.exception
    for wrong, told in (
        ("weights: null, key: a", "key: and prefix: choose weights within a checkpoint"),
        ("preprocess: crop", "preprocess: unknown preprocess 'crop'; nearest: 'resize-crop'"),
        ("size: 3", "size: needs preprocess:"),
        ("num_classes: -1", "num_classes"),
    ):
        with pytest.raises(ConfigError, match=told):
            read_study(study(tmp_path, f"{{source: 'timm:resnet18', {wrong}}}"))


# Precisions


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.ModuleList(
            [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0) for _ in range(2)]
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Casting(Attentive):
    """Casts by itself, after a step in full precision."""

    def forward(self, x):
        return super().forward((x / 3).to(self.patch.weight.dtype))


def quantised(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "dtype"),
    [
        (lambda: quantised(Attentive().eval()), torch.float32),
        (lambda: Attentive().eval().half(), torch.float16),
        (lambda: Attentive().eval().bfloat16(), torch.bfloat16),
        (lambda: Attentive().eval().double(), torch.float64),
        (lambda: Casting().eval().bfloat16(), torch.float32),
    ],
    ids=["quantised", "float16", "bfloat16", "float64", "casting"],
)
def test_modules_of_other_precisions_are_swept_and_captured(build, dtype, tmp_path):
    module, layers = build(), ["patch", "blocks.0", "blocks.1"]
    result = sweep(module, IMAGES, layers, ["identity"], out=tmp_path / "run", max_hours=None)
    again = sweep(build(), IMAGES, layers, ["identity"], out=tmp_path / "run", max_hours=None)
    np.testing.assert_array_equal(result.cka.values, again.cka.values)
    assert SweepResult.open(tmp_path / "run" / "result.zarr").cka.shape == (3, 3)
    stored = capture(module, IMAGES, layers=layers, out=tmp_path / "capture", batch_size=8)
    outputs = {}
    for name in layers:
        module.get_submodule(name).register_forward_hook(
            lambda m, args, output, name=name: outputs.update({name: output})
        )
    with torch.no_grad():
        module(IMAGES.to(dtype))
    for name, output in outputs.items():
        tokens = output.flatten(2).mT if output.ndim == 4 else output
        np.testing.assert_array_equal(stored[name].tokens().numpy(), tokens.float().numpy())


# Calls in a configuration

CALL = """
with open(__file__ + ".runs", "a") as log:
    log.write("x")

def brighter(model, batch):
    return model(batch + 1)

def as_they_are(model, batch):
    return model(batch)
"""


def study_with_a_call(folder, call="call.py:brighter", where="model"):
    folder.mkdir(exist_ok=True)
    (folder / "call.py").write_text(CALL)
    (folder / "net.py").write_text(
        "import torch\nfrom torch import nn\ndef net():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 2))\n"
    )
    np.save(folder / "x.npy", np.random.default_rng(0).random((12, 3, 6, 6)).astype(np.float32))
    own, common = (f", forward: '{call}'", "") if where == "model" else ("", f"forward: '{call}'\n")
    (folder / "c.yaml").write_text(
        f"study: sweep\nmodels: [{{name: m, source: 'net.py:net'{own}}}]\nimages: {{source: x.npy, axes: NCHW}}\n"
        f"layers: ['0', '1']\n{common}centering: null\nbatch_size: 4\ndevice: cpu\nworkers: 1\n"
    )
    return folder / "c.yaml"


@pytest.mark.parametrize("where", ["model", "study"])
def test_a_configuration_names_the_function_that_makes_the_call(tmp_path, where):
    with pytest.raises(ConfigError, match="forward: configurations do not run code unless"):
        read_study(study_with_a_call(tmp_path / "s", where=where))
    result = read_study(tmp_path / "s" / "c.yaml", allow_code=True).run(tmp_path / "run")
    net = load_model(f"{tmp_path / 's' / 'net.py'}:net", weights=None).module
    images = torch.from_numpy(np.load(tmp_path / "s" / "x.npy"))
    expected = rsm_probe.sweep({"m": net}, images + 1, ["0", "1"], batch_size=4, workers=1)
    np.testing.assert_array_equal(result.cka.values, expected.cka.values)
    plain = rsm_probe.sweep({"m": net}, images, ["0", "1"], batch_size=4, workers=1)
    assert not np.allclose(result.cka.values, plain.cka.values)
    assert (tmp_path / "s" / "call.py.runs").read_text() == "x", "the user's file runs once"
    shown = CliRunner().invoke(app, ["run", str(tmp_path / "s" / "c.yaml"), "--out", str(tmp_path / "run")])
    assert "--allow-code" in str(shown.exception)
    again = read_study(tmp_path / "s" / "c.yaml", allow_code=True).run(tmp_path / "run")
    np.testing.assert_array_equal(again.cka.values, result.cka.values)


def test_a_call_that_changed_is_not_taken_for_the_one_that_a_run_made(tmp_path):
    file = study_with_a_call(tmp_path / "s")
    before = read_study(file, allow_code=True).run(tmp_path / "run")
    (tmp_path / "s" / "call.py").write_text(CALL.replace("batch + 1", "batch * batch"))
    grown, fresh = (read_study(file, allow_code=True).run(tmp_path / name) for name in ("run", "fresh"))
    np.testing.assert_array_equal(grown.cka.values, fresh.cka.values)
    assert not np.array_equal(grown.cka.values, before.cka.values)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("call.py:dimmer", "has no function 'dimmer'; nearest"),
        ("call.py", "write file.py:function, found 'call.py'"),
        ("nowhere.py:brighter", "nowhere.py"),
    ],
)
def test_a_call_that_does_not_exist_is_named(tmp_path, call, told):
    with pytest.raises((ConfigError, ModelError), match=told):
        read_study(study_with_a_call(tmp_path, call), allow_code=True).run(tmp_path / "run")
