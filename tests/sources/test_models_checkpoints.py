"""Checkpoints in the forms in which programs save them, with and without the model's head."""

import argparse
import json
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from rsm_probe import Probe, load_model, sweep
from rsm_probe.errors import ImageError, ModelError
from rsm_probe.sources.models.loaded_model import to_tensor


class Net(nn.Module):
    """A small classifier with all that a ResNet stores: convolution, statistics, a list of blocks, a head."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4))
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(2)])
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(3)
    net = Net().eval()
    net.stem[1].running_mean.normal_()
    return net


def under(prefix: str, state) -> dict:
    return {f"{prefix}{name}": value for name, value in state.items()}


def other(state) -> dict:
    return {name: value + 1 for name, value in state.items()}


def fsdp(state) -> dict:
    """Names as nested FSDP gives them: the whole, and each block."""
    inner = {name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): value for name, value in state.items()}
    return under("_fsdp_wrapped_module.", inner)


FORMS = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "best": 0.5},
    "model": lambda s: {"model": s},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "ema": lambda s: {"ema": s},
    "model_ema": lambda s: {"model_ema": under("module.", s)},
    "state_dict_ema": lambda s: {"state_dict_ema": s, "arch": "net"},
    "nested": lambda s: {"checkpoint": {"net": {"weights": s}}},
    "data parallel": lambda s: under("module.", s),
    "data parallel of a part": lambda s: {k.replace("stem.", "stem.module."): v for k, v in s.items()},
    "compiled": lambda s: under("_orig_mod.", s),
    "compiled block": lambda s: {k.replace("blocks.1.", "blocks.1._orig_mod."): v for k, v in s.items()},
    "fsdp": fsdp,
    "activations": lambda s: {k.replace("stem.", "stem._checkpoint_wrapped_module."): v for k, v in s.items()},
    "deepspeed": lambda s: {"module": under("module.", s), "dp_world_size": 2},
    "averaged": lambda s: under("module.", s) | {"n_averaged": torch.tensor(3)},
    "lightning": lambda s: {"state_dict": under("model.", s), "pytorch-lightning_version": "2", "loops": {"a": {}}},
    "lightning net": lambda s: {"state_dict": under("net.", s) | {"criterion.weight": torch.ones(5)}},
    "lightning network, compiled": lambda s: {"state_dict": under("network._orig_mod.", s)},
    "backbone": lambda s: {"state_dict": under("backbone.", s) | {"neck.weight": torch.ones(3, 4)}},
    "encoder": lambda s: under("encoder.", s) | {"decoder.weight": torch.ones(3, 4)},
    "teacher": lambda s: {"teacher": under("module.backbone.", s) | {"module.head.weight": torch.ones(2, 2)}},
    "moco": lambda s: {"state_dict": under("module.encoder_q.", s) | {"module.queue": torch.ones(4, 4)}},
    "by module": lambda s: {
        part: {k.removeprefix(f"{part}."): v for k, v in s.items() if k.startswith(f"{part}.")}
        for part in ("stem", "blocks", "fc")
    },
    "all at once": lambda s: {"state": {"model": under("_orig_mod.module.net._fsdp_wrapped_module.", s)}},
    "without counts": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    "half": lambda s: {k: v.half().float() if v.is_floating_point() else v for k, v in s.items()},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_located_in_every_form(form, trained, tmp_path):
    content = FORMS[form](trained.state_dict())
    torch.save(content, tmp_path / "w.pth.tar")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load_model(Net(), weights=tmp_path / "w.pth.tar")
    assert loaded.incomplete == ()
    for name, value in trained.state_dict().items():
        if not (form == "without counts" and "num_batches" in name):
            expected = value.half().float() if form == "half" and value.is_floating_point() else value
            assert torch.equal(loaded.module.state_dict()[name], expected), name
    told = [str(warning.message) for warning in caught if "read from" in str(warning.message)]
    plain = form in ("bare", "without counts", "half", "by module") or " of a part" in form
    assert bool(told) == (not plain and form not in ("compiled block", "activations"))


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ("state_dict", r"key='state_dict'$"),
        ("lightning net", r"key='state_dict', prefix='net\.'; left out, not under this prefix: criterion\.weight"),
        (
            "teacher",
            r"key='teacher', prefix='module\.backbone\.'; left out, not under this prefix: module\.head\.weight",
        ),
        ("all at once", r"key='state\.model', prefix='_orig_mod\.module\.net\._fsdp_wrapped_module\.'$"),
    ],
)
def test_what_was_understood_is_told(form, told, trained, tmp_path):
    torch.save(FORMS[form](trained.state_dict()), tmp_path / "w.pt")
    with pytest.warns(UserWarning, match=rf"weights of .*w\.pt: read from {told}"):
        load_model(Net(), weights=tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore:weights of")
@pytest.mark.parametrize(
    ("content", "way_out"),
    [
        (lambda s: {"teacher": under("backbone.", s), "student": under("module.backbone.", other(s))}, "key='teacher'"),
        (lambda s: {"state_dict": s, "state_dict_ema": other(s)}, "key='state_dict'"),
        (lambda s: {"state_dict": under("ema.", other(s)) | under("model.", s)}, "prefix='model.'"),
        (lambda s: {"state_dict": under("module.encoder_k.", other(s)) | under("module.encoder_q.", s)},
         "prefix='encoder_q'"),
        (lambda s: s | under("module.", other(s)), None),
    ],
    ids=["dino", "timm", "lightning", "moco", "bare and wrapped"],
)  # fmt: skip
def test_two_sets_of_weights_are_not_chosen_from_by_guess(content, way_out, trained, tmp_path):
    torch.save(content(trained.state_dict()), tmp_path / "w.pth")
    before = Net()
    state = {name: value.clone() for name, value in before.state_dict().items()}
    with pytest.raises(
        ModelError, match=r"several sets of weights that fit Net equally well; choose with .*(key|prefix)="
    ):
        load_model(before, weights=tmp_path / "w.pth")
    assert all(torch.equal(before.state_dict()[name], value) for name, value in state.items())
    if way_out is not None:
        option, _, value = way_out.partition("=")
        loaded = load_model(Net(), weights=tmp_path / "w.pth", **{option: value.strip("'")})
        assert torch.equal(loaded.module.fc.weight, trained.fc.weight)


@pytest.mark.filterwarnings("ignore:weights of")
def test_equal_sets_of_weights_are_no_question(trained, tmp_path):
    state = trained.state_dict()
    torch.save({"model": state, "ema": {k: v.clone() for k, v in state.items()}}, tmp_path / "w.pth")
    assert torch.equal(load_model(Net(), weights=tmp_path / "w.pth").module.fc.weight, trained.fc.weight)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"key": "techer"}, r"no weights under key='techer'; nearest: 'teacher'; it has student, teacher"),
        (
            {"key": "teacher", "prefix": "head."},
            r"no weights of the model under prefix='head\.'.*begin with backbone\.",
        ),
        ({"key": 3}, "key must be text"),
        ({"strict": "no"}, "strict must be True or False"),
    ],
)
def test_wrong_keys_and_prefixes_name_those_there_are(options, told, trained, tmp_path):
    state = trained.state_dict()
    torch.save({"teacher": under("backbone.", state), "student": under("backbone.", other(state))}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=told):
        load_model(Net(), weights=tmp_path / "w.pth", **options)
    with pytest.raises(ModelError, match="choose weights within a file"):
        load_model(Net(), key="teacher")


def test_names_of_wrappers_may_be_names_of_the_model(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.plain = nn.Linear(2, 3), nn.Linear(2, 3)

    class Clashing(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.weight = nn.Linear(2, 3, bias=False), nn.Parameter(torch.zeros(3, 2))

    for kind in (Wrapped, Clashing):
        trained = kind()
        torch.save(trained.state_dict(), tmp_path / "w.pt")
        loaded = load_model(kind(), weights=tmp_path / "w.pt").module.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in trained.state_dict().items())


def test_one_of_two_names_of_a_tensor_suffices(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
            self.two.weight = self.one.weight

    trained = Tied()
    state = trained.state_dict()
    del state["two.weight"]
    save_file(state, tmp_path / "w.safetensors")
    loaded = load_model(Tied(), weights=tmp_path / "w.safetensors")
    assert torch.equal(loaded.module.two.weight, trained.one.weight)
    assert loaded.incomplete == ()


# Heads


@pytest.fixture
def photographs(tmp_path) -> Path:
    folder, rng = tmp_path / "mine", np.random.default_rng(0)
    folder.mkdir()
    for k in range(6):
        pixels = rng.integers(0, 256, (40 + 3 * k, 60 - 2 * k, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


def test_own_checkpoint_and_photographs_of_mixed_sizes_work_at_the_first_try(photographs, tmp_path):
    torch.manual_seed(0)
    trained = torchvision.models.resnet18(num_classes=3).eval()
    torch.save(trained.state_dict(), tmp_path / "ckpt.pth")
    loaded = load_model("torchvision:resnet18", weights=tmp_path / "ckpt.pth", num_classes=3)
    result = sweep(loaded, photographs, ["layer4.1"], ["identity"], max_hours=None)
    assert result.cka.shape == (1, 1)
    x = torch.stack([loaded.preprocess(Image.open(file)) for file in sorted(photographs.iterdir())])
    outputs = []
    trained.layer4[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad(), Probe(loaded.module, "layer4.1") as probe:
        loaded.module(x)
        trained(x)
    assert torch.equal(probe.representations["layer4.1"].tokens, outputs[0].flatten(2).mT)
    with pytest.warns(UserWarning, match=r"resnet18 is built with 3 classes, as the head in .*ckpt.pth has"):
        inferred = load_model("torchvision:resnet18", weights=tmp_path / "ckpt.pth")
    assert inferred.fingerprint == loaded.fingerprint


@pytest.mark.parametrize("source", ["torchvision:shufflenet_v2_x0_5", "timm:test_vit"])
@pytest.mark.parametrize("head", ["none", "another", "same", "deeper"])
def test_only_the_head_is_left_out(source, head, tmp_path):
    whole = load_model(source, weights=None, seed=1, num_classes=7 if head == "same" else 4).module
    names = {name for name in whole.state_dict() if name.split(".")[0] in ("fc", "head")}
    state = {
        name: value for name, value in whole.state_dict().items() if head in ("same", "another") or name not in names
    }
    top = "head" if "timm" in source else "fc"
    if head == "deeper":
        state |= {f"{top}.{k}.weight": torch.ones(4, 4) for k in (0, 2)}
    torch.save(state, tmp_path / "w.pth")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load_model(source, weights=tmp_path / "w.pth", num_classes=7)
    own = loaded.module.state_dict()
    assert set(loaded.incomplete) == (set() if head == "same" else names)
    for name, value in own.items():
        if name in loaded.incomplete:
            assert value.isnan().all()
        else:
            assert torch.equal(value, whole.state_dict()[name])
    assert any(f"{top}.weight" in str(warning.message) for warning in caught) == (head != "same")
    broken = {name: value for name, value in state.items() if name != sorted(set(state) - names)[0]}
    torch.save(broken, tmp_path / "broken.pth")
    with pytest.raises(ModelError, match=r"do not fit .*missing: .*strict=False \(--no-strict\)"):
        load_model(source, weights=tmp_path / "broken.pth", num_classes=7)


@pytest.mark.filterwarnings("ignore")
def test_layers_that_need_missing_weights_are_refused_and_others_are_not(trained, tmp_path):
    state = {name: value for name, value in trained.state_dict().items() if not name.startswith("blocks.1.")}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"do not fit Net \(missing: blocks.1.weight, blocks.1.bias\); strict=False"):
        load_model(Net(), weights=tmp_path / "w.pth")
    loaded = load_model(Net(), weights=tmp_path / "w.pth", strict=False)
    assert loaded.incomplete == ("blocks.1.weight", "blocks.1.bias")
    images = torch.rand(6, 3, 12, 12)
    assert sweep(loaded, images, ["stem", "blocks.0"], ["identity"], max_hours=None).cka.shape == (2, 2)
    for layer in ("blocks.1", "fc"):  # the head is complete, and computed from a block that is not
        with pytest.raises(ModelError, match=rf"layer '{layer}' of model 'Net' needs weights .*\(blocks.1.weight"):
            sweep(loaded, images, [layer], ["identity"], max_hours=None)


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_another_architecture_are_never_taken(strict, tmp_path):
    torch.save(nn.Linear(9, 8).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ModelError, match="do not fit Net"):
        load_model(Net(), weights=tmp_path / "w.pth", strict=strict)


def test_number_of_classes_without_weights_of_ones_own(tmp_path):
    assert load_model("torchvision:resnet18", weights=None, num_classes=3).module.fc.out_features == 3
    assert isinstance(load_model("timm:test_vit", weights=None, num_classes=0).module.head, nn.Identity)
    for source, told in (
        ("hf:a/b", "hf-classifier:a/b"), (Net(), "build your own module"), (Net, "build your own module"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=told):
            load_model(source, weights=None, num_classes=3)
    with pytest.raises(ModelError, match="num_classes must be at least 1"):
        load_model("torchvision:resnet18", weights=None, num_classes=0)


@pytest.mark.filterwarnings("ignore")
def test_weights_of_a_part_fit_the_part(trained, tmp_path):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.text = Net(), nn.Linear(2, 2)

    torch.save(trained.state_dict(), tmp_path / "w.pth")
    loaded = load_model(Whole(), weights=tmp_path / "w.pth", part="net")
    assert torch.equal(loaded.module.fc.weight, trained.fc.weight)
    assert loaded.incomplete == ()


# Files


class Callback:
    """An object of a program that another one cannot know."""

    ran = False

    def __init__(self) -> None:
        self.best = torch.ones(2)

    def __setstate__(self, state) -> None:
        type(self).ran = True


class Malicious:
    def __reduce__(self):
        return exec, ("open('RAN', 'w').close()",)


@pytest.mark.filterwarnings("ignore:weights of")
@pytest.mark.parametrize(
    "extra", [argparse.Namespace(lr=0.1), Path("a"), np.float64(3), nn.MSELoss, Callback(), Malicious()],
    ids=["namespace", "path", "numpy", "class", "object", "malicious"],
)  # fmt: skip
def test_other_objects_in_a_checkpoint_are_neither_needed_nor_built(extra, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": trained.state_dict(), "args": extra}, "w.pth")
    assert torch.equal(load_model(Net(), weights="w.pth").module.fc.weight, trained.fc.weight)
    assert not Path("RAN").exists()
    assert not Callback.ran


def test_pickled_models_are_read_only_where_that_is_allowed(trained, tmp_path):
    torch.save({"model": trained}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"holds more than tensors.*allow_pickle=True"):
        load_model(Net(), weights=tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="key='model'"):
        loaded = load_model(Net(), weights=tmp_path / "w.pth", allow_pickle=True)
    assert torch.equal(loaded.module.fc.weight, trained.fc.weight)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("given", ["index", "folder"])
def test_shards_are_read_together(kind, given, trained, tmp_path):
    state = OrderedDict(trained.state_dict())
    names, stem, suffix = list(state), *kind.rsplit(".", 1)
    mapping = {}
    for k, part in enumerate((names[:3], names[3:]), 1):
        file = f"{stem}-0000{k}-of-00002.{suffix}"
        shard = {name: state[name] for name in part}
        save_file(shard, tmp_path / file) if suffix == "safetensors" else torch.save(shard, tmp_path / file)
        mapping |= dict.fromkeys(part, file)
    index = tmp_path / f"{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    loaded = load_model(Net(), weights=index if given == "index" else tmp_path)
    assert all(torch.equal(loaded.module.state_dict()[name], value) for name, value in state.items())
    index.write_text(json.dumps({"weight_map": {"a": f"../{tmp_path.name}/{file}"}}))
    with pytest.raises(ModelError, match="not a file in its folder"):
        load_model(Net(), weights=index)
    index.write_text(json.dumps({"weight_map": {"a": "absent.bin"}}))
    with pytest.raises(ModelError, match=r"absent.bin, which is missing: put all shards into"):
        load_model(Net(), weights=index)
    index.write_text("[]")
    with pytest.raises(ModelError, match="is not an index of shards"):
        load_model(Net(), weights=index)


def test_folders_without_weights_say_what_is_missing(tmp_path):
    with pytest.raises(ModelError, match=r"is a folder without model.safetensors"):
        load_model(Net(), weights=tmp_path)
    (tmp_path / ".metadata").touch()
    with pytest.raises(ModelError, match=r"dcp_to_torch_save"):
        load_model(Net(), weights=tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_quantised_weights_keep_their_format(tmp_path):
    def quantised(seed):
        torch.manual_seed(seed)
        return torch.ao.quantization.quantize_dynamic(Net().eval(), {nn.Linear}, dtype=torch.qint8)

    trained, x = quantised(1), torch.rand(2, 3, 12, 12)
    torch.save({"state_dict": under("module.", trained.state_dict())}, tmp_path / "w.pt")
    with torch.no_grad():
        assert torch.equal(load_model(quantised(2), weights=tmp_path / "w.pt").module(x), trained(x))


# Preprocessing by a word


def test_mixed_sizes_name_the_preprocessing_that_then_works(photographs):
    with (
        pytest.raises(ImageError, match=r"load_model\(model, preprocess='resize-crop', size=224\)"),
        pytest.warns(UserWarning, match="no preprocessing given for Net"),
    ):
        sweep(Net(), photographs, ["stem"], ["identity"], max_hours=None)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = load_model(Net(), preprocess="resize-crop", size=32)
        assert sweep(loaded, photographs, ["stem"], ["identity"], max_hours=None).cka.shape == (1, 1)


def test_words_resize_and_crop_the_centre():
    left, right = Image.new("RGB", (300, 100), (255, 0, 0)), Image.new("RGB", (100, 100), (0, 51, 255))
    left.paste(right, (100, 0))
    pixels = load_model(Net(), preprocess="resize-crop", size=50).preprocess(left)
    assert pixels.shape == (3, 50, 50)
    assert left.size == (300, 100)
    torch.testing.assert_close(pixels[:, :, 3:-3], torch.tensor([0, 0.2, 1.0])[:, None, None].expand(3, 50, 44))
    normalised = load_model(Net(), preprocess="imagenet", size=(20, 30)).preprocess(left)
    assert normalised.shape == (3, 20, 30)
    expected = torchvision.transforms.functional.normalize(
        torch.tensor([0, 0.2, 1.0])[:, None, None], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    torch.testing.assert_close(normalised[:, 10:11, 15:16], expected)
    assert load_model(Net(), preprocess="resize-crop").preprocess(left).shape == (3, 224, 224)


def test_a_function_replaces_the_preprocessing_of_a_library():
    loaded = load_model("timm:test_vit", weights=None, preprocess=to_tensor)
    assert loaded.preprocess is to_tensor
    assert not loaded.default_preprocess
    again = load_model(loaded, preprocess="resize-crop", size=16)
    assert again.preprocess(Image.new("RGB", (40, 30))).shape == (3, 16, 16)
    assert again.module is loaded.module


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"preprocess": "resize"}, "unknown preprocess 'resize'; nearest: 'resize-crop'"),
        ({"preprocess": 3}, "preprocess must be a function"),
        ({"size": 32}, "size= needs preprocess="),
        ({"preprocess": to_tensor, "size": 32}, "size= needs preprocess="),
        ({"preprocess": "imagenet", "size": 0}, "size must be at least 1"),
        ({"preprocess": "imagenet", "size": "a"}, "size must be a whole number"),
    ],
)
def test_wrong_preprocessing_is_named(options, told):
    with pytest.raises(ModelError, match=told):
        load_model(Net(), **options)


def test_loaded_models_are_not_loaded_again():
    loaded = load_model(Net())
    for options in ({"weights": None}, {"weights": "w.pth"}, {"part": "stem"}, {"num_classes": 3}):
        with pytest.raises(ModelError, match="Net is loaded; give weights=, part= and num_classes= where it is loaded"):
            load_model(loaded, **options)


def test_a_saved_model_without_its_image_processor_takes_preprocessing_of_ones_own(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    model = transformers.ViTModel(config).eval()
    model.save_pretrained(tmp_path)
    found = load_model(f"hf:{tmp_path}", preprocess="imagenet", size=32)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.module.state_dict().items())
    assert not found.default_preprocess
    assert load_model(f"hf:{tmp_path}").default_preprocess
