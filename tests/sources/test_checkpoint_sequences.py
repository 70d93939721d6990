"""The checkpoints of one training as models: which files, in which order, of which step."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import rsm_probe
from rsm_probe.errors import ComparisonError, ConfigError, ModelError
from rsm_probe.runs.model_config import ModelConfig
from rsm_probe.sources import TrainingConfig, load_checkpoints, load_model, train_or_load
from rsm_probe.sources.checkpoint_sequences import checkpoint_files
from rsm_probe.sources.training.networks import NetworkConfig
from rsm_probe.storage.paths import file_name

RECIPE = TrainingConfig(
    size=16, steps=10, batch_size=32, network=NetworkConfig(widths=(4, 4, 8, 8), stem_stride=2), checkpoints=(0, 4)
)


def net(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.Conv2d(width, 4, 3, 2))


def save(path, step: int, width: int = 4) -> nn.Module:
    torch.manual_seed(step)
    module = net(width)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(module.state_dict(), path)
    return module


def touch(folder, names) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "net.safetensors"
    train_or_load(RECIPE, 0, path)
    return path.parent


# Which number is the step


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["net_0010.pth", "net_0002.pth", "net_0100.pth"], [2, 10, 100]),
        (["net@10.safetensors", "net@9.safetensors", "net@0.safetensors"], [0, 9, 10]),
        (["epoch=3-step=1200.ckpt", "epoch=12-step=4800.ckpt"], [1200, 4800]),
        (["epoch=02-val_loss=0.32.ckpt", "epoch=11-val_loss=0.9.ckpt"], [2, 11]),
        (["resnet18_v2_10.pth", "resnet18_v2_9.pth"], [9, 10]),
        (["global_step500/model.bin", "global_step2000/model.bin"], [500, 2000]),
        (["checkpoint-50/model_50.bin", "checkpoint-7/model_7.bin"], [7, 50]),
        (["iter_0001000.pt", "iter_0000500.pt"], [500, 1000]),
        (["vit-b16-500k.pt", "vit-b16-1M.pt", "vit-b16-5.pt"], [5, 500_000, 1_000_000]),
        (["run-20240105/step_7.t7", "run-20240106/step_8.t7"], [7, 8]),
        (["model_0004999.pth"], [4999]),
        (["checkpoint_epoch5.pth.tar", "checkpoint_epoch10.pth.tar"], [5, 10]),
    ],
)
def test_step_is_the_number_that_names_say(tmp_path, names, steps):
    touch(tmp_path, names)
    pattern = "*/*" if "/" in names[0] else "*"
    files = checkpoint_files(str(tmp_path / pattern))
    assert list(files) == steps
    assert {str(tmp_path / name) for name in names} == set(files.values())
    assert checkpoint_files([str(tmp_path / name) for name in reversed(names)]) == files


def test_trainer_folders_are_checkpoints(tmp_path):
    for step in (500, 1000, 50):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert list(checkpoint_files(tmp_path / "checkpoint-*")) == [50, 500, 1000]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.pth", "b.pth"], r"a.pth has no number in its name .*narrower pattern, or name the steps .*\{0: FILE"),
        (["epoch=1-step=10.ckpt", "last.ckpt"], r"last.ckpt does not name its step as .*step=10.ckpt does"),
        (["net_1.pth", "net_2.pth", "net_final.pth"], r"net_final.pth has no number"),
        (["a1_b2.pth", "a2_b4.pth"], "unclear which number of .* is its step"),
        (["resnet18_10.pth"], "unclear which number"),
        (["a1.pth", "b2.pth", "b1_3.pth"], "unclear which number"),
        (["loss0.5.pth", "loss0.25.pth"], "no number in its name"),
        (["net_1.pth", "net_01.pth"], r"two checkpoints are of step 1: .*net_01.pth and .*net_1.pth"),
        (["step2_epoch1.pth", "step2_epoch3.pth"], "two checkpoints are of step 2"),
        (["epoch1.pth", "step3.pth"], r"epoch1.pth does not name its step as .*step3.pth does"),
    ],
)
def test_unclear_steps_are_refused_with_the_file(tmp_path, names, message):
    touch(tmp_path, names)
    with pytest.raises(ModelError, match=message):
        checkpoint_files(str(tmp_path / "*"))
    # The way out works.
    files = dict(enumerate(str(tmp_path / name) for name in names))
    assert checkpoint_files(files) == files


@pytest.mark.parametrize(
    ("checkpoints", "message"),
    [
        ("nothing/*.pth", r"no checkpoint matches 'nothing/\*.pth' in "),
        ("nothing/net_1.pth", "no checkpoint at nothing/net_1.pth"),
        ([], "the list is empty"),
        ({}, "mapping of steps to files is empty"),
        ({"a": "net.pth"}, "the step of a checkpoint must be a whole number"),
        ({-1: "net.pth"}, "must be at least 0"),
        (3, "a pattern, a list of files or a mapping, found 3"),
        ([3], "path of a file or a pattern, found 3"),
        ({0: "nothing/net_1.pth"}, r"checkpoint of step 0: no weights at nothing/net_1.pth"),
    ],
)
def test_checkpoints_that_are_not_there_are_refused(checkpoints, message):
    with pytest.raises(ModelError, match=message):
        load_checkpoints(checkpoints, net)


# The models


@pytest.mark.parametrize("source", [net, net()], ids=["function", "module"])
def test_each_checkpoint_is_a_model_with_its_own_weights(tmp_path, source):
    modules = {step: save(tmp_path / f"net_{step:04}.pth", step) for step in (100, 0, 20)}
    models = load_checkpoints(str(tmp_path / "*.pth"), source, layers=["0", "2"])
    name = "net" if source is net else "Sequential"
    assert list(models) == [f"{name}@0", f"{name}@20", f"{name}@100"]
    for model, step in zip(models.values(), (0, 20, 100), strict=True):
        assert (model.name, model.network, model.step) == (f"{name}@{step}", name, step)
        assert file_name(model.name) == model.name
        assert model.reading.layers == ["0", "2"]
        for key, value in modules[step].state_dict().items():
            assert torch.equal(model.module.state_dict()[key], value)


def test_files_of_train_need_no_source(trained):
    models = load_checkpoints(str(trained / "net-steps" / "*.safetensors"))
    assert list(models) == ["net@0", "net@4", "net@10"]
    assert models["net@10"].fingerprint == load_model(trained / "net.safetensors").fingerprint
    assert len({model.fingerprint for model in models.values()}) == 3
    assert list(load_checkpoints(str(trained / "net-steps/*"), name="mine")) == ["mine@0", "mine@4", "mine@10"]


def test_folders_of_a_trainer_are_weights_of_their_architecture(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16
    )
    modules = {}
    for step in (500, 50):
        modules[step] = ViTForImageClassification(config)
        modules[step].save_pretrained(tmp_path / f"checkpoint-{step}")
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    pattern = str(tmp_path / "checkpoint-*")
    models = load_checkpoints(pattern, f"hf-classifier:{tmp_path / 'checkpoint-50'}", "vit")
    assert list(models) == ["vit@50", "vit@500"]
    for step, module in modules.items():
        state = models[f"vit@{step}"].module.state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(state[key], value)
    with pytest.raises(ModelError, match=r"checkpoint-50 is a folder, whose architecture is unknown: give source="):
        load_checkpoints(pattern)


def test_checkpoint_of_another_architecture_is_named(tmp_path, trained):
    for step in (0, 1, 2):
        save(tmp_path / f"net_{step}.pth", step, width=5 if step == 1 else 4)
    with pytest.raises(ModelError, match=r"checkpoint of step 1: the weights in .*net_1.pth do not fit Sequential"):
        load_checkpoints(str(tmp_path / "*.pth"), net)
    # Files of `train` each build the network of their own recipe.
    other = RECIPE.model_copy(update={"network": NetworkConfig(widths=(4, 4, 8, 4), stem_stride=2)})
    train_or_load(other, 0, tmp_path / "other.safetensors")
    files = [trained / "net-steps" / f"net@{step}.safetensors" for step in (0, 10)]
    files.insert(1, tmp_path / "other-steps" / "other@4.safetensors")
    with pytest.raises(ModelError, match=r"(?s)other@4.safetensors is a checkpoint of another architecture.*layer4"):
        load_checkpoints(dict(enumerate(files)))
    # With equal shapes, too.
    strided = RECIPE.model_copy(update={"network": NetworkConfig(widths=(4, 4, 8, 8), stem_stride=1)})
    train_or_load(strided, 0, tmp_path / "strided.safetensors")
    files[1] = tmp_path / "strided-steps" / "strided@4.safetensors"
    with pytest.raises(ModelError, match=r"strided@4.safetensors is a checkpoint of another architecture"):
        load_checkpoints(dict(enumerate(files)))


def test_head_of_another_size_is_another_architecture(tmp_path):
    from torchvision.models import resnet18

    for step, classes in ((1, 3), (2, 3), (3, 4)):
        torch.save(resnet18(num_classes=classes).state_dict(), tmp_path / f"net_{step}.pth")
    with (
        pytest.warns(UserWarning, match="is built with [34] classes"),
        pytest.raises(ModelError, match=r"net_3.pth is a checkpoint of another architecture .*differ in fc.weight"),
    ):
        load_checkpoints(str(tmp_path / "*.pth"), "torchvision:resnet18")


def test_module_that_cannot_be_copied_says_what_to_give(tmp_path):
    class Stubborn(nn.Module):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    save(tmp_path / "net_1.pth", 1)
    with pytest.raises(ModelError, match=r"Stubborn cannot be copied for each checkpoint \(no copies\); give a funct"):
        load_checkpoints(str(tmp_path / "*.pth"), Stubborn())


# In a sweep


def test_result_knows_networks_and_steps(trained, tmp_path):
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    models = load_checkpoints(str(trained / "net-steps" / "*.safetensors"))
    plain = load_model(trained / "net.safetensors")
    options = {"layers": ["layer1.0", "layer4.0"], "batch_size": 8, "matchings": ("identity",)}
    result = rsm_probe.sweep({**models, "plain": plain}, images, **options)
    assert result.networks == {"net": {0: "net@0", 4: "net@4", 10: "net@10"}}
    steps = result.cka["step_a"].values
    np.testing.assert_array_equal(np.isnan(steps), result.cka["model_a"].values == "plain")
    assert set(result.cka["network_b"].values) == {"net", "plain"}
    result.save(tmp_path / "result.zarr")
    stored = rsm_probe.streaming.SweepResult.open(tmp_path / "result.zarr")
    assert stored.networks == result.networks
    np.testing.assert_array_equal(stored.cka["step_b"].values, result.cka["step_b"].values)

    # The coordinates are all that steps change.
    modules = {name: model.module for name, model in models.items()}
    without = rsm_probe.sweep({**modules, "plain": plain.module}, images, **options)
    assert without.networks == {}
    assert not {"step_a", "step_b", "network_a", "network_b"} & set(without.cka.coords)
    np.testing.assert_array_equal(without.cka.values, result.cka.values)


def test_two_networks_of_one_name_are_told_apart_or_refused(trained):
    file = trained / "net-steps" / "net@4.safetensors"
    images = torch.rand(4, 3, 16, 16)
    result = rsm_probe.sweep({"a": str(file), "b": str(file)}, images, ["layer4.0"], ["identity"], batch_size=4)
    with pytest.raises(ComparisonError, match=r"models 'a' and 'b' are both step 4 of network 'net'; give networks"):
        _ = result.networks


# In a configuration


def test_entry_of_checkpoints_is_relative_to_the_configuration(trained, tmp_path):
    from rsm_probe.config import ConfigFolder

    home = ConfigFolder.of(trained / "study.yaml")
    entry = ModelConfig.parse({"name": "mine", "checkpoints": "net-steps/*.safetensors"}, "it", home)
    assert entry.titles() == ["mine@0", "mine@4", "mine@10"]
    assert {title: model.step for title, model, _ in entry.load(tmp_path)} == {"mine@0": 0, "mine@4": 4, "mine@10": 10}
    # As a run folder stores it, it names the files.
    stored = ModelConfig.parse(entry.model_dump(mode="json"))
    assert stored == entry
    assert stored.checkpoint_files[4] == str(trained / "net-steps" / "net@4.safetensors")
    unnamed = ModelConfig.parse({"checkpoints": "net-steps/*.safetensors"}, "it", home)
    assert unnamed.titles() == ["net@0", "net@4", "net@10"]


def test_entry_of_checkpoints_of_a_source_with_its_control(tmp_path):
    from torchvision.models import resnet18

    for step in (1, 2):
        torch.save(resnet18(num_classes=3).state_dict(), tmp_path / f"net_{step}.pth")
    entry = ModelConfig(
        name="net", source="torchvision:resnet18", num_classes=3, checkpoints=str(tmp_path / "*.pth"), control=True
    )
    models = {title: model for title, model, _ in entry.load(tmp_path)}
    assert list(models) == entry.titles() == ["net@1", "net@2", "net-untrained"]
    assert [model.step for model in models.values()] == [1, 2, None]


def test_entry_of_files_of_train_has_their_architecture_without_weights_too(trained, tmp_path):
    entry = ModelConfig(name="net", checkpoints=str(trained / "net-steps" / "*"), control=True)
    models = {title: model for title, model, _ in entry.load(tmp_path)}
    assert list(models) == entry.titles() == ["net@0", "net@4", "net@10", "net-untrained"]
    shapes = [[value.shape for value in model.module.state_dict().values()] for model in models.values()]
    assert shapes == [shapes[0]] * 4
    assert (models["net-untrained"].step, models["net-untrained"].network) == (None, "")
    # Random weights of the same seed are those before the first step.
    assert models["net-untrained"].fingerprint == models["net@0"].fingerprint
    # As `rsm-probe layers` loads an entry.
    assert str(entry.load_source(None).module) == str(models["net@0"].module)


def test_entry_of_a_recipe_gives_one_model_per_seed_and_step(tmp_path):
    entry = ModelConfig(recipe=RECIPE, seeds=(0, 3), dilated=(0, 1))
    models = {title: (model, accuracy) for title, model, accuracy in entry.load(tmp_path)}
    names = [f"resnet-{seed}@{step}" for seed in (0, 3) for step in (0, 4, 10)]
    assert list(models) == entry.titles() == [f"{name}{end}" for name in names for end in ("", "-dilated1")]
    model, accuracy = models["resnet-3@4"]
    assert (model.network, model.step) == ("resnet-3", 4)
    assert 0 <= accuracy <= 1
    assert models["resnet-3@4-dilated1"][0].network == "resnet-3-dilated1"
    assert entry.missing_networks(tmp_path) == []
    assert entry.missing_networks(tmp_path / "elsewhere") == ["resnet-0", "resnet-3"]
    # It is the network that the trainer wrote.
    again, _ = train_or_load(RECIPE.model_copy(update={"checkpoints": None}), 3, tmp_path / "resnet-3.safetensors")
    assert models["resnet-3@10"][0].fingerprint == again.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": {}}, "give either source: or recipe:; checkpoints: of a recipe are among its keys"),
        ({"weights": None, "source": "timm:resnet18"}, "weights: and checkpoints: are both weights"),
        ({"seeds": [0, 1]}, "seeds: applies only to a recipe or to random weights"),
        ({"checkpoints": "nothing/*.pth"}, r"no checkpoint matches 'nothing/\*.pth'"),
        ({"checkpoints": {"x": "a.pth"}}, r"checkpoints.*integer"),
    ],
)
def test_entries_that_contradict_themselves_are_refused(tmp_path, changes, message):
    touch(tmp_path, ["net_1.pth"])
    with pytest.raises(ConfigError, match=message):
        ModelConfig.parse({"name": "net", "checkpoints": str(tmp_path / "*.pth"), **changes})
