"""Trained networks: the network with its recipe, written and read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path

from torch import Tensor, nn

from rsm_probe.checks import brief
from rsm_probe.errors import ModelError
from rsm_probe.sources.models.loaded_model import LoadedModel, to_tensor
from rsm_probe.sources.models.tensor_files import read_tensors, save_tensors
from rsm_probe.sources.training.networks import build_network
from rsm_probe.sources.training.recipe import TrainingConfig

AGAIN = "remove it; `rsm-probe train`, or the study that made it, makes it again"
# Texts that are written beside the weights; other programs add "format".
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
        """Write weights and recipe as one `.safetensors` file that `load_model` reads.

        Raises:
            StorageError: the file cannot be written.
        """
        recipe = {"recipe": self.config.model_dump_json(), "seed": str(self.seed), "accuracy": repr(self.accuracy)}
        save_tensors(Path(path), self.module.state_dict(), recipe)


def load_trained(path: str | Path, pretrained: bool = True, dilated: int = 0) -> LoadedModel:
    """Read a network that `Trained.save` wrote; its recipe says how to build it.

    Args:
        path: the file.
        pretrained: whether to take its weights; without them, the network is a random one of the same shape.
        dilated: how many of the last stages keep their resolution; see `build_network`.

    Raises:
        ModelError: the file is missing, damaged, or was not written by this recipe.
    """
    path = Path(path)
    if not isfile(path):
        raise ModelError(f"no trained network at {path}; `rsm-probe train` makes one")
    return network_of(path, *read_tensors(path, f"; {AGAIN}"), pretrained, dilated)


def network_of(
    path: Path, state: Mapping[str, Tensor], texts: Mapping[str, str], pretrained: bool = True, dilated: int = 0
) -> LoadedModel:
    """Build the network of a file from the tensors and texts that `read_tensors` gave.

    Raises:
        ModelError: there is no recipe, or one that does not make these weights.
    """
    if "recipe" not in texts:
        raise ModelError(f"{path} names no recipe; load it as weights= of a model instead")
    # With a damaged name of its checksum, a file would pass for one from before checksums.
    if surplus := sorted(set(texts) - _TEXTS):
        raise ModelError(
            f"{path} is damaged or of another program: it holds a text called {brief(surplus[0])}; {AGAIN}"
        )
    try:
        config = TrainingConfig.parse(json.loads(texts["recipe"]), f"the recipe in {path}")
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
    """Turn a PIL image into (3, H, W) with zero mean and unit deviation for typical images."""
    return (to_tensor(image) - 0.5) / 0.25  # type: ignore[arg-type]


def made_by(config: TrainingConfig, seed: int, texts: Mapping[str, str]) -> bool:
    """Whether a stored network is of a recipe and a seed; keys newer than the stored recipe have their defaults."""
    try:
        stored = TrainingConfig.parse(json.loads(texts["recipe"]))
    except (KeyError, TypeError, ValueError, RecursionError):
        return False
    same = stored.model_dump(exclude={"root"}) == config.model_dump(exclude={"root"})
    return same and texts.get("seed") == str(seed)
