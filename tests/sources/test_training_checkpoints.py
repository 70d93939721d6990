"""Checkpoints that a recipe names: written at their steps, complete after any interruption."""

import itertools
import signal

import pytest
import torch
from safetensors.torch import load_file

from rsm_probe.errors import ConfigError, ModelError, StorageError
from rsm_probe.sources import TrainingConfig, load_model, train_or_load
from rsm_probe.sources.models.tensor_files import read_tensors, read_unchecked, save_tensors
from rsm_probe.sources.training.networks import NetworkConfig
from rsm_probe.sources.training.recipe import logarithmic_steps
from rsm_probe.sources.training.train import checkpoint_file

NETWORK = NetworkConfig(widths=(4, 4, 8, 8), stem_stride=2)
RECIPE = TrainingConfig(size=8, steps=14, batch_size=32, augment=True, network=NETWORK)
STEPS = (0, 3, 10, 14)
WITH_STEPS = RECIPE.model_copy(update={"checkpoints": (3, 0, 10)})


class Power(Exception):
    """What ends a training without asking."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The network of a training that wrote checkpoints, and the states at their steps as its loop passed them."""
    path = tmp_path_factory.mktemp("uninterrupted") / "net.safetensors"
    train_or_load(WITH_STEPS, 2, path)
    return path


def contents(path) -> dict[str, tuple[dict[str, bytes], dict[str, str]]]:
    """Name of a file -> the bytes of its tensors, and its texts with their checksum."""
    files = [path, *path.with_name("net-steps").glob("*")]
    read = {file.name: read_unchecked(file) for file in files}
    return {
        name: ({key: value.numpy().tobytes() for key, value in state.items()}, texts)
        for name, (state, texts) in read.items()
    }


def power_cut_at(step):
    def on_step(number):
        if number == step:
            raise Power

    return on_step


def test_checkpoints_are_the_network_as_it_was_at_their_steps(finished, tmp_path):
    assert sorted(file.name for file in finished.parent.iterdir()) == ["net-steps", "net.safetensors"]
    assert {file.name for file in finished.with_name("net-steps").iterdir()} == {
        f"net@{step}.safetensors" for step in STEPS
    }
    # A training of its own that ends there by force holds the same weights.
    for step in (3, 10):
        partial = tmp_path / f"{step}.partial.safetensors"

        with pytest.raises(Power):
            train_or_load(
                RECIPE, 2, tmp_path / f"{step}.safetensors", checkpoint_seconds=0, on_step=power_cut_at(step + 1)
            )

        loaded = load_model(checkpoint_file(finished, step))
        assert (loaded.name, loaded.network, loaded.step) == (f"net@{step}", "net", step)
        half = load_file(partial)
        for name, value in loaded.module.state_dict().items():
            assert torch.equal(value, half[f"network.{name}"]), name
    assert load_model(finished).step is None


def test_first_is_the_untrained_network_and_last_the_trained_one(finished, tmp_path):
    untrained, _ = train_or_load(RECIPE.model_copy(update={"steps": 0}), 2, tmp_path / "untrained.safetensors")
    for file, module in ((0, untrained.module), (14, load_model(finished).module)):
        state = load_model(checkpoint_file(finished, file)).module.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_network_is_the_same_file_with_and_without_checkpoints(finished, tmp_path):
    train_or_load(RECIPE, 2, tmp_path / "net.safetensors")
    assert contents(tmp_path / "net.safetensors")["net.safetensors"] == contents(finished)["net.safetensors"]
    # So either recipe opens it.
    loaded, _ = train_or_load(RECIPE, 2, finished)
    assert loaded.step is None


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3, 4, 11, 14])
def test_killed_training_ends_in_the_same_files(step, finished, tmp_path):
    path, begun = tmp_path / "net.safetensors", []

    def cut(number):
        begun.append(number)
        if number == step:
            raise Power

    with pytest.raises(Power):
        train_or_load(WITH_STEPS, 2, path, checkpoint_seconds=0 if step % 2 else 60, on_step=cut)
    train_or_load(WITH_STEPS, 2, path, on_step=begun.append)
    assert contents(path) == contents(finished)
    assert begun[step:] == list(range(step if step % 2 else 1, 15))
    assert not path.with_name("net.partial.safetensors").exists()


def test_ctrl_c_within_a_step_with_a_checkpoint_loses_nothing(finished, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    path = tmp_path / "net.safetensors"
    try:
        with pytest.raises(KeyboardInterrupt):
            train_or_load(WITH_STEPS, 2, path, on_step=lambda n: signal.raise_signal(signal.SIGINT) if n == 3 else None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert checkpoint_file(path, 3).exists()
    begun = []
    train_or_load(WITH_STEPS, 2, path, on_step=begun.append)
    assert begun[0] == 4
    assert contents(path) == contents(finished)


def test_missing_checkpoint_of_a_finished_or_half_trained_network_is_made_again(finished, tmp_path):
    path = tmp_path / "net.safetensors"
    train_or_load(WITH_STEPS, 2, path)
    written = path.stat().st_mtime_ns
    checkpoint_file(path, 3).unlink()
    train_or_load(WITH_STEPS, 2, path)
    assert path.stat().st_mtime_ns == written
    assert contents(path) == contents(finished)

    path.unlink()
    with pytest.raises(Power):
        train_or_load(
            WITH_STEPS,
            2,
            path,
            checkpoint_seconds=0,
            on_step=power_cut_at(9),
        )
    checkpoint_file(path, 3).unlink()
    with pytest.warns(UserWarning, match=r"has done 8 steps, and the checkpoint of step 3 is missing; training starts"):
        train_or_load(WITH_STEPS, 2, path)
    assert contents(path) == contents(finished)


@pytest.mark.parametrize(
    ("changes", "seed"), [({}, 5), ({"learning_rate": 0.2}, 2), ({"steps": 15, "checkpoints": (3,)}, 2)],
    ids=["seed", "rate", "steps"],
)  # fmt: skip
def test_checkpoints_of_another_recipe_or_seed_are_refused_before_training(finished, tmp_path, changes, seed):
    path = tmp_path / "net.safetensors"
    checkpoint_file(path, 3).parent.mkdir()
    checkpoint_file(path, 3).write_bytes(checkpoint_file(finished, 3).read_bytes())
    begun = []
    with pytest.raises(StorageError, match=r"net@3.safetensors holds the checkpoint of another recipe, seed or step"):
        train_or_load(WITH_STEPS.model_copy(update=changes), seed, path, on_step=begun.append)
    assert not begun


def test_renamed_and_damaged_checkpoints_are_refused_by_name(finished, tmp_path):
    path = tmp_path / "net.safetensors"
    folder = checkpoint_file(path, 3).parent
    folder.mkdir()
    checkpoint_file(path, 10).write_bytes(checkpoint_file(finished, 3).read_bytes())
    with pytest.raises(StorageError, match=r"net@10.safetensors holds the checkpoint of another"):
        train_or_load(WITH_STEPS, 2, path)
    checkpoint_file(path, 10).write_bytes(checkpoint_file(finished, 10).read_bytes()[:-9])
    with pytest.raises(ModelError, match=r"net@10.safetensors"):
        train_or_load(WITH_STEPS, 2, path)


def test_checkpoints_of_another_training_than_the_network_are_refused(finished, tmp_path):
    path = tmp_path / "net.safetensors"
    # As another machine would round differently: the same recipe and seed, other weights.

    state, texts = read_tensors(finished)
    save_tensors(path, {name: value + 1 for name, value in state.items()}, texts)
    with pytest.raises(StorageError, match="come from two trainings, by different machines or versions; remove both"):
        train_or_load(WITH_STEPS, 2, path)
    with pytest.raises(StorageError, match="two trainings"):
        train_or_load(WITH_STEPS, 2, path)


# The recipe


@pytest.mark.parametrize("last", [1, 2, 9, 10, 57, 150, 10**8])
def test_logarithmic_steps_are_distinct_and_reach_from_the_first_to_the_last(last):
    for count in range(2, min(last + 1, 60) + 1):
        steps = logarithmic_steps(last, count)
        assert len(steps) == count
        assert (steps[0], steps[-1]) == (0, last)
        gaps = [b - a for a, b in itertools.pairwise(steps)]
        assert min(gaps) >= 1
        # From step 1 on, they lie ever farther apart, but for rounding.
        assert all(b >= a - 1 for a, b in itertools.pairwise(gaps[1:]))


def test_logarithmic_steps_are_powers_where_the_last_is_one():
    assert logarithmic_steps(10**6, 8) == (0, 1, 10, 100, 1000, 10**4, 10**5, 10**6)


def test_a_recipe_names_steps_or_their_number():
    assert TrainingConfig.parse({"steps": 150}).checkpoint_steps == ()
    assert TrainingConfig.parse({"steps": 150, "checkpoints": [30, 0]}).checkpoint_steps == (0, 30, 150)
    ten = TrainingConfig.parse({"steps": 150, "checkpoints": 10})
    assert ten.checkpoint_steps == (0, 1, 2, 4, 7, 13, 24, 44, 81, 150)
    assert TrainingConfig.parse({"steps": 0, "checkpoints": [0]}).checkpoint_steps == (0,)


@pytest.mark.parametrize(
    ("checkpoints", "message"),
    [
        ([0, 151], "step 151 comes after the last step, steps: 150"),
        ([-1], "greater than or equal to 0"),
        ([], "at least 1 item"),
        (152, "152 are more than the steps from 0 to 150"),
        (1, "greater than or equal to 2"),
        (True, "valid integer"),
        ([True], "valid integer"),
        ([1.5], "valid integer"),
        ("log", "valid integer"),
    ],
)
def test_checkpoints_that_a_training_does_not_pass_are_refused(checkpoints, message):
    with pytest.raises(ConfigError, match=rf"checkpoints.*{message}"):
        TrainingConfig.parse({"steps": 150, "checkpoints": checkpoints})
