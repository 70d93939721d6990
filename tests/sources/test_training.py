"""The small training recipe: repeatable, saved with its recipe, refused where it does not fit."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from rsm_probe.errors import ConfigError, ImageError, ModelError, RsmProbeError, StorageError
from rsm_probe.sources import (
    NetworkConfig,
    TrainingConfig,
    build_network,
    digits,
    normalise,
    train,
    train_or_load,
)
from rsm_probe.sources.loading import load_model
from rsm_probe.sources.training.trained_network import load_trained

NETWORK = NetworkConfig(widths=(8, 8, 16, 16), stem_stride=2)
RECIPE = TrainingConfig(size=16, steps=40, network=NETWORK)
UNTRAINED = TrainingConfig(size=8, steps=0, network=NETWORK)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # Batches are too small for a second thread to help, and threads that wait for a busy processor cost seconds.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(one_thread):
    return train(RECIPE, seed=3)


@pytest.fixture(scope="module")
def untrained(one_thread):
    return train(UNTRAINED, seed=4)


def weights(module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Training


def test_digits_are_learnt_in_few_steps(trained):
    # Ten classes: chance is 0.1.
    assert trained.accuracy > 0.4
    assert (trained.seed, trained.config) == (3, RECIPE)
    assert not any(module.training for module in trained.module.modules())


def test_accuracy_is_that_on_images_held_out_from_training(trained):
    images = digits("test", size=16)
    with torch.no_grad():
        scores = trained.module(torch.stack([normalise(images[k]) for k in range(len(images))]))
    right = (scores.argmax(1).numpy() == np.array([int(label) for label in images.labels])).mean()
    assert trained.accuracy == pytest.approx(right, abs=1e-9)


def test_same_seed_gives_the_same_weights_and_another_seed_others(trained):
    recipe = RECIPE.model_copy(update={"steps": 10, "size": 8})
    torch.manual_seed(111)
    one = train(recipe, seed=1)
    torch.manual_seed(222)
    same, other = train(recipe, seed=1), train(recipe, seed=2)
    assert equal(weights(one.module), weights(same.module))
    assert one.accuracy == same.accuracy
    for name, tensor in weights(one.module).items():
        if tensor.ndim >= 2:
            assert not torch.equal(tensor, weights(other.module)[name]), name


def test_training_leaves_the_random_numbers_of_the_caller_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    train(UNTRAINED)
    assert torch.equal(torch.rand(3), expected)
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_zero_steps_leave_the_network_untrained():
    one, same, other = train(UNTRAINED, seed=1), train(UNTRAINED, seed=1), train(UNTRAINED, seed=2)
    assert equal(weights(one.module), weights(same.module))
    assert not equal(weights(one.module), weights(other.module))
    torch.manual_seed(1)
    assert equal(weights(one.module), weights(build_network(NETWORK, 10)))
    assert one.accuracy < 0.4


@pytest.mark.parametrize(
    ("images", "outputs", "options"),
    [("digits", 10, {"size": 8}), ("scenes", 40, {"size": 48, "count": 70}), ("photos", 18, {"count": 70})],
)
def test_every_embedded_set_can_be_learnt(images, outputs, options):
    result = train(TrainingConfig(images=images, steps=10, batch_size=32, network=NETWORK, **options))
    assert result.module.fc.weight.shape[0] == outputs
    assert 0 <= result.accuracy <= 1


@pytest.mark.parametrize("steps", [10, 11, 25])
def test_every_allowed_number_of_steps_trains(steps, untrained):
    result = train(TrainingConfig(size=8, steps=steps, network=NETWORK), seed=4)
    assert not equal(weights(result.module), weights(untrained.module))


@pytest.mark.parametrize("steps", [-1, 1, 5, 9])
def test_too_few_steps_are_refused_before_training(steps):
    with pytest.raises(ConfigError, match="steps:"):
        TrainingConfig.parse({"steps": steps})


def test_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(ImageError, match="1437 training images do not fill one batch of 2000"):
        train(TrainingConfig(size=8, steps=10, batch_size=2000, network=NETWORK))


def test_a_loss_that_is_no_number_ends_training_and_says_where():
    recipe = RECIPE.model_copy(update={"learning_rate": 1e30})
    # Soon, not at the end.
    with pytest.raises(ModelError, match=r"NaN or infinity at step \d of 40; lower learning_rate: \(now 1e\+30\)"):
        train(recipe)


def test_weights_that_the_last_step_ruined_are_no_network(monkeypatch):
    done = []
    step = torch.optim.SGD.step

    def ruin(self, *args):
        step(self, *args)
        done.append(1)
        if len(done) == 10:
            self.param_groups[0]["params"][0].data[0] = torch.nan

    monkeypatch.setattr(torch.optim.SGD, "step", ruin)
    with pytest.raises(ModelError, match="at step 10 of 10"):
        train(RECIPE.model_copy(update={"steps": 10, "size": 8}))


def test_augmentation_is_only_for_those_who_ask_for_it():
    recipe = RECIPE.model_copy(update={"steps": 10, "size": 8})
    plain = weights(train(recipe).module)
    assert equal(plain, weights(train(recipe.model_copy(update={"augment": False})).module))
    assert not equal(plain, weights(train(recipe.model_copy(update={"augment": True})).module))


def test_recipe_from_before_a_key_existed_is_the_same_recipe(untrained, tmp_path):
    path = tmp_path / "net.safetensors"
    untrained.save(path)
    older = UNTRAINED.model_dump(mode="json")
    for key in ("augment", "root"):
        del older[key]
    del older["network"]["architecture"]
    save_file(load_file(path), path, metadata={"recipe": json.dumps(older), "seed": "4", "accuracy": "0.125"})
    assert train_or_load(UNTRAINED, 4, path)[1] == 0.125


def test_unsuitable_image_size_is_refused():
    with pytest.raises((ImageError, ValidationError), match="at least 48"):
        train(TrainingConfig(images="scenes", size=32, count=64, steps=0, network=NETWORK))


def test_preprocessing_centres_the_values():
    tensor = normalise(Image.new("RGB", (2, 2), (0, 255, 51)))
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([-2.0, 2.0, -1.2]))


# Saving and loading


def test_saved_network_gives_the_same_outputs(trained, tmp_path):
    path = tmp_path / "new" / "net.safetensors"
    trained.save(path)
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected = trained.module(x)
        for loaded in (load_trained(path), load_model(path), load_model(str(path))):
            assert torch.equal(loaded.module(x), expected)
            assert loaded.name == "net"
            assert not loaded.module.training
            assert torch.equal(loaded.preprocess(Image.new("RGB", (2, 2))), torch.full((3, 2, 2), -2.0))
    assert load_model(path, name="mine").name == "mine"
    # Nothing but the network is left in the folder.
    assert [file.name for file in path.parent.iterdir()] == ["net.safetensors"]


def test_trained_file_without_its_weights_is_the_same_network_with_random_ones(trained, tmp_path):
    path = tmp_path / "net.safetensors"
    trained.save(path)
    module = load_model(path, weights=None).module
    assert [t.shape for t in module.state_dict().values()] == [t.shape for t in trained.module.state_dict().values()]
    assert not equal(weights(module), weights(trained.module))


def test_weights_of_another_file_are_not_passed_over(trained, untrained, tmp_path):
    trained.save(tmp_path / "net.safetensors")
    untrained.save(tmp_path / "other.safetensors")
    module = load_model(tmp_path / "net.safetensors", weights=tmp_path / "other.safetensors").module
    assert equal(weights(module), weights(untrained.module))


def test_file_carries_recipe_seed_and_accuracy(trained, tmp_path):
    trained.save(tmp_path / "net.safetensors")
    with safe_open(tmp_path / "net.safetensors", "pt") as stored:
        data = stored.metadata()
    assert TrainingConfig.model_validate_json(data["recipe"]) == RECIPE
    assert int(data["seed"]) == 3
    assert float(data["accuracy"]) == trained.accuracy


def test_network_is_trained_once_and_read_after_that(untrained, tmp_path):
    path = tmp_path / "net.safetensors"
    first, accuracy = train_or_load(UNTRAINED, 4, path)
    written = path.stat().st_mtime_ns
    second, again = train_or_load(UNTRAINED, 4, path)
    assert path.stat().st_mtime_ns == written
    assert accuracy == again
    assert equal(weights(first.module), weights(second.module))
    assert equal(weights(first.module), weights(untrained.module))


@pytest.mark.parametrize(
    ("changes", "seed"),
    [
        ({}, 5),
        ({"learning_rate": 0.2}, 4),
        ({"size": 9}, 4),
        ({"network": NetworkConfig(widths=(8, 8, 8, 8))}, 4),
    ],
    ids=["seed", "rate", "size", "network"],
)
def test_file_of_another_recipe_or_seed_is_refused_and_kept(untrained, tmp_path, changes, seed):
    path = tmp_path / "net.safetensors"
    untrained.save(path)
    content = path.read_bytes()
    with pytest.raises(StorageError, match=r"net.safetensors holds the network of another recipe or seed"):
        train_or_load(UNTRAINED.model_copy(update=changes), seed, path)
    assert path.read_bytes() == content


def test_accuracy_below_the_expected_is_warned_of(tmp_path):
    recipe = UNTRAINED.model_copy(update={"expected_accuracy": 0.9})
    with pytest.warns(UserWarning, match=r"net.safetensors: accuracy 0\.\d+ is below the expected 0.90.*train longer"):
        _, accuracy = train_or_load(recipe, 0, tmp_path / "net.safetensors")
    assert accuracy < 0.9
    assert not train(recipe).as_expected


def test_accuracy_as_expected_is_not_warned_of(tmp_path):
    recipe = RECIPE.model_copy(update={"expected_accuracy": 0.2})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, accuracy = train_or_load(recipe, 3, tmp_path / "net.safetensors")
    assert accuracy >= 0.2


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_damaged_file_is_refused_by_name(untrained, tmp_path, share):
    path = tmp_path / "net.safetensors"
    untrained.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    for read in (load_trained, load_model, lambda p: train_or_load(UNTRAINED, 4, p)):
        with pytest.raises(ModelError, match=r"net.safetensors"):
            read(path)


def test_missing_file_says_what_makes_one(tmp_path):
    with pytest.raises(ModelError, match=r"no trained network at .*net.safetensors.*rsm-probe train"):
        load_trained(tmp_path / "net.safetensors")


def test_file_without_a_recipe_is_refused(tmp_path):
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "net.safetensors")
    with pytest.raises(ModelError, match=r"contains no recipe.*weights="):
        load_trained(tmp_path / "net.safetensors")


@pytest.mark.parametrize("fault", ["tensor missing", "head missing", "other widths", "recipe no JSON", "unknown key"])
def test_file_whose_recipe_and_weights_disagree_is_refused_by_name(untrained, tmp_path, fault):
    path = tmp_path / "net.safetensors"
    untrained.save(path)
    state = load_file(path)
    recipe = UNTRAINED.model_dump(mode="json")
    if fault == "tensor missing":
        del state["layer1.0.conv1.weight"]
    elif fault == "head missing":
        del state["fc.weight"]
    elif fault == "other widths":
        recipe["network"]["widths"] = [8, 8, 8, 8]
    elif fault == "unknown key":
        recipe["optimiser"] = "adam"
    text = "no JSON" if fault == "recipe no JSON" else json.dumps(recipe)
    save_file(state, path, metadata={"recipe": text, "seed": "0", "accuracy": "0.1"})
    with pytest.raises(RsmProbeError, match=r"net.safetensors"):
        load_trained(path)


def test_folder_in_the_place_of_the_file_is_never_replaced(untrained, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "precious").write_text("kept")
    with pytest.raises(StorageError, match=r"cannot write .*models"):
        untrained.save(folder)
    assert (folder / "precious").read_text() == "kept"


def test_folder_that_cannot_be_written_is_named(trained, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot write .*file/net.safetensors"):
        trained.save(tmp_path / "file" / "net.safetensors")


def test_full_disk_is_said_and_keeps_the_old_network(trained, tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    trained.save(path)
    content = path.read_bytes()

    def full(tensors, file, metadata=None):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(StorageError, match=r"cannot write .*net.safetensors: .*No space left"):
        trained.save(path)
    assert path.read_bytes() == content
