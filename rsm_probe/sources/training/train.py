"""Training by a recipe, which gives a sweep its seeds: repeatable, and continued after an interruption."""

from __future__ import annotations

import hashlib
import itertools
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from rsm_probe.checks import require_seed
from rsm_probe.errors import ModelError, StorageError
from rsm_probe.execution.devices import find_device
from rsm_probe.sources.images.decoded_batches import augmented, batches, in_memory, shuffled
from rsm_probe.sources.images.embedded.registry import EMBEDDED
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.training.networks import NetworkConfig, build_network
from rsm_probe.sources.training.recipe import TrainingConfig, splits
from rsm_probe.sources.training.trained_network import (
    AGAIN,
    Trained,
    load_trained,
    made_by,
    network_of,
    normalise,
    stored_network,
)
from rsm_probe.sources.training.training_checkpoint import load_partial, save_partial, whole_steps
from rsm_probe.storage.places import local_folder

__all__ = [
    "NetworkConfig",
    "Trained",
    "TrainingConfig",
    "build_network",
    "load_trained",
    "normalise",
    "train",
    "train_or_load",
]

# Seconds between two writings of the half-trained network.
CHECKPOINT_SECONDS = 60.0
# Channels last is faster, but the gradient of a strided 1 x 1 convolution that reads fewer channels than this writes
# beyond its memory there, on some AMD processors (PyTorch 2.10 to 2.15): the program ends or, worse, goes on.
_FEW_CHANNELS = 8


def train(
    config: TrainingConfig,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
    partial: str | Path | None = None,
) -> Trained:
    """Trains one network; the same seed gives the same network on the same machine, however often it was interrupted.

    Args:
        config: the recipe.
        seed: of the initial weights, of the order of the images and of their augmentation.
        device: where to train; None for the CPU, "auto" for a GPU where there is one.
        progress: show a bar.
        partial: a `.safetensors` file that keeps the half-trained network, every `CHECKPOINT_SECONDS` and at an
            interruption, and from which training continues; None keeps nothing.

    Raises:
        ImageError: images are missing or broken, or the recipe does not fit them.
        ModelError: the loss became NaN or infinite; the seed is not a whole number in [0, 2^63).
        StorageError: `partial` cannot be written.
    """
    require_seed(seed, "seed", ModelError)
    images, held_out, pixels = _training_images(config, progress)
    assert images.targets is not None  # every set that a recipe can name has them
    questions, choices = images.targets.values.shape[1], images.targets.choices
    device = find_device(device, ModelError)
    answers = torch.from_numpy(images.targets.values).to(device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build_network(config.network, questions * choices)
    layout = torch.contiguous_format if min(config.network.widths) < _FEW_CHANNELS else torch.channels_last
    module = module.to(device).to(memory_format=layout).train()
    optimiser = torch.optim.SGD(
        module.parameters(),
        config.learning_rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=config.weight_decay,
    )
    file = None if partial is None else Path(partial)
    owner = _owner(config, seed, images)
    done = 0 if file is None else load_partial(file, owner, module, optimiser)
    schedule = _schedule(optimiser, config, done) if config.steps else None
    order = itertools.islice(shuffled(len(images), config.batch_size, config.steps, seed), done, None)
    saved = time.monotonic()
    bar = tqdm(total=config.steps, initial=done, desc=f"training seed {seed}", disable=not progress, leave=False)
    with _repeatable(), bar, closing(batches(images, pixels, order)) as drawn, whole_steps() as interrupted:
        for step, (numbers, batch) in enumerate(drawn, start=done + 1):
            if config.augment:
                batch = augmented(batch, np.random.default_rng([seed, step]))
            scores = module(_normalised(batch.to(device)).contiguous(memory_format=layout))
            loss = functional.cross_entropy(scores.unflatten(1, (questions, choices)).transpose(1, 2), answers[numbers])
            _require_finite([loss], step, config)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            assert schedule is not None
            schedule.step()
            bar.update()
            if file is not None and (interrupted or time.monotonic() - saved >= CHECKPOINT_SECONDS):
                save_partial(file, owner, step, module, optimiser)
                saved = time.monotonic()
            if interrupted:
                break
    # No loss has seen what the last step did.
    _require_finite(module.state_dict().values(), config.steps, config)
    module = module.eval().to(memory_format=torch.contiguous_format)
    accuracy = _accuracy(module, held_out, config.batch_size, device)
    return Trained(module.to("cpu"), accuracy, seed, config)


def train_or_load(
    config: TrainingConfig,
    seed: int,
    path: str | Path,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> tuple[LoadedModel, float]:
    """The network of a recipe and a seed, and its accuracy: read if the file exists, else trained and saved.

    Until training is complete, `<name>.partial.safetensors` beside the file keeps what is done; the same call continues
    after an interruption.

    Raises:
        ImageError: images are missing or broken, or the recipe does not fit them.
        ModelError: the file is damaged, or the loss became NaN or infinite; a seed outside of [0, 2^63).
        StorageError: the file holds the network of another recipe or seed, or cannot be written.
    """
    require_seed(seed, "seed", ModelError)
    path = local_folder(path, "the file of a network")
    _require_place(path)
    if path.is_file() and not made_by(config, seed, stored_network(path)[1]):
        raise StorageError(
            f"{path} holds a network of another recipe or seed; choose another folder or remove the file"
        )
    if not path.is_file():
        partial = path.with_name(f"{path.stem}.partial.safetensors")
        trained = train(config, seed, device, progress, partial)
        trained.save(path)
        partial.unlink(missing_ok=True)
        if not trained.as_expected:
            warnings.warn(
                f"{path.name}: accuracy {trained.accuracy:.2f} is below the expected {config.expected_accuracy:.2f}; "
                f"what its layers show may be that of an untrained network; train for more steps or change the rate",
                stacklevel=2,
            )
    state, about = stored_network(path)
    try:
        accuracy = float(about["accuracy"])
    except (KeyError, ValueError):
        raise ModelError(f"{path} does not say its accuracy; {AGAIN}") from None
    return network_of(path, state, about), accuracy


def _require_place(path: Path) -> None:
    """Makes sure, before hours of training, that a file can be written at its end.

    Raises:
        StorageError: it cannot.
    """
    if path.exists() and not path.is_file():
        raise StorageError(
            f"cannot write {path}: a folder or device is in its place; remove it or choose another folder"
        )
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise StorageError(f"cannot write {path}: {folder} is not a folder that may be written into")


def _normalised(pixels: Tensor) -> Tensor:
    """What `normalise` makes of each image, of a batch (B, 3, H, W) of bytes."""
    return (pixels.float() / 255.0 - 0.5) / 0.25


def _training_images(config: TrainingConfig, progress: bool) -> tuple[ImageSet, ImageSet, Tensor | None]:
    """What a network is trained on and tested on, and the pixels of the former where they fit into memory."""
    if not config.steps:
        return *splits(config), None
    if config.images in EMBEDDED:
        return _drawn_images(config.model_copy(update={"network": NetworkConfig(), "steps": 10}))
    images, held_out = splits(config)
    return images, held_out, in_memory(images, progress)


@lru_cache(maxsize=1)
def _drawn_images(config: TrainingConfig) -> tuple[ImageSet, ImageSet, Tensor | None]:
    """Those of an embedded set, which depend on nothing but the recipe: seeds one after another share them."""
    images, held_out = splits(config)
    return images, held_out, in_memory(images)


def _owner(config: TrainingConfig, seed: int, images: ImageSet) -> dict[str, str]:
    """What a half-trained network is of. Where CIFAR-100 lies makes no difference; which files a folder holds does."""
    ids = hashlib.sha256("\n".join(images.ids).encode()).hexdigest()
    return {"recipe": config.model_dump_json(exclude={"root"}), "seed": str(seed), "images": ids}


def _schedule(optimiser: torch.optim.SGD, config: TrainingConfig, done: int) -> OneCycleLR:
    """Rate and momentum by step; both have a closed form, so that nothing of the past need be stored."""
    schedule = OneCycleLR(optimiser, config.learning_rate, total_steps=config.steps, pct_start=0.2)
    if not done:
        return schedule
    # The first one has left in the optimiser what a schedule needs to begin later.
    return OneCycleLR(optimiser, config.learning_rate, total_steps=config.steps, pct_start=0.2, last_epoch=done - 1)


@contextmanager
def _repeatable() -> Iterator[None]:
    """On a GPU, some faster convolutions add up in another order every time."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _require_finite(values: Iterable[Tensor], step: int, config: TrainingConfig) -> None:
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise ModelError(
            f"training diverged: NaN or infinity at step {step} of {config.steps}; lower learning_rate: (now "
            f"{config.learning_rate:g})"
        )


@torch.no_grad()
def _accuracy(module: nn.Module, images: ImageSet, batch_size: int, device: str | torch.device) -> float:
    """Share of questions answered rightly."""
    assert images.targets is not None
    values, right = images.targets.values, 0
    order = (np.arange(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size))
    # Each image has one turn: keeping them would gain nothing.
    for numbers, batch in batches(images, None, order):
        scores = module(_normalised(batch.to(device)))
        guesses = scores.unflatten(1, (values.shape[1], images.targets.choices)).argmax(dim=2).cpu().numpy()
        right += int((guesses == values[numbers]).sum())
    return right / values.size
