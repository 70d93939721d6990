"""Models by name, from local folders and files, and as they are, with their preprocessing."""

import json
import socket
import time

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from rsm_probe.errors import ModelError
from rsm_probe.sources.loading import load_model
from rsm_probe.sources.models.loaded_model import LoadedModel, to_tensor


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No address resolves, no connection is made, no cache holds anything; how long anybody would wait, in seconds."""
    from huggingface_hub import constants

    def refuse(*args, **kwargs):
        raise socket.gaierror("no network")

    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return waited


@pytest.fixture
def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def vit():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    return ViTModel(config).eval()


@pytest.fixture
def vit_folder(vit, tmp_path):
    """What transformers keeps of a model: configuration and preprocessing, without weights."""
    from transformers import ViTImageProcessor

    folder = tmp_path / "org" / "tiny-vit"
    vit.config.save_pretrained(folder)
    ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.25, 0.25]
    ).save_pretrained(folder)
    return folder


def saved(module: nn.Module, path) -> str:
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, path)
    return str(path)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


# By library


def test_torchvision_model_comes_with_its_preprocessing(picture, no_network):
    loaded = load_model("torchvision:resnet18", weights=None)
    assert type(loaded.module) is torchvision.models.ResNet
    assert loaded.name == "resnet18"
    assert not any(module.training for module in loaded.module.modules())
    expected = torchvision.models.ResNet18_Weights.DEFAULT.transforms()(picture)
    assert torch.equal(loaded.preprocess(picture), expected)
    assert loaded.preprocess(picture).shape == (3, 224, 224)


def test_timm_model_comes_with_its_preprocessing(picture, no_network):
    loaded = load_model("timm:test_vit", weights=None)
    assert type(loaded.module).__name__ == "VisionTransformer"
    assert loaded.name == "test_vit"
    assert not any(module.training for module in loaded.module.modules())
    options = timm.data.resolve_data_config({}, model=loaded.module)
    expected = timm.data.create_transform(**options, is_training=False)(picture)
    assert expected.shape == (3, 160, 160)
    assert torch.equal(loaded.preprocess(picture), expected)


def test_transformers_model_comes_from_a_local_folder(vit_folder, picture, no_network):
    loaded = load_model(f"hf:{vit_folder}", weights=None)
    assert type(loaded.module).__name__ == "ViTModel"
    assert loaded.name == "tiny-vit"
    assert not any(module.training for module in loaded.module.modules())
    # One colour keeps its value however it is resized.
    even = loaded.preprocess(Image.new("RGB", (50, 40), (51, 102, 204)))
    assert even.shape == (3, 32, 32)
    expected = (torch.tensor([0.2, 0.4, 0.8]) - 0.5) / 0.25
    torch.testing.assert_close(even, expected[:, None, None].expand(3, 32, 32), rtol=0, atol=1e-5)
    with torch.no_grad():
        assert loaded.module(loaded.preprocess(picture)[None]).last_hidden_state.shape == (1, 17, 16)


def test_trailing_slash_of_a_folder_does_not_change_the_name(vit_folder):
    assert load_model(f"hf:{vit_folder}/", weights=None).name == "tiny-vit"


def test_grey_pictures_are_preprocessed_too(vit_folder):
    grey = Image.new("L", (40, 40), 128)
    for source in ("torchvision:resnet18", f"hf:{vit_folder}"):
        assert load_model(source, weights=None).preprocess(grey.convert("RGB")).shape[0] == 3
    assert load_model(f"hf:{vit_folder}", weights=None).preprocess(grey).shape == (3, 32, 32)


def test_default_weights_of_a_local_folder_are_loaded(vit, vit_folder, no_network):
    vit.save_pretrained(vit_folder)
    loaded = load_model(f"hf:{vit_folder}")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = vit(x).last_hidden_state
        assert torch.equal(loaded.module(x).last_hidden_state, expected)
        random = load_model(f"hf:{vit_folder}", weights=None).module(x).last_hidden_state
    assert not torch.allclose(random, expected)


def test_random_weights_are_those_of_the_seed(no_network):
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(load_model("timm:test_vit", weights=None).module)
    assert same_weights(models[0], models[1])
    assert not same_weights(models[0], models[2])


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "fcn_resnet50"])
def test_random_weights_are_random_in_the_backbone_too(name, no_network):
    # torchvision fetches a pretrained backbone for these unless it is told not to.
    assert load_model(f"torchvision:{name}", weights=None).name == name


def test_name_can_be_given(vit_folder, small_resnet):
    assert load_model("timm:test_vit", weights=None, name="mine").name == "mine"
    assert load_model(small_resnet, name="mine").name == "mine"
    assert load_model(lambda: small_resnet, name="mine").name == "mine"


def test_preprocessing_is_beside_the_module_not_on_it(vit_folder):
    for source in ("torchvision:resnet18", "timm:test_vit", f"hf:{vit_folder}"):
        loaded = load_model(source, weights=None)
        assert callable(loaded.preprocess)
        assert not [name for name in dir(loaded.module) if "preprocess" in name.lower()]


def test_blank_input_fits_the_model(vit_folder):
    for source, size in (("timm:test_vit", 160), (f"hf:{vit_folder}", 32)):
        loaded = load_model(source, weights=None)
        assert loaded.blank_input().shape == (1, 3, size, size)
        with torch.no_grad():
            loaded.module(loaded.blank_input())


# Weights from files


def test_weights_file_is_loaded(tmp_path, no_network):
    torch.manual_seed(5)
    trained = timm.create_model("test_vit").eval()
    loaded = load_model("timm:test_vit", weights=saved(trained, tmp_path / "w.safetensors"))
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(loaded.module(x), trained(x))


def test_weights_file_is_loaded_into_each_library(vit, vit_folder, tmp_path, no_network):
    resnet = torchvision.models.resnet18()
    for source, module in ((f"hf:{vit_folder}", vit), ("torchvision:resnet18", resnet)):
        loaded = load_model(source, weights=saved(module, tmp_path / "w.safetensors"))
        assert same_weights(loaded.module, module)


@pytest.mark.parametrize("form", ["module", "factory"])
def test_weights_file_of_a_module_of_ones_own_is_not_passed_over(form, tmp_path):
    torch.manual_seed(5)
    trained, fresh = nn.Linear(3, 2), nn.Linear(3, 2)
    path = saved(trained, tmp_path / "w.safetensors")
    loaded = load_model(fresh if form == "module" else lambda: fresh, weights=path)
    assert same_weights(loaded.module, trained)


def test_weights_of_another_model_are_refused(tmp_path):
    path = saved(nn.Linear(3, 2), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"w.safetensors do not fit VisionTransformer"):
        load_model("timm:test_vit", weights=path)


def test_damaged_weights_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"no weights at all")
    with pytest.raises(ModelError, match=r"w.safetensors"):
        load_model("timm:test_vit", weights=path)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"no weights at .*absent.safetensors"):
        load_model("timm:test_vit", weights=tmp_path / "absent.safetensors")


@pytest.mark.parametrize("name", ["imagenet", "w.npz"])
def test_weights_of_an_unknown_format_are_refused(name, tmp_path):
    with pytest.raises(ModelError, match=rf"must be 'default', None, a .safetensors file or a checkpoint.*{name}"):
        load_model("timm:test_vit", weights=tmp_path / name)


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w.ckpt"])
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_checkpoints_that_hold_tensors_only_are_loaded(name, key, tmp_path):
    trained = nn.Linear(3, 2)
    state = trained.state_dict()
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / name)
    assert same_weights(load_model(nn.Linear(3, 2), weights=tmp_path / name).module, trained)


def test_checkpoints_that_could_run_code_are_refused_unless_that_is_said(tmp_path):
    trained = nn.Linear(3, 2)
    torch.save(trained, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"w.pth holds more than tensors.*run any code.*allow_pickle=True"):
        load_model(nn.Linear(3, 2), weights=tmp_path / "w.pth")
    loaded = load_model(nn.Linear(3, 2), weights=tmp_path / "w.pth", allow_pickle=True)
    assert same_weights(loaded.module, trained)


def test_damaged_checkpoints_are_named(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"nothing at all")
    with pytest.raises(ModelError, match=r"w.pth"):
        load_model(nn.Linear(3, 2), weights=tmp_path / "w.pth")


# Functions of one's own


def test_function_in_a_file_builds_the_model(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from torch import nn\ndef build():\n    return nn.Sequential(nn.Linear(3, 2), nn.Dropout())\n")
    loaded = load_model(f"{file}:build")
    assert loaded.name == "build"
    assert not loaded.module[1].training


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        ("def build(): return 3", "built", r"mine.py has no function 'built'; nearest: 'build'"),
        ("def build(): return 3", "build", "must return a torch.nn.Module, got int"),
        ("import nothing_of_this_name", "build", r"mine.py cannot be imported: ModuleNotFoundError"),
        ("def", "build", r"mine.py cannot be imported: SyntaxError"),
    ],
)
def test_functions_that_build_no_model_are_answered_with_the_reason(code, name, message, tmp_path):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(ModelError, match=message):
        load_model(f"{tmp_path / 'mine.py'}:{name}")


def test_missing_file_of_a_function_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"no file at .*mine.py"):
        load_model(f"{tmp_path / 'mine.py'}:build")


def test_part_of_a_model_takes_the_place_of_the_whole(small_resnet):
    assert load_model(small_resnet, part="layer2.0").module is small_resnet.layer2[0]
    with pytest.raises(ModelError, match=r"ResNet has no part 'layer9'; nearest: .*'layer"):
        load_model(small_resnet, part="layer9")


def test_without_a_network_the_hub_is_told_at_once(monkeypatch, tmp_path):
    from huggingface_hub import constants

    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(ModelError, match=r"`hf download organisation/some-model`, and put the files in"):
        load_model("hf:organisation/some-model")
    assert asked
    assert sum(waited) < 1
    assert constants.HF_HUB_OFFLINE is False


def test_what_has_to_be_fetched_and_where_it_belongs_is_said(no_network):
    with pytest.raises(ModelError, match=r"https://download.pytorch.org/.*resnet18.*\.pth into .*checkpoints"):
        load_model("torchvision:resnet18")
    with pytest.raises(ModelError, match=r"`hf download timm/resnet18"):
        load_model("timm:resnet18")


# Names that are wrong


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvision:resnet81", r"torchvision has no model 'resnet81'; nearest: .*'resnet18'"),
        ("torchvision:vit_b16", r"nearest: .*'vit_b_16'"),
        ("timm:vit_tiny_patch16_225", r"timm has no model 'vit_tiny_patch16_225'; nearest: .*'vit_tiny_patch16_224'"),
        ("timm:resnet_18", r"nearest: .*'resnet18'"),
    ],
)
def test_unknown_model_is_answered_with_the_nearest(source, message):
    with pytest.raises(ModelError, match=message):
        load_model(source, weights=None)


@pytest.mark.parametrize("source", ["keras:resnet18", "resnet18", "torchvision:", "", ":resnet18", "TIMM:resnet18"])
def test_unknown_library_names_the_known_ones(source):
    with pytest.raises(ModelError, match=r"'torchvision:\.\.\.', 'timm:\.\.\.', 'hf:\.\.\.'") as caught:
        load_model(source, weights=None)
    assert repr(source) in str(caught.value)


def test_missing_folder_and_missing_file_are_named(tmp_path, no_network):
    with pytest.raises(ModelError, match="absent"):
        load_model(f"hf:{tmp_path / 'absent'}", weights=None)
    with pytest.raises(ModelError, match=r"no trained network at .*absent.safetensors"):
        load_model(tmp_path / "absent.safetensors")


def test_folder_without_weights_says_that_random_ones_can_be_had(vit_folder, no_network):
    with pytest.raises(ModelError, match="weights=None"):
        load_model(f"hf:{vit_folder}")


@pytest.mark.parametrize("source", ["torchvision:resnet18", "timm:test_vit", "hf:organisation/some-model"])
def test_weights_that_cannot_be_fetched_say_quickly_what_to_do(source, no_network):
    with pytest.raises(ModelError, match=rf"cannot load {source}: .*check the network.*cache") as caught:
        load_model(source)
    # Random weights of a model of the hub need its configuration.
    assert ("weights=None" in str(caught.value)) == (not source.startswith("hf:"))
    assert sum(no_network) < 1


# Modules of one's own


def test_module_is_taken_as_it_is(small_resnet):
    loaded = load_model(small_resnet)
    assert loaded.module is small_resnet
    assert loaded.name == "ResNet"
    assert loaded.preprocess is to_tensor


def test_factory_is_called_and_its_module_put_into_evaluation_mode():
    loaded = load_model(lambda: nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    assert type(loaded.module) is nn.Sequential
    assert not any(module.training for module in loaded.module.modules())


def test_class_of_modules_is_a_factory():
    class Mine(nn.Module):
        pass

    assert type(load_model(Mine).module) is Mine


def test_factory_of_something_else_is_refused():
    with pytest.raises(ModelError, match=r"must return a torch.nn.Module, got dict"):
        load_model(dict)


def test_loaded_model_is_returned_as_it_is(small_resnet):
    loaded = LoadedModel("mine", small_resnet, to_tensor)
    assert load_model(loaded) is loaded


def test_plain_preprocessing_is_rgb_between_zero_and_one():
    image = Image.new("RGB", (4, 2), (0, 51, 255))
    image.putpixel((3, 1), (255, 255, 255))
    tensor = to_tensor(image)
    assert tensor.shape == (3, 2, 4)
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([0.0, 0.2, 1.0]))
    assert tensor[:, 1, 3].tolist() == [1.0, 1.0, 1.0]
    assert to_tensor(Image.new("L", (4, 2), 255)).min() == 1


# Fingerprints


def test_fingerprint_knows_weights_buffers_and_class_again():
    def model(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))

    def fingerprint(module):
        return LoadedModel("any", module, to_tensor).fingerprint

    one = model(0)
    assert fingerprint(one) == fingerprint(model(0)) == LoadedModel("other name", model(0), to_tensor).fingerprint
    changed = model(0)
    changed[1].running_mean[1] += 1
    half = model(0).half()
    other_class = nn.ModuleList(model(0).children())
    assert len({fingerprint(m) for m in (one, model(1), changed, half, other_class)}) == 5


# State that is not plain tensors


def print_of(module: nn.Module) -> str:
    return LoadedModel("m", module, to_tensor).fingerprint


class Quantised(nn.Module):
    """What PyTorch's quantised layers keep: packed tuples of tensors, numbers, and a dtype."""

    def __init__(self, scale: float = 0.1, value: float = 1.0) -> None:
        super().__init__()
        self.weight = torch.quantize_per_tensor(torch.full((2, 2), value), scale, 0, torch.qint8)

    def get_extra_state(self):
        return (
            self.weight,
            None,
            torch.quantize_per_channel(self.weight.dequantize(), torch.ones(2), torch.zeros(2), 0, torch.qint8),
        )

    def set_extra_state(self, state):
        pass


@pytest.mark.filterwarnings("ignore:.*quant")
def test_fingerprints_of_quantised_weights_follow_their_values():
    found = [print_of(Quantised()), print_of(Quantised()), print_of(Quantised(0.3)), print_of(Quantised(value=0.5))]
    assert found[0] == found[1]
    assert len(set(found)) == 3


class Extra(nn.Module):
    """A module with state of its own."""

    def __init__(self, state) -> None:
        super().__init__()
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    "pair",
    [
        ({"a": torch.ones(2)}, {"a": torch.zeros(2)}),
        ([torch.ones(2)], [torch.zeros(2)]),
        (torch.eye(2).to_sparse(), (2 * torch.eye(2)).to_sparse()),
        (torch.ones(2, dtype=torch.complex64), 1j * torch.ones(2, dtype=torch.complex64)),
        (torch.ones(2).to(torch.float8_e4m3fn), torch.zeros(2).to(torch.float8_e4m3fn)),
        (3, 4),
        (torch.float16, torch.float32),
    ],
    ids=["mapping", "list", "sparse", "complex", "float8", "number", "dtype"],
)
def test_fingerprints_of_any_state_follow_its_values(pair):
    one, other = (print_of(Extra(state)) for state in pair)
    assert one == print_of(Extra(pair[0]))
    assert one != other


def test_fingerprints_do_not_follow_places_in_memory():
    class Acting(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = lambda x: x

        def extra_repr(self):
            return f"act={self.act}"

    assert print_of(Acting()) == print_of(Acting())
    assert print_of(Extra(object())) == print_of(Extra(object()))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_fingerprints_of_scripted_modules_and_of_modules_without_parameters():
    torch.manual_seed(0)
    one, other = (torch.jit.trace(nn.Linear(3, 2).eval(), torch.zeros(1, 3)) for _ in range(2))
    assert print_of(one) == print_of(one)
    assert print_of(one) != print_of(other)
    assert print_of(nn.ReLU()) == print_of(nn.ReLU())
    assert print_of(nn.Sequential()) != print_of(nn.ReLU())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: nn.Sequential(nn.LazyConv2d(4, 3)),
            "0.weight belongs to a lazy module.*call the model on images first",
        ),
        (lambda: nn.Sequential(nn.LazyBatchNorm2d()), "0.weight belongs to a lazy module"),
        (lambda: nn.Linear(3, 2, device="meta"), r"weight is on the meta device.*to_empty\(device='cpu'\)"),
        (lambda: nn.BatchNorm2d(3, affine=False, device="meta"), "running_mean is on the meta device"),
    ],
    ids=["lazy", "lazy norm", "meta", "meta buffer"],
)
def test_weights_without_values_are_named(make, said, tmp_path):
    with pytest.raises(ModelError, match=f"m: {said}"):
        print_of(make())
    with pytest.raises(ModelError, match=said):
        load_model(make(), weights=saved(nn.Linear(3, 2), tmp_path / "w.safetensors"))


def test_the_ways_out_for_weights_without_values_work(tmp_path):
    lazy = nn.Sequential(nn.LazyConv2d(4, 3))
    lazy(torch.zeros(1, 3, 8, 8))
    trained = nn.Sequential(nn.Conv2d(3, 4, 3))
    path = saved(trained, tmp_path / "w.safetensors")
    assert same_weights(load_model(lazy, weights=path).module, trained)
    meta = nn.Sequential(nn.Conv2d(3, 4, 3, device="meta"))
    assert same_weights(load_model(meta.to_empty(device="cpu"), weights=path).module, trained)
    assert print_of(meta) != print_of(nn.Sequential(nn.Conv2d(3, 4, 3)))


def test_whole_numbers_in_place_of_weights_are_refused(tmp_path):
    save_file({"weight": torch.ones(2, 3, dtype=torch.int8), "bias": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"do not fit Linear \(whole numbers: weight\)"):
        load_model(nn.Linear(3, 2), weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "content",
    [b"", bytes(8), (10**13).to_bytes(8, "little") + b"{}", (4).to_bytes(8, "little") + b"null", bytes(range(256))],
    ids=["empty", "zeros", "header", "null", "garbage"],
)
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_weights_of_any_damage_are_refused_by_name(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        load_model(nn.Linear(3, 2), weights=tmp_path / name)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**64}, "seed must be"),
        ({"seed": "1"}, "seed must be"),
        ({"part": 3}, "part must be text"),
        ({"name": 3}, "name must be text, found 3"),
        ({"name": "a\0"}, "name holds a NUL"),
        ({"weights": 3}, "weights must be 'default'"),
        ({"weights": torch.ones(2)}, "weights must be 'default'"),
        ({"weights": "x" * 300 + ".pth"}, "no weights at x"),
        ({"weights": "a\0.pth"}, "no weights at a"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_arguments_of_the_wrong_kind_are_named(options, said):
    with pytest.raises(ModelError, match=said):
        load_model(nn.Linear(3, 2), **options)


@pytest.mark.parametrize("source", [3, None, b"timm:resnet18", ["timm:resnet18"], torch.ones(2)])
def test_what_is_not_a_model_is_named(source):
    with pytest.raises(ModelError, match="a model must be a name, a path, a module or a function, found"):
        load_model(source)


# Code that comes with a model


@pytest.fixture
def coded_folder(tmp_path, monkeypatch):
    """A folder of transformers with a model and a preprocessing of its own, which leave a mark when they are run."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = tmp_path / "org" / "coded", tmp_path / "ran"
    folder.mkdir(parents=True)
    (folder / "modelling.py").write_text(
        f"open({str(mark)!r}, 'a').write('x')\n"
        "import torch\n"
        "from transformers import PretrainedConfig, PreTrainedModel\n"
        "class Config(PretrainedConfig):\n"
        "    model_type = 'coded'\n"
        "class Model(PreTrainedModel):\n"
        "    config_class = Config\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.conv = torch.nn.Conv2d(3, 4, 2)\n"
        "        self.post_init()\n"
        "    def forward(self, pixel_values):\n"
        "        return self.conv(pixel_values)\n"
    )
    (folder / "processing.py").write_text(
        f"open({str(mark)!r}, 'a').write('x')\n"
        "from transformers import ViTImageProcessor\n"
        "class Processor(ViTImageProcessor):\n"
        "    pass\n"
    )
    model = {"AutoConfig": "modelling.Config", "AutoModel": "modelling.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "coded", "auto_map": model}))
    processor = {"auto_map": {"AutoImageProcessor": "processing.Processor"}, "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder, mark


@pytest.mark.parametrize("weights", [None, "default"])
@pytest.mark.parametrize("part", ["model", "preprocessing"])
def test_code_that_comes_with_a_model_is_named_and_not_run(coded_folder, weights, part):
    folder, mark = coded_folder
    if part == "preprocessing":  # a model that transformers knows, and for which it knows no preprocessing
        from transformers import BertConfig, BertModel

        config = BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
        )
        BertModel(config).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"its own Python code.*trust_remote_code=True.*--trust-remote-code") as caught:
        load_model(f"hf:{folder}", weights=weights)
    assert "network" not in str(caught.value)
    assert not mark.exists()


def test_code_of_transformers_in_place_of_the_models_own_is_warned_of(coded_folder, vit):
    folder, mark = coded_folder
    vit.save_pretrained(folder)
    with pytest.warns(
        UserWarning, match=r"coded comes with its own Python code for its preprocessing, which is not run"
    ):
        loaded = load_model(f"hf:{folder}")
    assert type(loaded.module).__name__ == "ViTModel"
    assert not mark.exists()


def test_code_that_somebody_trusts_is_run(coded_folder):
    folder, mark = coded_folder
    loaded = load_model(f"hf:{folder}", weights=None, trust_remote_code=True)
    assert mark.exists()
    assert loaded.preprocess(Image.new("RGB", (9, 9))).shape == (3, 8, 8)
    assert loaded.module(loaded.blank_input()).shape == (1, 4, 7, 7)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[]"),
        ("config.json", "no JSON"),
        ("config.json", '{"model_type": "of tomorrow"}'),
        ("preprocessor_config.json", "3"),
        ("model.safetensors", "garbage"),
        ("model.safetensors", ""),
    ],
)
def test_a_damaged_folder_is_said_to_be_damaged_not_far_away(vit, vit_folder, name, content):
    vit.save_pretrained(vit_folder)
    (vit_folder / name).write_text(content)
    with pytest.raises(ModelError, match=r"cannot load hf:.*tiny-vit: .*check the files in that folder") as caught:
        load_model(f"hf:{vit_folder}")
    assert "network" not in str(caught.value)
