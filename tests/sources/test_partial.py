"""Interrupted training: it continues where it stopped and ends in the same bits."""

import signal
import threading
import warnings

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rsm_probe.errors import StorageError
from rsm_probe.sources import train, train_or_load
from rsm_probe.sources.training import train as training
from rsm_probe.sources.training.networks import NetworkConfig
from rsm_probe.sources.training.recipe import TrainingConfig
from rsm_probe.sources.training.training_checkpoint import whole_steps

RECIPE = TrainingConfig(
    size=8, steps=14, batch_size=32, augment=True, network=NetworkConfig(widths=(4, 4, 8, 8), stem_stride=2)
)


class Power(Exception):
    """What ends a training without asking."""


@pytest.fixture(scope="module")
def uninterrupted():
    return {name: tensor.clone() for name, tensor in train(RECIPE, seed=2).module.state_dict().items()}


@pytest.fixture(autouse=True)
def interruptible():
    """Python's own handler, also where the tests run in the background and SIGINT is ignored from the start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


@pytest.fixture
def kept(path):
    return path.with_name("net.partial.safetensors")


def interrupted(path, step, act, expected, seconds=0.0, recipe=RECIPE, seed=2):
    """Let something happen in the middle of a step, and give the steps that were begun."""
    steps = []

    def on_step(number):
        steps.append(number)
        if number == step:
            act()

    with pytest.raises(expected):
        train_or_load(recipe, seed, path, checkpoint_seconds=seconds, on_step=on_step)
    return steps


def power_cut():
    raise Power


def equal(module, other) -> bool:
    state = module.state_dict()
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("step", [2, 7, 14])
def test_killed_training_continues_and_ends_in_the_same_bits(step, path, kept, uninterrupted):
    interrupted(path, step, power_cut, Power)
    assert not path.exists()
    with safe_open(kept, "pt") as stored:
        assert stored.metadata()["step"] == str(step - 1)
    steps = []
    loaded, _ = train_or_load(RECIPE, 2, path, on_step=steps.append)
    assert steps == [*range(step, 15)]
    assert equal(loaded.module, uninterrupted)
    assert [file.name for file in path.parent.iterdir()] == ["net.safetensors"]


def test_killed_over_and_over(path, uninterrupted):
    for step in range(2, 15, 3):
        interrupted(path, step, power_cut, Power)
    assert equal(train_or_load(RECIPE, 2, path)[0].module, uninterrupted)


@pytest.mark.parametrize("part", ["momentum", "running_mean", "weight"])
def test_all_that_is_kept_is_needed(part, path, kept, uninterrupted):
    interrupted(path, 7, power_cut, Power)
    with safe_open(kept, "pt") as stored:
        about = stored.metadata()
    del about["sha256"]  # or the change would be noticed
    state = load_file(kept)
    save_file({k: torch.zeros_like(v) if part in k else v for k, v in state.items()}, kept, metadata=about)
    assert not equal(train_or_load(RECIPE, 2, path)[0].module, uninterrupted)


def test_interruption_ends_the_step_and_keeps_it(path, kept, uninterrupted):
    # A minute has not passed: it is the interruption that writes.
    steps = interrupted(path, 5, lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt, seconds=60)
    assert steps == [1, 2, 3, 4, 5]
    with safe_open(kept, "pt") as stored:
        assert stored.metadata()["step"] == "5"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert equal(train_or_load(RECIPE, 2, path)[0].module, uninterrupted)


def test_nothing_is_written_before_its_time(path, kept):
    interrupted(path, 9, power_cut, Power, seconds=60)
    assert list(path.parent.iterdir()) == []


def test_second_interruption_acts_at_once():
    reached = []

    def step():
        with whole_steps() as asked:
            signal.raise_signal(signal.SIGINT)
            reached.append(bool(asked))
            signal.raise_signal(signal.SIGINT)
            reached.append("too far")

    with pytest.raises(KeyboardInterrupt):
        step()
    assert reached == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interruption_is_not_lost_when_nobody_asks_for_it():
    with pytest.raises(KeyboardInterrupt), whole_steps():
        signal.raise_signal(signal.SIGINT)


def test_other_threads_and_other_handlers_are_left_alone():
    mine = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with whole_steps() as asked:
            signal.raise_signal(signal.SIGINT)
        assert asked == []
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, mine)
    problems = []

    def elsewhere():
        try:
            with whole_steps():
                pass
        except ValueError as error:  # signals can be set only in the main thread
            problems.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert problems == []


@pytest.mark.parametrize("other", ["recipe", "seed"])
def test_half_trained_network_of_another_recipe_or_seed_is_replaced(other, path, kept, uninterrupted):
    recipe = RECIPE.model_copy(update={"learning_rate": 0.05}) if other == "recipe" else RECIPE
    interrupted(path, 7, power_cut, Power, recipe=recipe, seed=2 if other == "recipe" else 3)
    with pytest.warns(UserWarning, match=r"net.partial.safetensors belongs to another recipe, seed or set of images"):
        loaded, _ = train_or_load(RECIPE, 2, path)
    assert equal(loaded.module, uninterrupted)
    assert not kept.exists()


@pytest.mark.parametrize("fault", ["empty", "cut", "tensor missing", "other shape", "no step"])
def test_damaged_half_trained_network_is_replaced(fault, path, kept, uninterrupted):
    interrupted(path, 7, power_cut, Power)
    if fault in ("empty", "cut"):
        content = kept.read_bytes()
        kept.write_bytes(content[: len(content) // 2] if fault == "cut" else b"")
    else:
        with safe_open(kept, "pt") as stored:
            about = stored.metadata()
        state = load_file(kept)
        if fault == "tensor missing":
            del state["momentum.conv1.weight"]
        elif fault == "other shape":
            state["network.fc.bias"] = torch.zeros(3)
        else:
            del about["step"]
        save_file(state, kept, metadata=about)
    with pytest.warns(UserWarning, match=r"net.partial.safetensors .*training starts over and replaces the file"):
        loaded, _ = train_or_load(RECIPE, 2, path)
    assert equal(loaded.module, uninterrupted)


def test_half_trained_network_on_other_images_is_replaced(path, tmp_path):
    for number in range(34):
        file = tmp_path / "images" / ("test" if number < 2 else "train") / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (7 * number, 0, 0)).save(file)
    recipe = RECIPE.model_copy(update={"images": str(tmp_path / "images"), "batch_size": 8})
    interrupted(path, 7, power_cut, Power, recipe=recipe)
    file.unlink()
    with pytest.warns(UserWarning, match="set of images"):
        train_or_load(recipe, 2, path)


def test_continuing_gives_no_warning(path):
    for step in (2, 3):  # the second continues after a single step
        interrupted(path, step, power_cut, Power)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_or_load(RECIPE, 2, path)


def test_place_of_cifar_makes_no_difference(path):
    images = training.splits(RECIPE)[0]
    moved = RECIPE.model_copy(update={"root": "elsewhere"})
    assert training._owner(moved, 2, images) == training._owner(RECIPE, 2, images)
    train_or_load(RECIPE.model_copy(update={"steps": 0}), 2, path)
    train_or_load(moved.model_copy(update={"steps": 0}), 2, path)


def test_disk_that_cannot_be_written_is_said_and_keeps_what_was_there(monkeypatch, path, kept):
    interrupted(path, 7, power_cut, Power)
    content = kept.read_bytes()

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(StorageError, match=r"cannot write .*net.partial.safetensors: No space left"):
        train_or_load(RECIPE, 2, path, checkpoint_seconds=0)
    assert kept.read_bytes() == content


def test_parameters_buffers_and_momentum_are_kept(path, kept):
    interrupted(path, 3, power_cut, Power)
    state = load_file(kept)
    assert {name.partition(".")[0] for name in state} == {"network", "momentum"}
    assert {"network.bn1.running_var", "momentum.bn1.weight"} < set(state)
