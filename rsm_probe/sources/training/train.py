"""Train networks reproducibly by a recipe, and resume after an interruption."""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.registry import EMBEDDED
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.tensor_files import read_tensors
from rsm_probe.sources.training.decoded_batches import MEMORY, augmented, batches, in_memory, shuffled
from rsm_probe.sources.training.networks import NetworkConfig, build_network
from rsm_probe.sources.training.recipe import TrainingConfig, splits
from rsm_probe.sources.training.trained_network import (
    AGAIN,
    NOT_OF_A_NETWORK,
    Trained,
    accuracy_in,
    made_by,
    network_of,
)
from rsm_probe.sources.training.training_checkpoint import load_partial, save_partial, whole_steps
from rsm_probe.storage.paths import local_folder

# Channels-last memory is faster. But on some AMD processors, the gradient of a strided 1 x 1 convolution over fewer
# input channels than this writes out of bounds (PyTorch 2.10 to 2.15), which may crash the program or corrupt data.
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
    checkpoints: Mapping[int, str | Path] | None = None,
) -> Trained:
    """Train one network. On one machine, a seed always gives the same network, with or without interruptions.

    Checkpoints do not change it either.

    Args:
        config: the recipe.
        seed: seed of the initial weights, the order of the images and their augmentation.
        device: where to train; None for the CPU, "auto" for a GPU if there is one.
        progress: show a progress bar.
        partial: a `.safetensors` file for the half-trained network, written regularly and at an interruption; training
            resumes from it. None writes no file.
        checkpoint_seconds: time between two writes of `partial`.
        image_memory: bytes of decoded images to hold in memory; above this, each batch is decoded again.
        on_step: called with the number of each step, from 1, before the weights change.
        checkpoints: number of steps -> `.safetensors` file for the network after so many steps, 0 for the untrained
            network; each is written with its accuracy. A `partial` that is past a checkpoint is not used.

    Returns:
        The network on the CPU, in evaluation mode, with its accuracy on held-out images.

    Raises:
        ImageError: images are missing or broken, or do not suit the recipe.
        ModelError: the loss became NaN or infinite, or the seed is not a whole number in [0, 2^63).
        StorageError: `partial` or a checkpoint cannot be written.
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
    files = {step: Path(path) for step, path in (checkpoints or {}).items()}
    done = 0 if file is None else load_partial(file, owner, module, optimiser, min(files, default=config.steps))

    def save_checkpoint(step: int) -> None:
        _require_finite(module.state_dict().values(), step, config)
        of_step = copy.deepcopy(module).eval().to(memory_format=torch.contiguous_format)
        accuracy = _accuracy(of_step, held_out, config.batch_size, device)
        Trained(of_step.to("cpu"), accuracy, seed, config, step).save(files[step])

    if done in files:
        save_checkpoint(done)
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
            if step in files:
                save_checkpoint(step)
            if file is not None and (interrupted or time.monotonic() - saved >= checkpoint_seconds):
                save_partial(file, owner, step, module, optimiser)
                saved = time.monotonic()
            if interrupted:
                break
    # No loss is computed after the last step, so check the weights.
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
    """Read the network of a recipe and seed with its accuracy; if there is no file, train the network and save it.

    During training, `<name>.partial.safetensors` beside the file holds the half-trained network; after an
    interruption, the same call resumes from it. The checkpoints of the recipe are written as well, into a folder beside
    the file (see `checkpoint_file`); where one is missing, the network is trained again. For the arguments, see
    `train`.

    Returns:
        The network, and its accuracy on held-out images, in [0, 1].

    Raises:
        ImageError: images are missing or broken, or do not suit the recipe.
        ModelError: a file is damaged, the loss became NaN or infinite, or the seed is outside [0, 2^63).
        StorageError: a file holds the network of another recipe or seed, or cannot be written.
    """
    require_seed(seed, "seed", ModelError)
    path = local_folder(path, "path")
    _require_writable(path)
    network = _read_own(path, config, seed) if path.is_file() else None
    files = {step: checkpoint_file(path, step) for step in config.checkpoint_steps}
    missing = {step: file for step, file in files.items() if not file.is_file()}
    for step in files.keys() - missing.keys():
        _read_own(files[step], config, seed, step)
    if missing or network is None:
        partial = path.with_name(f"{path.stem}.partial.safetensors")
        trained = train(
            config, seed, device, progress, partial, checkpoint_seconds=checkpoint_seconds, on_step=on_step,
            checkpoints=missing,
        )  # fmt: skip
        if network is None:
            trained.save(path)
        partial.unlink(missing_ok=True)
        if not trained.as_expected:
            warnings.warn(
                f"{path.name}: accuracy {trained.accuracy:.2f} is below the expected {config.expected_accuracy:.2f}; "
                f"its layers may look like those of an untrained network; train longer or change learning_rate:",
                stacklevel=2,
            )
    state, texts = network or _read_own(path, config, seed)
    if files:
        last, _ = _read_own(files[config.steps], config, seed, config.steps)
        if not all(torch.equal(value, last[name]) for name, value in state.items()):
            raise StorageError(
                f"{path} and the checkpoints in {files[config.steps].parent} come from two trainings, by different "
                f"machines or versions; remove both and run again"
            )
    return network_of(path, state, texts), accuracy_in(texts, path)


def checkpoint_file(path: Path, step: int) -> Path:
    """The file of a checkpoint of the network in `<name>.safetensors`: `<name>-steps/<name>@<step>.safetensors`."""
    return path.with_name(f"{path.stem}-steps") / f"{path.stem}@{step}.safetensors"


def _read_own(
    path: Path, config: TrainingConfig, seed: int, step: int | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and texts of the network, or of a checkpoint, that a recipe and seed gave.

    Raises:
        ModelError: the file is damaged.
        StorageError: it is of another recipe, seed or step.
    """
    state, texts = read_tensors(path, f"; {AGAIN}")
    if not made_by(config, seed, texts) or texts.get("step") != (None if step is None else str(step)):
        what = "network of another recipe or seed" if step is None else "checkpoint of another recipe, seed or step"
        raise StorageError(f"{path} holds the {what}; choose another folder or remove the file")
    return state, texts


def _require_writable(path: Path) -> None:
    """Check before hours of training that the file can be written afterwards.

    Raises:
        StorageError: the file cannot be written.
    """
    if path.exists() and not path.is_file():
        raise StorageError(f"cannot write {path}: it is a folder or device; remove it or choose another folder")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise StorageError(f"cannot write {path}: {folder} is not a writable folder")


def _normalised(pixels: Tensor) -> Tensor:
    """Apply `normalise` to a batch of uint8 pixels (B, 3, H, W)."""
    return (pixels.float() / 255.0 - 0.5) / 0.25


def _training_images(config: TrainingConfig, progress: bool, memory: int) -> tuple[ImageSet, ImageSet, Tensor | None]:
    """Load the images to train on, those to test on, and the pixels of the former if they fit into memory."""
    if not config.steps:
        return *splits(config), None
    if config.images not in EMBEDDED:
        return _decoded_images(config, progress, memory)
    # Embedded images depend only on the recipe, so seeds trained one after another share them.
    key = config.model_copy(update={"network": NetworkConfig(), "steps": 10, "checkpoints": None})
    return _drawn_images(key, False, memory)


def _decoded_images(config: TrainingConfig, progress: bool, memory: int) -> tuple[ImageSet, ImageSet, Tensor | None]:
    images, held_out = splits(config)
    return images, held_out, in_memory(images, progress, memory)


_drawn_images = lru_cache(maxsize=1)(_decoded_images)


def _owner(config: TrainingConfig, seed: int, images: ImageSet) -> dict[str, str]:
    """Identify a half-trained network by its recipe, seed and image ids."""
    ids = hashlib.sha256("\n".join(images.ids).encode()).hexdigest()
    return {"recipe": config.model_dump_json(exclude=NOT_OF_A_NETWORK), "seed": str(seed), "images": ids}


def _schedule(optimiser: torch.optim.SGD, config: TrainingConfig, done: int) -> OneCycleLR:
    """The schedule of learning rate and momentum; both have a closed form, so that checkpoints need not store it."""
    schedule = OneCycleLR(optimiser, config.learning_rate, total_steps=config.steps, pct_start=0.2)
    if not done:
        return schedule
    # A schedule that begins later relies on the optimiser having been initialised by the first one.
    return OneCycleLR(optimiser, config.learning_rate, total_steps=config.steps, pct_start=0.2, last_epoch=done - 1)


@contextmanager
def _repeatable() -> Iterator[None]:
    """Use deterministic convolutions: on a GPU, some faster ones sum in a different order each time."""
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
    """The share of questions answered correctly."""
    assert images.targets is not None
    values, right = images.targets.values, 0
    order = (np.arange(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size))
    # Each image is used only once, so holding them in memory would gain nothing.
    for numbers, batch in batches(images, None, order):
        scores = module(_normalised(batch.to(device)))
        guesses = scores.unflatten(1, (values.shape[1], images.targets.choices)).argmax(dim=2).cpu().numpy()
        right += int((guesses == values[numbers]).sum())
    return right / values.size
