"""Models and images that a process which shares nothing with this one loads again."""

import functools
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rsm_probe import load_model
from rsm_probe.config import ConfigFolder
from rsm_probe.errors import ImageError, ModelError
from rsm_probe.runs.images_config import ImagesConfig
from rsm_probe.runs.model_config import ModelConfig
from rsm_probe.sources import ImageLoader, ImageSet, as_images, images_address, images_in, model_address
from rsm_probe.sources.addresses import ModelAddress
from rsm_probe.sources.images.crops import crop_pairs
from rsm_probe.sources.images.image_set import pixel_bytes
from rsm_probe.sources.models.user_functions import function_of

CODE = """
import torch
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
def call(model, batch):
    return model(batch * 2)
class Data:
    def __len__(self):
        return 5
    def __getitem__(self, index):
        return torch.full((3, 8, 8), index / 5), "abcde"[index]
def data():
    return Data()
def loader():
    return torch.utils.data.DataLoader(Data())
"""
RECIPE = {
    "images": "digits",
    "steps": 0,
    "size": 16,
    "count": 60,
    "expected_accuracy": 0,
    "network": {"widths": [4, 4, 8, 8]},
}
BATCH = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3))


def halved(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB").resize((8, 8)))).permute(2, 0, 1) / 510


def called(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch) + 1


def facts(thing):
    """What a process has of a model or of images, as values that can be compared."""
    if isinstance(thing, ImageSet):
        pixels = [bytes(pixel_bytes(thing[k])) for k in range(len(thing))]
        targets = None if thing.targets is None else thing.targets.values.tolist()
        notes = list(thing.annotations), dict(thing.skipped), thing.fingerprint()
        return thing.name, list(thing.ids), list(thing.labels), targets, notes, pixels
    reading = thing.reading
    made = {"module", "preprocess", "reading", "origin"}
    plain = {part.name: getattr(thing, part.name) for part in fields(thing) if part.name not in made}
    return plain, thing.fingerprint, reading.layers, reading.settings()


def loaded(address):
    return facts(address.load())


def output(address: ModelAddress) -> np.ndarray:
    model = address.load()
    with torch.no_grad():
        return model.reading.call(model.module, BATCH).numpy()


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A process that has loaded nothing, and works in another folder."""
    spawn, folder = multiprocessing.get_context("spawn"), tmp_path_factory.mktemp("elsewhere")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=os.chdir, initargs=(folder,)) as pool:
        yield pool


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working folder of this process, with the files that a user names by relative paths."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(CODE)
    rng = np.random.default_rng(0)
    for name in ("a/0.png", "a/1.png", "b/2.png", "b/3.png"):
        Path("pictures", name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(f"pictures/{name}")
    Path("pictures/b/broken.png").write_bytes(b"nothing")
    np.save("array.npy", rng.random((6, 3, 8, 8), np.float32))
    Path("labels.csv").write_text("".join(f"{k},label {k}\n" for k in range(6)))
    return tmp_path


def checkpoint() -> str:
    net = load_model("torchvision:resnet18", weights=None, num_classes=7, seed=4).module
    torch.save({"state_dict": {f"module.{name}": value for name, value in net.state_dict().items()}}, "net.pth")
    return "net.pth"


def trained(title: str):
    entry = ModelConfig.parse({"name": "net", "recipe": RECIPE, "dilated": [0, 1], "tokens": "mean"}, "test")
    return {name: model for name, model, _ in entry.load(Path("networks"))}[title]


def vit(**options):
    return load_model("timm:test_vit", weights=None, seed=2, **options)


MODELS = {
    "random weights": lambda: load_model("torchvision:resnet18", weights=None, seed=3, name="net"),
    "a checkpoint": lambda: load_model("torchvision:resnet18", checkpoint(), num_classes=7),
    "half a checkpoint": lambda: load_model("torchvision:resnet18", checkpoint(), num_classes=5, strict=False),
    "a recipe": lambda: trained("net"),
    "a dilated recipe": lambda: trained("net-dilated1"),
    "a file of a recipe": lambda: trained("net") and load_model("networks/net.safetensors", preprocess="resize-crop"),
    "a part": lambda: load_model("timm:test_resnet", weights=None, seed=1, part="layer1", inputs="x"),
    "tokens": lambda: vit(tokens=["class", "mean"], layers="blocks.*"),
    "tokens said later": lambda: load_model(vit(layers="blocks"), tokens="mean", layouts={"blocks.*": "NTC"}),
    "a word said later": lambda: load_model(vit(), preprocess="imagenet", size=(24, 32)),
    "a name said later": lambda: replace(vit(), name="net", step=3, network="training"),
    "a function of a file": lambda: load_model("own.py:net", seed=5, forward=function_of("own.py:call", "forward")),
    "a function": lambda: load_model(tiny, seed=5, preprocess=halved, forward=called),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", MODELS)
def test_another_process_loads_the_same_model(case, elsewhere):
    model = MODELS[case]()
    address = model_address(model)
    assert hash(address) == hash(pickle.loads(pickle.dumps(address)))
    assert elsewhere.submit(loaded, address).result() == facts(model)


@pytest.mark.parametrize("case", ["a function of a file", "a function"])
def test_another_process_makes_the_same_call(case, elsewhere):
    model = MODELS[case]()
    with torch.no_grad():
        expected = model.reading.call(model.module, BATCH).numpy()
        assert not np.array_equal(expected, model.module(BATCH).numpy())
    np.testing.assert_array_equal(elsewhere.submit(output, model_address(model)).result(), expected)


@pytest.mark.slow
def test_a_model_of_open_clip(elsewhere):
    pytest.importorskip("open_clip")
    model = load_model("open_clip:RN50", weights=None, seed=0)
    assert elsewhere.submit(loaded, model_address(model)).result() == facts(model)


@pytest.mark.slow
def test_a_local_folder_of_transformers(elsewhere):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32, patch_size=16
    )
    torch.manual_seed(0)
    transformers.ViTModel(config).save_pretrained("vit")
    model = load_model("hf:vit", preprocess="imagenet", size=32)
    assert elsewhere.submit(loaded, model_address(model)).result() == facts(model)


LAMBDAS = {
    "was given as a module": lambda: load_model(tiny()),
    "random without a seed; give seed=": lambda: load_model("timm:test_vit", weights=None),
    "built by a function without a name": lambda: load_model(lambda: tiny()),
    "built by a function without": lambda: load_model(functools.partial(tiny)),
    "preprocess is a function without": lambda: vit(preprocess=lambda image: halved(image)),
    "preprocess is a function": lambda: load_model(vit(), preprocess=lambda image: halved(image)),
    "forward= is a function without": lambda: vit(forward=lambda model, batch: model(batch)),
    "given as a module, which": lambda: load_model(load_model(tiny()), preprocess="imagenet"),
}


@pytest.mark.parametrize("reason", LAMBDAS)
def test_what_has_no_address_says_why_and_what_to_do(reason):
    with pytest.raises(ModelError, match=f"'.+'.*{reason}.*leave out executor="):
        model_address(LAMBDAS[reason]())


def test_models_that_differ_from_their_address_are_refused():
    model = load_model("own.py:net", seed=5, name="net")
    address = model_address(model)
    with pytest.raises(ModelError, match=r"different model for 'net'.*seed= must be given"):
        model_address(load_model("own.py:net", name="net")).load()
    with torch.no_grad():
        model.module[0].weight.mul_(2)
    with pytest.raises(ModelError, match="different model for 'net': its weights"):
        model_address(model).load()
    Path("own.py").write_text(CODE.replace("batch * 2", "batch * 3"))
    with pytest.raises(ModelError, match=r"cannot load model 'net'.*own.py has changed"):
        address.load()
    Path("own.py").unlink()
    with pytest.raises(ModelError, match=r"cannot load model 'net'"):
        address.load()


@pytest.mark.parametrize("change", ["hook", "mode", "method"])
def test_models_whose_layers_were_changed_in_place_are_refused(change):
    model = vit()
    if change == "hook":
        model.module.blocks[0].register_forward_hook(lambda module, inputs, output: output * 0)
    elif change == "mode":
        model.module.blocks[0].train()
    else:
        model.module.blocks[0].forward = lambda x, **options: x
    with pytest.raises(ModelError, match=r"hooks, training flags or methods of model 'test_vit'.*file\.py:function"):
        model_address(model).load()


def test_loading_again_draws_no_random_numbers_and_repeats_no_warnings(recwarn):
    model = load_model("torchvision:resnet18", checkpoint(), num_classes=7)
    assert any("state_dict" in str(warning.message) for warning in recwarn.list)
    recwarn.clear()
    address, state = model_address(model), torch.random.get_rng_state()
    address.load()
    assert not recwarn.list
    torch.testing.assert_close(torch.random.get_rng_state(), state)


def test_a_thread_loads_a_model_once():
    address, other = model_address(vit()), model_address(vit(name="other"))
    once = address.load_once()
    assert address.load_once() is once
    assert other.load_once().name == "other"
    assert address.load_once() is not once
    images = images_address(as_images("digits"))
    assert images.load_once() is images.load_once()


def config(**keys) -> ImageSet:
    return ImagesConfig.parse(keys, "test", ConfigFolder(Path.cwd(), allow_code=True)).load()


IMAGES = {
    "digits": lambda: as_images("digits").sample(9, 1),
    "scenes": lambda: config(source="scenes", count=4, size=48, frames=2, seed=3),
    "cluttered": lambda: config(source="cluttered", count=3, size=48),
    "photos": lambda: config(source="photos", count=3, size=16, split="test"),
    "a folder": lambda: as_images("pictures"),
    "this folder": lambda: os.chdir("pictures") or as_images("."),
    "a sample of a folder": lambda: as_images("pictures").sample(3, 5).subset([-1, 0, 0]),
    "a split": lambda: os.makedirs("set") or os.rename("pictures", "set/train") or config(source="set", split="train"),
    "sizes": lambda: config(source="pictures", size=12, count=3, seed=2),
    "crops": lambda: crop_pairs(as_images("pictures"), 16, 12),
    "an array": lambda: as_images("array.npy", axes="NCHW"),
    "an array with labels": lambda: config(source="array.npy", axes="NCHW", labels="labels.csv"),
    "paths": lambda: as_images(["pictures/b/3.png", Path("pictures/a/0.png")], ids=["x", "y"], labels=[1, 0]),
    "clips": lambda: Path("pictures/b/broken.png").unlink() or as_images("pictures", clips=2, axes="NCTHW"),
    "a function": lambda: config(source="own.py:data", count=3),
    "a function in Python": lambda: images_in("own.py:data", labels=list("vwxyz"), ids=list("54321")),
    "a function with keys": lambda: images_in("own.py:data", image_key=0, label_key=[1]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", IMAGES)
def test_another_process_loads_the_same_images(case, elsewhere):
    images = IMAGES[case]()
    address = images_address(images)
    assert hash(address) == hash(pickle.loads(pickle.dumps(address)))
    assert elsewhere.submit(loaded, address).result() == facts(images)


def test_an_address_of_many_images_is_small():
    images = as_images("digits").sample(1000).subset(np.arange(500))
    assert len(pickle.dumps(images_address(images))) < 3000


IN_MEMORY = {
    "tensor": lambda: as_images(torch.rand(4, 3, 8, 8)),
    "pictures": lambda: as_images([Image.new("RGB", (8, 8))] * 2),
    "own set": lambda: ImageSet("own", ["a", "b"], lambda index: BATCH[0]),
    "a sample": lambda: as_images(torch.rand(4, 3, 8, 8)).sample(2),
    "other attributes": lambda: replace(as_images("digits"), load=lambda index: BATCH[0]),
    "other content": lambda: as_images("digits").changed(load=lambda index: BATCH[0]),
    "a loader": lambda: ImageLoader([BATCH]),
    "a function that makes a loader": lambda: images_in("own.py:loader"),
}


@pytest.mark.parametrize("case", IN_MEMORY)
def test_images_of_this_process_only_have_no_address(case):
    with pytest.raises(ImageError, match=r"no other process can load.*images_in\('data.py:function'\).*executor="):
        images_address(IN_MEMORY[case]())


@pytest.mark.filterwarnings("ignore")
def test_files_that_changed_are_refused_and_none_is_decoded(monkeypatch):
    address = images_address(as_images("pictures"))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *files: pytest.fail("decoded an image"))
        address.load()
    Image.new("RGB", (9, 9)).save("pictures/a/0.png")
    with pytest.raises(ImageError, match=r"different images for 'pictures'.*changed"):
        address.load()


def test_a_folder_that_is_gone_is_named():
    address = images_address(as_images(["pictures/a/0.png"]))
    Path("pictures/a/0.png").unlink()
    with pytest.raises(ImageError, match=r"'files'.*leave out executor="):
        address.load()


def test_origins_change_no_fingerprint_and_no_repr():
    images, model = as_images("digits"), vit()
    assert images.fingerprint() == images.changed(origin=None).fingerprint()
    assert model.fingerprint == replace(model, origin="none").fingerprint
    assert "origin" not in repr(images) + repr(model)
    assert model == replace(model, origin="none")
