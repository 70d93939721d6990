"""The small recipe that gives a sweep its seeds: a CIFAR-style ResNet, trained in seconds on embedded images."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, field_validator
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from rsm_probe.config import Config
from rsm_probe.errors import ImageError, ModelError, StorageError
from rsm_probe.sources.embedded import EMBEDDED
from rsm_probe.sources.images import ImageSet
from rsm_probe.sources.models import LoadedModel, to_tensor
from rsm_probe.storage import replacing


class NetworkConfig(Config):
    """A ResNet of basic blocks in four stages with a 3 x 3 stem and no pooling before the first stage."""

    blocks: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (1, 1, 1, 1)
    widths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (16, 32, 64, 128)
    stem_stride: Literal[1, 2] = 1
    zero_init_residual: bool = Field(
        default=True, description="blocks begin as the identity; false learns scenes sooner"
    )


class TrainingConfig(Config):
    """What to train on what, and how long.

    The optimiser is SGD with Nesterov momentum under a one-cycle schedule. Training sees the "train" split of an
    embedded set, accuracy is measured on its "test" split.
    """

    images: Literal["digits", "scenes", "photos"] = "digits"
    size: PositiveInt = Field(default=32, description="edge of the images in pixels")
    count: PositiveInt = Field(default=4000, description="how many scenes or crops to draw; digits are all used")
    network: NetworkConfig = NetworkConfig()
    steps: int = Field(
        default=150, ge=0, description="batches to train for, at least 10; 0 leaves the network untrained"
    )
    batch_size: int = Field(default=64, ge=2)
    learning_rate: PositiveFloat = 0.1
    weight_decay: float = Field(default=5e-4, ge=0)
    expected_accuracy: float = Field(default=0.0, ge=0, le=1, description="below it, a warning says what to change")

    @field_validator("steps")
    @classmethod
    def _warm_up_fits(cls, steps: int) -> int:
        if 0 < steps < 10:
            raise ValueError("must be 0 or at least 10, so that the schedule has a warm-up")
        return steps


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
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        recipe = {"recipe": self.config.model_dump_json(), "seed": str(self.seed), "accuracy": repr(self.accuracy)}
        state = {name: tensor.contiguous() for name, tensor in self.module.state_dict().items()}
        with replacing(Path(path)) as fresh:
            try:
                save_file(state, fresh, metadata=recipe)
            except SafetensorError as error:  # a full disk, among others
                raise OSError(str(error)) from error


def build_network(config: NetworkConfig, outputs: int) -> nn.Module:
    """The untrained network: timm's ResNet with a stem for small images."""
    from timm.models.resnet import BasicBlock, ResNet

    module = ResNet(
        BasicBlock,
        config.blocks,
        num_classes=outputs,
        channels=config.widths,
        zero_init_last=config.zero_init_residual,
    )
    module.conv1 = nn.Conv2d(3, 64, 3, stride=config.stem_stride, padding=1, bias=False)
    nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")
    module.maxpool = nn.Identity()
    return module


def train(config: TrainingConfig, seed: int = 0, device: str | torch.device = "cpu", progress: bool = False) -> Trained:
    """Trains one network; the same seed gives the same network on the same machine.

    Args:
        config: the recipe.
        seed: of the initial weights and of the order of the images.
        device: where to train.
        progress: show a bar.

    Raises:
        ImageError: no image can be drawn as the recipe says.
    """
    images = _split(config, "train")
    assert images.targets is not None  # every embedded set has them
    questions, choices = images.targets.values.shape[1], images.targets.choices
    pixels = torch.stack([_input(images, k) for k in range(len(images))]).to(device)
    answers = torch.from_numpy(images.targets.values).to(device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build_network(config.network, questions * choices)
    module = module.to(device).to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.SGD(
        module.parameters(),
        config.learning_rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=config.weight_decay,
    )
    if config.steps:
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, config.learning_rate, total_steps=config.steps, pct_start=0.2
        )
    order = _batches(len(images), config.batch_size, config.steps, seed)
    for batch in tqdm(order, f"training seed {seed}", config.steps, disable=not progress, leave=False):
        scores = module(pixels[batch].contiguous(memory_format=torch.channels_last))
        loss = functional.cross_entropy(scores.unflatten(1, (questions, choices)).transpose(1, 2), answers[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    module = module.eval().to("cpu").to(memory_format=torch.contiguous_format)
    return Trained(module, _accuracy(module, _split(config, "test"), config.batch_size), seed, config)


def train_or_load(
    config: TrainingConfig,
    seed: int,
    path: str | Path,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> tuple[LoadedModel, float]:
    """The network of a recipe and a seed, and its accuracy: read if the file exists, else trained and saved.

    Raises:
        ImageError: no image can be drawn as the recipe says.
        ModelError: the file is damaged.
        StorageError: the file holds the network of another recipe or seed, or cannot be written.
    """
    path = Path(path)
    wanted = {"recipe": config.model_dump_json(), "seed": str(seed)}
    if path.is_file() and not wanted.items() <= _metadata(path).items():
        raise StorageError(
            f"{path} holds a network of another recipe or seed; choose another folder or remove the file"
        )
    if not path.is_file():
        trained = train(config, seed, device, progress)
        trained.save(path)
        if not trained.as_expected:
            warnings.warn(
                f"{path.name}: accuracy {trained.accuracy:.2f} is below the expected {config.expected_accuracy:.2f}; "
                f"what its layers show may be that of an untrained network; train for more steps or change the rate",
                stacklevel=2,
            )
    return load_trained(path), float(_metadata(path)["accuracy"])


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as stored:
            return stored.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is no readable safetensors file: {error}") from error


def load_trained(path: str | Path, pretrained: bool = True) -> LoadedModel:
    """Reads a network that `Trained.save` wrote; its recipe says how to build it.

    Args:
        path: the file.
        pretrained: whether to take its weights; without them, the network is a random one of the same shape.

    Raises:
        ModelError: the file is missing, damaged, or was not written by this recipe.
    """
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no trained network at {path}; `rsm-probe train` makes one")
    recipe, state = _metadata(path), load_file(path)
    if "recipe" not in recipe:
        raise ModelError(f"{path} names no recipe; load it as weights= of a model instead")
    try:
        config = TrainingConfig.parse(json.loads(recipe["recipe"]), f"the recipe in {path}")
        module = build_network(config.network, state["fc.weight"].shape[0])
        if pretrained:
            module.load_state_dict(state)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{path} holds weights that its recipe does not make: {error}") from error
    return LoadedModel(path.stem, module.eval(), normalise)


def normalise(image: object) -> Tensor:
    """PIL image -> (3, H, W) with zero mean and unit deviation for typical images."""
    return (to_tensor(image) - 0.5) / 0.25  # type: ignore[arg-type]


def _split(config: TrainingConfig, split: str) -> ImageSet:
    options: dict[str, int] = {} if config.images == "digits" else {"count": config.count}
    if split == "test" and options:
        options = {"count": min(config.count, 500), "seed": 1}
    return EMBEDDED[config.images](split=split, size=config.size, **options)


def _input(images: ImageSet, index: int) -> Tensor:
    return normalise(images[index])


def _batches(count: int, size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Batches of one random order after another, without end effects."""
    if count < size:
        raise ImageError(f"{count} training images do not fill one batch of {size}")
    rng, order = np.random.default_rng(seed), np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if len(order) < size:
            order = np.concatenate([order, rng.permutation(count)])
        yield order[:size]
        order = order[size:]


@torch.no_grad()
def _accuracy(module: nn.Module, images: ImageSet, batch_size: int) -> float:
    """Share of questions answered rightly."""
    assert images.targets is not None
    right = 0
    for start in range(0, len(images), batch_size):
        numbers = range(start, min(start + batch_size, len(images)))
        scores = module(torch.stack([_input(images, k) for k in numbers]))
        answers = images.targets.values[list(numbers)]
        guesses = scores.unflatten(1, (answers.shape[1], images.targets.choices)).argmax(dim=2).numpy()
        right += int((guesses == answers).sum())
    return right / images.targets.values.size
