"""Networks on disk: what is damaged is never trained further, and never taken for what was written."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from rsm_probe.errors import ModelError, StorageError
from rsm_probe.sources import Trained, train_or_load
from rsm_probe.sources.loading import load_model
from rsm_probe.sources.training.networks import NetworkConfig, build_network
from rsm_probe.sources.training.recipe import TrainingConfig
from rsm_probe.sources.training.trained_network import load_trained
from rsm_probe.sources.training.training_checkpoint import load_partial, save_partial

# Half-trained networks


@pytest.fixture(scope="module")
def partial(tmp_path_factory) -> tuple[Path, nn.Module, torch.optim.SGD]:
    """A half-trained network with momentum, on disk."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimiser = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    module(torch.randn(4, 3)).sum().backward()
    optimiser.step()
    path = tmp_path_factory.mktemp("partial") / "net.partial.safetensors"
    save_partial(path, OWNER, 7, module, optimiser)
    return path, module, optimiser


OWNER = {"recipe": "mine", "seed": "0"}


def taken(path: Path) -> int:
    """The step that a fresh network continues from; where that is 0, nothing of it may have changed."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    optimiser = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    step = load_partial(path, OWNER, module, optimiser)
    if not step:
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
        assert not optimiser.state
    return step


def rewritten(path: Path, change, about=None) -> None:
    """The same file with other content, as another tool would write it: without a checksum."""
    state = change(load_file(path))
    save_file(state, path, metadata={**OWNER, "step": "7"} if about is None else about)


def test_every_flipped_bit_of_a_half_trained_network_is_noticed(partial, tmp_path):
    path = tmp_path / "net.partial.safetensors"
    content = partial[0].read_bytes()
    path.write_bytes(content)
    assert taken(path) == 7
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"net.partial.safetensors .*training starts over and replaces the file"):
            assert taken(path) == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes((10**13).to_bytes(8, "little") + path.read_bytes()[8:]),
        lambda path: path.write_bytes(bytes(range(256)) * 4),
        lambda path: path.write_bytes((2).to_bytes(8, "little") + b"{}"),
        lambda path: path.write_bytes((4).to_bytes(8, "little") + b"null"),
        lambda path: rewritten(path, lambda state: {name: tensor.double() for name, tensor in state.items()}),
        lambda path: rewritten(path, lambda state: {name: tensor[:1] for name, tensor in state.items() if tensor.ndim}),
        lambda path: rewritten(path, lambda state: {}),
        lambda path: rewritten(path, lambda state: state, {**OWNER}),
        lambda path: rewritten(path, lambda state: state, {**OWNER, "step": "-1"}),
        lambda path: rewritten(path, lambda state: state, {**OWNER, "step": "9" * 5000}),
        lambda path: rewritten(path, lambda state: state, {**OWNER, "step": "\u0667"}),
    ],
    ids=range(13),
)
def test_a_half_trained_network_of_any_damage_is_trained_from_the_beginning(partial, tmp_path, damage):
    path = tmp_path / "net.partial.safetensors"
    path.write_bytes(partial[0].read_bytes())
    damage(path)
    with pytest.warns(UserWarning, match=r"net.partial.safetensors .*training starts over and replaces the file"):
        assert taken(path) == 0


def test_a_half_trained_network_from_before_there_were_checksums_is_continued(partial, tmp_path):
    path = tmp_path / "net.partial.safetensors"
    path.write_bytes(partial[0].read_bytes())
    rewritten(path, lambda state: state)
    assert taken(path) == 7


def test_a_folder_in_place_of_a_half_trained_network_is_not_read(tmp_path):
    (tmp_path / "net.partial.safetensors").mkdir()
    assert taken(tmp_path / "net.partial.safetensors") == 0


# Trained networks

RECIPE = TrainingConfig(steps=0, size=8, network=NetworkConfig(widths=(1, 1, 1, 1), narrow_stem=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """The file of a network that nobody trained."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("whole") / "net.safetensors"
    Trained(build_network(RECIPE.network, 10), 0.25, 3, RECIPE).save(path)
    return path.read_bytes()


READERS = [load_trained, load_model, lambda path: train_or_load(RECIPE, 3, path)]


def test_every_flipped_bit_of_a_network_is_noticed(whole, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(whole)
    assert train_or_load(RECIPE, 3, path)[1] == 0.25
    for place in [*range(0, 900, 7), *range(900, len(whole), 997)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"net.safetensors .*; remove it, and rerun `rsm-probe train`"):
            load_trained(path)
        # The way out.
    path.unlink()
    assert train_or_load(RECIPE, 3, path)[0].name == "net"
    load_trained(path)


def test_text_beside_the_weights_is_under_the_checksum_too(whole, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(whole.replace(b"0.25", b"0.75"))
    assert path.read_bytes() != whole
    for read in READERS:
        with pytest.raises(ModelError, match=r"net.safetensors is damaged: its checksum"):
            read(path)


def described(path: Path, **changes: str | None) -> None:
    """The same weights with other text beside them, without a checksum."""
    with safe_open(path, "pt") as stored:
        about = {**stored.metadata(), "sha256": None, **changes}
    save_file(load_file(path), path, metadata={key: value for key, value in about.items() if value is not None})


def test_a_network_from_before_there_were_checksums_is_read(whole, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(whole)
    described(path)
    for read in READERS:
        read(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes((10**13).to_bytes(8, "little") + path.read_bytes()[8:]),
        lambda path: path.write_bytes(bytes(range(256)) * 4),
        lambda path: path.write_bytes((4).to_bytes(8, "little") + b"null"),
        lambda path: described(path, accuracy="high"),
        lambda path: described(path, accuracy=None),
    ],
    ids=["empty", "cut", "header", "garbage", "null", "accuracy", "no-accuracy"],
)
def test_a_damaged_network_is_refused_by_name(whole, tmp_path, damage):
    path = tmp_path / "net.safetensors"
    path.write_bytes(whole)
    damage(path)
    with pytest.raises(ModelError, match=r"net.safetensors .*; remove it"):
        train_or_load(RECIPE, 3, path)


@pytest.mark.parametrize(
    "recipe", ["", "null", "[]", "3", "[" * 100_000, json.dumps({"network": {"widths": [10**9] * 4}}), '{"size": NaN}']
)
def test_a_recipe_that_makes_no_network_is_refused_by_name(whole, tmp_path, recipe):
    path = tmp_path / "net.safetensors"
    path.write_bytes(whole)
    described(path, recipe=recipe)
    with pytest.raises(ModelError, match=r"net.safetensors holds weights that do not fit its recipe"):
        load_trained(path)
    with pytest.raises(StorageError, match=r"net.safetensors holds the network of another recipe or seed"):
        train_or_load(RECIPE, 3, path)


def test_weights_of_another_kind_of_number_are_refused(whole, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(whole)
    with safe_open(path, "pt") as stored:
        about = stored.metadata()
    del about["sha256"]
    save_file({name: tensor.to(torch.int32) for name, tensor in load_file(path).items()}, path, metadata=about)
    with pytest.raises(ModelError, match=r"net.safetensors holds weights .* holds torch.int32"):
        load_trained(path)


@pytest.mark.parametrize("seed", [-1, 2**63, 0.5, "3", None, True])
def test_seeds_that_are_none_are_refused(seed, tmp_path):
    with pytest.raises(ModelError, match="seed must be"):
        train_or_load(RECIPE, seed, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "s3://bucket/net.safetensors"])
def test_places_that_no_file_has_are_refused_before_any_training(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match=r"^path "):
        train_or_load(RECIPE, 3, name)
    with pytest.raises(ModelError, match="no trained network at"):
        load_trained(name)
    assert not list(tmp_path.iterdir())


def test_what_is_not_a_file_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(ModelError, match=f"no trained network at .*{name}"):
            load_trained(tmp_path / f"{name}.safetensors")
        with pytest.raises(StorageError, match="it is a folder or device"):
            train_or_load(RECIPE, 3, tmp_path / f"{name}.safetensors")
