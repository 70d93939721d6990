"""Preprocess batches of images for a model."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from rsm_probe.checks import brief
from rsm_probe.errors import ImageError
from rsm_probe.sources.images.batches import BatchSource, RawBatch
from rsm_probe.sources.images.clips import Clip, require_clips
from rsm_probe.sources.images.image_set import UNREADABLE
from rsm_probe.sources.models.loaded_model import LoadedModel


def prepared(batch: RawBatch, preprocess: Callable[..., Tensor], frames_first: bool = False) -> Tensor:
    """Preprocess images and stack them into a batch.

    Args:
        batch: images as loaded; tensors are used as they are.
        preprocess: PIL image -> tensor (C, H, W).
        frames_first: clips become (T, C, H, W) rather than (C, T, H, W), unless they say which; see
            `takes_frames_first`.

    Returns:
        The batch, (B, C, H, W), or of clips (B, C, T, H, W) or (B, T, C, H, W).

    Raises:
        ImageError: preprocessing fails for an image or leaves images of different sizes; the message names them.
    """
    if isinstance(batch.images, Tensor):
        return batch.images
    tensors = [
        _clip(image, preprocess, batch.source, name, frames_first)
        if isinstance(image, Clip)
        else _pixels(image, preprocess, batch.source, name)
        for image, name in zip(batch.images, batch.ids, strict=True)
    ]
    return torch.stack(_of_one_size(tensors, [f"image {name!r}" for name in batch.ids], batch.source))


def blank_clips(model: LoadedModel, frames: int, axes: str | None = None) -> Tensor:
    """Make a batch of two preprocessed grey clips, in the order of axes that the model takes; see `prepared`.

    Args:
        model: the model.
        frames: number of frames of a clip.
        axes: "NCTHW" or "NTCHW"; by default that of the model's library.

    Raises:
        ImageError: the preprocessing fails, or the axes are unknown.
    """
    clip = Clip([Image.new("RGB", (256, 256), (124, 116, 104))] * frames, require_clips(frames, axes))
    batch = RawBatch("blank clips", [clip, clip], ["0", "1"], ["", ""], np.arange(2))
    return prepared(batch, model.preprocess, takes_frames_first(model.module))


def takes_frames_first(module: nn.Module) -> bool:
    """Whether a video model takes (N, T, C, H, W), as those of transformers do, whose input is pixel_values."""
    return any(
        parameter.startswith("pixel_values")
        for part in module.modules()
        for parameter in list(inspect.signature(part.forward).parameters)[:1]
    )


def _pixels(image: Image.Image | Tensor, preprocess: Callable[..., Tensor], source: str, name: str) -> Tensor:
    return image if isinstance(image, Tensor) else _preprocessed(image, preprocess, source, name)


def _clip(clip: Clip, preprocess: Callable[..., Tensor], source: str, name: str, frames_first: bool) -> Tensor:
    frames = [_pixels(frame, preprocess, source, name) for frame in clip.frames]
    # Processors of video models make a clip of a single frame, (1, C, H, W).
    frames = [frame[0] if frame.ndim == 4 and len(frame) == 1 else frame for frame in frames]
    frames = _of_one_size(frames, [f"frame {k} of clip {name!r}" for k in range(len(frames))], source)
    count, channels = len(frames), len(frames[0])
    if clip.axes is None and not frames_first and count == channels:
        raise ImageError(
            f"{source}: clips of {count} frames with {channels} channels show no order of axes; name the one that the "
            f"model takes by axes='NCTHW' or axes='NTCHW' beside clips={count}"
        )
    return torch.stack(frames, dim=0 if (frames_first and clip.axes is None) or clip.axes == "NTCHW" else 1)


def _of_one_size(tensors: list[Tensor], names: Sequence[str], source: str) -> list[Tensor]:
    for tensor, name in zip(tensors, names, strict=True):
        if tensor.shape != tensors[0].shape:
            raise ImageError(
                f"{source}: {name} has shape {tuple(tensor.shape)} and {names[0]} has "
                f"{tuple(tensors[0].shape)}; preprocessing must bring all to one size: load_model(model, "
                f"preprocess='resize-crop', size=224) does so (in YAML preprocess: resize-crop and size: 224), as does "
                f"a function of your own as preprocess="
            )
    return tensors


def _preprocessed(image: Image.Image, preprocess: Callable[..., Any], source: str, name: str) -> Tensor:
    try:
        tensor = preprocess(image)
        if isinstance(tensor, Tensor) and tensor.ndim >= 3:
            return tensor
        shape = f" of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else ""
        problem = f"must return a tensor (C, H, W), got {type(tensor).__name__}{shape}"
    except UNREADABLE as error:
        problem = f"failed: {error}"
    raise ImageError(
        f"{source}: preprocessing of image {brief(name)} ({image.width} x {image.height}, mode {image.mode}) {problem}"
    )


def warn_of_plain_pixels(models: Iterable[LoadedModel], source: BatchSource) -> None:
    """Warn if models are about to see values that they may not expect.

    These are pictures for models without their own preprocessing, whose values are not normalised, and tensors for
    models that declare different preprocessing, which is not applied.

    Args:
        models: the models that will see the images.
        source: the images. The first one shows whether they are pictures, or tensors that are ready for the models.

    Raises:
        ImageError: the first image cannot be read.
    """
    models = list(models)
    plain = [model.name for model in models if model.default_preprocess]
    if source.count == 0 or (not plain and len(models) < 2):
        return
    first = source.first_image()
    pictures = isinstance(first.frames[0] if isinstance(first, Clip) else first, Image.Image)
    if plain and pictures:
        words = (
            f"no preprocessing given for {', '.join(plain)}: images are passed as RGB in [0, 1], without normalisation "
            f"and in their own size; if the model was trained on other values, give load_model(model, "
            f"preprocess=...), where preprocess is 'imagenet' or 'resize-crop', or a function that turns a PIL image "
            f"into a tensor (C, H, W)"
        )
    elif not pictures and (differing := _differently_prepared(models)):
        words = (
            f"{' and '.join(differing)} declare different preprocessing, but get the same tensors, as they are; give "
            f"pictures (a folder, paths, PIL images, an array of bytes), which pass each model's own preprocessing, or "
            f"sweep these models separately, each on its own tensors"
        )
    else:
        return
    warnings.warn(words, stacklevel=5)  # above this function, `LayerStream`, and both functions of a capture or sweep


def _differently_prepared(models: Sequence[LoadedModel]) -> list[str]:
    """Names of the first two models that declare preprocessing which differs on a picture; [] if there are none."""
    declared: list[tuple[str, Tensor]] = []
    functions = {id(model.preprocess): model for model in models if not model.default_preprocess}
    for model in functions.values() if len(functions) > 1 else ():
        pixels = model.blank_input()
        if declared and not torch.equal(declared[0][1], pixels):
            return [declared[0][0], model.name]
        declared.append((model.name, pixels))
    return []
