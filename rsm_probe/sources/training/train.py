"""Train networks by a recipe, repeatably, and resume after an interruption: the seeds of a sweep."""

from __future__ import annotations

import hashlib
import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
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
from rsm_probe.sources.images.decoded_batches import MEMORY, augmented, batches, in_memory, shuffled
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.registry import named_images
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.tensor_files import read_tensors
from rsm_probe.sources.training.networks import NetworkConfig, build_network
from rsm_probe.sources.training.recipe import TrainingConfig, splits
from rsm_probe.sources.training.trained_network import AGAIN, Trained, made_by, network_of
from rsm_probe.sources.training.training_checkpoint import load_partial, save_partial, whole_steps
from rsm_probe.storage.paths import local_folder

# Channels last is faster, but there the gradient of a strided 1 x 1 convolution that reads fewer channels than this
# writes beyond its memory on some AMD processors (PyTorch 2.10 to 2.15): the program crashes or, worse, goes on.
_FEW_CHANNELS = 8


def train(
    config: TrainingConfig,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
    partial: str | Path | None = None,
    *,
    checkpoint_seconds: float = 60.0,
    image_memory: int = MEMORY,
    on_step: Callable[[int], object] = lambda step: None,
) -> Trained:
    """Train one network; the same seed gives the same network on the same machine, however often it was interrupted.

    Args:
        config: the recipe.
        seed: of the initial weights, of the order of the images and of their augmentation.
        device: where to train; None for the CPU, "auto" for a GPU where there is one.
        progress: show a bar.
        partial: a `.safetensors` file that keeps the half-trained network, regularly and at an interruption, and from
            which training continues; None keeps nothing.
        checkpoint_seconds: time between two writings of `partial`.
        image_memory: bytes of decoded images that are kept in memory; beyond it, each batch is decoded again.
        on_step: called with the number of each step, from 1, before the network changes.

    Raises:
        ImageError: images are missing or broken, or the recipe does not fit them.
        ModelError: the loss became NaN or infinite; the seed is not a whole number in [0, 2^63).
        StorageError: `partial` cannot be written.
    """
    require_seed(seed, "seed", ModelError)
    images, held_out, pixels = _training_images(config, progress, image_memory)
    assert images.targets is not None  # as in every set that a recipe can name
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
            on_step(step)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            assert schedule is not None
            schedule.step()
            bar.update()
            if file is not None and (interrupted or time.monotonic() - saved >= checkpoint_seconds):
                save_partial(file, owner, step, module, optimiser)
                saved = time.monotonic()
            if interrupted:
                break
    # No loss shows what the last step did.
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
    *,
    checkpoint_seconds: float = 60.0,
    on_step: Callable[[int], object] = lambda step: None,
) -> tuple[LoadedModel, float]:
    """Read the network of a recipe and a seed with its accuracy, or train and save it where there is no file.

    Until training is complete, `<name>.partial.safetensors` beside the file keeps the half-trained network; the same
    call resumes after an interruption. For the arguments, see `train`.

    Raises:
        ImageError: images are missing or broken, or the recipe does not fit them.
        ModelError: the file is damaged, or the loss became NaN or infinite; a seed outside of [0, 2^63).
        StorageError: the file holds the network of another recipe or seed, or cannot be written.
    """
    require_seed(seed, "seed", ModelError)
    path = local_folder(path, "the file of a network")
    _require_writable(path)
    if not path.is_file():
        partial = path.with_name(f"{path.stem}.partial.safetensors")
        trained = train(config, seed, device, progress, partial, checkpoint_seconds=checkpoint_seconds, on_step=on_step)
        trained.save(path)
        partial.unlink(missing_ok=True)
        if not trained.as_expected:
            warnings.warn(
                f"{path.name}: accuracy {trained.accuracy:.2f} is below the expected {config.expected_accuracy:.2f}; "
                f"its layers may look like those of an untrained network; train for more steps or change the rate",
                stacklevel=2,
            )
    state, texts = read_tensors(path, f"; {AGAIN}")
    if not made_by(config, seed, texts):
        raise StorageError(
            f"{path} holds a network of another recipe or seed; choose another folder or remove the file"
        )
    try:
        accuracy = float(texts["accuracy"])
    except (KeyError, ValueError):
        raise ModelError(f"{path} does not say its accuracy; {AGAIN}") from None
    return network_of(path, state, texts), accuracy


def _require_writable(path: Path) -> None:
    """Check before hours of training that the file can be written afterwards.

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
    """Apply `normalise` to a batch of bytes (B, 3, H, W)."""
    return (pixels.float() / 255.0 - 0.5) / 0.25


def _training_images(config: TrainingConfig, progress: bool, memory: int) -> tuple[ImageSet, ImageSet, Tensor | None]:
    """Images to train on, images to test on, and the pixels of the former where they fit into memory."""
    if not config.steps:
        return *splits(config), None
    if named_images(config.images).on_disk:
        return _decoded_images(config, progress, memory)
    # Drawn images depend on the recipe alone: seeds trained one after another share them.
    key = config.model_copy(update={"network": NetworkConfig(), "steps": 10})
    return _drawn_images(key, False, memory)


def _decoded_images(config: TrainingConfig, progress: bool, memory: int) -> tuple[ImageSet, ImageSet, Tensor | None]:
    images, held_out = splits(config)
    return images, held_out, in_memory(images, progress, memory)


_drawn_images = lru_cache(maxsize=1)(_decoded_images)


def _owner(config: TrainingConfig, seed: int, images: ImageSet) -> dict[str, str]:
    """Identify a half-trained network: by the files of a folder, but not by where CIFAR-100 lies."""
    ids = hashlib.sha256("\n".join(images.ids).encode()).hexdigest()
    return {"recipe": config.model_dump_json(exclude={"root"}), "seed": str(seed), "images": ids}


def _schedule(optimiser: torch.optim.SGD, config: TrainingConfig, done: int) -> OneCycleLR:
    """Learning rate and momentum by step; both have a closed form, so no past state need be stored."""
    schedule = OneCycleLR(optimiser, config.learning_rate, total_steps=config.steps, pct_start=0.2)
    if not done:
        return schedule
    # The first schedule initialised the optimiser, which a schedule that begins later relies on.
    return OneCycleLR(optimiser, config.learning_rate, total_steps=config.steps, pct_start=0.2, last_epoch=done - 1)


@contextmanager
def _repeatable() -> Iterator[None]:
    """Choose deterministic convolutions: on a GPU, some faster ones sum in another order every time."""
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
    """Share of questions answered correctly."""
    assert images.targets is not None
    values, right = images.targets.values, 0
    order = (np.arange(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size))
    # Each image is used once, so keeping it would gain nothing.
    for numbers, batch in batches(images, None, order):
        scores = module(_normalised(batch.to(device)))
        guesses = scores.unflatten(1, (values.shape[1], images.targets.choices)).argmax(dim=2).cpu().numpy()
        right += int((guesses == values[numbers]).sum())
    return right / values.size
