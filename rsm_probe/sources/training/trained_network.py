"""Write and read trained networks together with their recipes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os.path import isfile
from pathlib import Path

from torch import Tensor, nn

from rsm_probe.checks import brief
from rsm_probe.errors import ModelError
from rsm_probe.sources.images.origins import Origin, absolute_path
from rsm_probe.sources.models.loaded_model import LoadedModel, to_tensor
from rsm_probe.sources.models.tensor_files import read_tensors, save_tensors
from rsm_probe.sources.training.networks import build_network
from rsm_probe.sources.training.recipe import TrainingConfig

AGAIN = "remove it, and rerun `rsm-probe train` or the study that made it"
# The texts stored with the weights; other programs add "format".
_TEXTS = {"recipe", "seed", "accuracy", "step", "format"}
# Where a recipe was read, and which of its networks are written, does not change a network.
NOT_OF_A_NETWORK = {"root", "checkpoints"}


@dataclass(frozen=True)
class Trained:
    """A trained network, its accuracy on held-out images, and the seed and recipe that made it.

    A checkpoint also has the number of steps after which it was taken.
    """

    module: nn.Module
    accuracy: float
    seed: int
    config: TrainingConfig
    step: int | None = None

    @property
    def as_expected(self) -> bool:
        """Whether the accuracy reaches the recipe's `expected_accuracy`."""
        return self.accuracy >= self.config.expected_accuracy

    def save(self, path: str | Path) -> None:
        """Write weights and recipe to one `.safetensors` file, which `load_model` reads.

        Raises:
            StorageError: the file cannot be written.
        """
        recipe = self.config.model_dump_json(exclude={"checkpoints"})
        texts = {"recipe": recipe, "seed": str(self.seed), "accuracy": repr(self.accuracy)}
        texts |= {} if self.step is None else {"step": str(self.step)}
        save_tensors(Path(path), self.module.state_dict(), texts)


def load_trained(path: str | Path, pretrained: bool = True, dilated: int = 0) -> LoadedModel:
    """Read a network that `Trained.save` wrote, and build it by its recipe.

    Args:
        path: the file.
        pretrained: whether to load the weights; without them, the network is a random one of the same shape.
        dilated: how many of the last stages keep their resolution; see `build_network`.

    Raises:
        ModelError: the file is missing, is damaged, or does not hold a trained network.
    """
    path = Path(path)
    if not isfile(path):
        raise ModelError(f"no trained network at {path}; run `rsm-probe train` to make one")
    return network_of(path, *read_tensors(path, f"; {AGAIN}"), pretrained, dilated)


def load_with_accuracy(path: Path) -> tuple[LoadedModel, float]:
    """Read a network that `Trained.save` wrote, and its accuracy; see `load_trained`."""
    state, texts = read_tensors(path, f"; {AGAIN}")
    return network_of(path, state, texts), accuracy_in(texts, path)


def network_of(
    path: Path, state: Mapping[str, Tensor], texts: Mapping[str, str], pretrained: bool = True, dilated: int = 0
) -> LoadedModel:
    """Build the network of a file from the tensors and texts that `read_tensors` returned.

    Raises:
        ModelError: there is no recipe, or the weights do not fit it.
    """
    if "recipe" not in texts:
        raise ModelError(f"{path} contains no recipe; load it as weights= of a model instead")
    # If the key of the checksum is damaged, the file would pass for one of a version without checksums.
    if surplus := sorted(set(texts) - _TEXTS):
        raise ModelError(
            f"{path} is damaged or from another program: it holds the unknown text {brief(surplus[0])}; {AGAIN}"
        )
    try:
        config = TrainingConfig.parse(json.loads(texts["recipe"]), f"the recipe in {path}")
        module = build_network(config.network, state["fc.weight"].shape[0], dilated)
        step = int(texts["step"]) if "step" in texts else None
        other = [name for name, own in module.state_dict().items() if name in state and state[name].dtype != own.dtype]
        if other:
            raise ValueError(f"{other[0]} holds {state[other[0]].dtype}")
        if pretrained:
            module.load_state_dict(state)
    except (ValueError, LookupError, RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} holds weights that do not fit its recipe: {error}") from error
    origin: Origin | str = "its weights are random without a seed; give seed="
    if pretrained:
        origin = Origin.of(load_trained, path=absolute_path(path), dilated=dilated)
    loaded = LoadedModel(path.stem, module.eval(), normalise, config.questions, origin=origin)
    if step is None or not pretrained:
        return loaded
    return replace(loaded, network=path.stem.removesuffix(f"@{step}"), step=step)


def normalise(image: object) -> Tensor:
    """Turn a PIL image into a tensor (3, H, W) with about zero mean and unit standard deviation."""
    return (to_tensor(image) - 0.5) / 0.25  # type: ignore[arg-type]


def made_by(config: TrainingConfig, seed: int, texts: Mapping[str, str]) -> bool:
    """Whether a stored network belongs to a recipe and seed; keys that its recipe lacks take their defaults."""
    try:
        stored = TrainingConfig.parse(json.loads(texts["recipe"]))
    except (KeyError, TypeError, ValueError, RecursionError):
        return False
    same = stored.model_dump(exclude=NOT_OF_A_NETWORK) == config.model_dump(exclude=NOT_OF_A_NETWORK)
    return same and texts.get("seed") == str(seed)


def accuracy_in(texts: Mapping[str, str], path: Path) -> float:
    """The accuracy that is stored with a network.

    Raises:
        ModelError: there is none.
    """
    try:
        return float(texts["accuracy"])
    except (KeyError, ValueError):
        raise ModelError(f"{path} gives no accuracy; {AGAIN}") from None
