"""Trained networks: what they are, written and read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from rsm_probe.checks import brief
from rsm_probe.errors import ModelError
from rsm_probe.sources.images.folders import is_there
from rsm_probe.sources.models.loaded_model import LoadedModel, to_tensor
from rsm_probe.sources.models.tensor_files import read_tensors, save_tensors
from rsm_probe.sources.training.networks import build_network
from rsm_probe.sources.training.recipe import TrainingConfig

AGAIN = "remove it; `rsm-probe train`, or the study that made it, makes it again"
# What is written beside the weights; "format" is what other programs add.
_TEXTS = {"recipe", "seed", "accuracy", "format"}


@dataclass(frozen=True)
class Trained:
    """A network, the accuracy it reached on held-out images, and the seed and recipe that made it."""

    module: nn.Module
    accuracy: float
    seed: int
    config: TrainingConfig

    @property
    def as_expected(self) -> bool:
        """Whether the accuracy reaches what the recipe promises."""
        return self.accuracy >= self.config.expected_accuracy

    def save(self, path: str | Path) -> None:
        """Writes weights and recipe as one `.safetensors` file that `load_model` reads.

        Raises:
            StorageError: the file cannot be written.
        """
        recipe = {"recipe": self.config.model_dump_json(), "seed": str(self.seed), "accuracy": repr(self.accuracy)}
        save_tensors(Path(path), self.module.state_dict(), recipe)


def load_trained(path: str | Path, pretrained: bool = True, dilated: int = 0) -> LoadedModel:
    """Reads a network that `Trained.save` wrote; its recipe says how to build it.

    Args:
        path: the file.
        pretrained: whether to take its weights; without them, the network is a random one of the same shape.
        dilated: how many of the last stages keep their resolution; see `build_network`.

    Raises:
        ModelError: the file is missing, damaged, or was not written by this recipe.
    """
    path = Path(path)
    if not is_there(path) or not path.is_file():
        raise ModelError(f"no trained network at {path}; `rsm-probe train` makes one")
    return network_of(path, *stored_network(path), pretrained, dilated)


def network_of(
    path: Path, state: Mapping[str, Tensor], about: Mapping[str, str], pretrained: bool = True, dilated: int = 0
) -> LoadedModel:
    """The network of what a file holds.

    Raises:
        ModelError: it names no recipe, or one that does not make these weights.
    """
    if "recipe" not in about:
        raise ModelError(f"{path} names no recipe; load it as weights= of a model instead")
    # A damaged name of the checksum would make the file one from before there were any.
    if surplus := sorted(set(about) - _TEXTS):
        raise ModelError(
            f"{path} is damaged or of another program: it holds a text called {brief(surplus[0])}; {AGAIN}"
        )
    try:
        config = TrainingConfig.parse(json.loads(about["recipe"]), f"the recipe in {path}")
        module = build_network(config.network, state["fc.weight"].shape[0], dilated)
        other = [name for name, own in module.state_dict().items() if name in state and state[name].dtype != own.dtype]
        if other:
            raise ValueError(f"{other[0]} holds {state[other[0]].dtype}")
        if pretrained:
            module.load_state_dict(state)
    except (ValueError, LookupError, RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} holds weights that its recipe does not make: {error}") from error
    return LoadedModel(path.stem, module.eval(), normalise, config.questions)


def normalise(image: object) -> Tensor:
    """PIL image -> (3, H, W) with zero mean and unit deviation for typical images."""
    return (to_tensor(image) - 0.5) / 0.25  # type: ignore[arg-type]


def stored_network(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights and recipe of a file that `Trained.save` wrote.

    Raises:
        ModelError: it is damaged; the message says what makes it again.
    """
    try:
        return read_tensors(path)
    except ModelError as error:
        raise ModelError(f"{error}; {AGAIN}") from error


def made_by(config: TrainingConfig, seed: int, about: dict[str, str]) -> bool:
    """Whether a stored network is of a recipe and a seed; a recipe from before a key existed has its default."""
    try:
        stored = TrainingConfig.parse(json.loads(about["recipe"]))
    except (KeyError, TypeError, ValueError, RecursionError):
        return False
    same = stored.model_dump(exclude={"root"}) == config.model_dump(exclude={"root"})
    return same and about.get("seed") == str(seed)
