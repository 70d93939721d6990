"""Preprocess batches of images for a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rsm_probe.checks import brief
from rsm_probe.errors import ImageError
from rsm_probe.sources.images.batches import BatchSource, RawBatch
from rsm_probe.sources.images.image_set import UNREADABLE
from rsm_probe.sources.models.loaded_model import LoadedModel


def prepared(batch: RawBatch, preprocess: Callable[..., Tensor]) -> Tensor:
    """Preprocess images and stack them into a batch.

    Args:
        batch: images as loaded; tensors are used as they are.
        preprocess: PIL image -> tensor (C, H, W).

    Returns:
        The batch, (B, C, H, W).

    Raises:
        ImageError: preprocessing fails for an image or leaves images of different sizes; the message names them.
    """
    if isinstance(batch.images, Tensor):
        return batch.images
    tensors = [
        image if isinstance(image, Tensor) else _preprocessed(image, preprocess, batch.source, name)
        for image, name in zip(batch.images, batch.ids, strict=True)
    ]
    for tensor, name in zip(tensors, batch.ids, strict=True):
        if tensor.shape != tensors[0].shape:
            raise ImageError(
                f"{batch.source}: image {name!r} has shape {tuple(tensor.shape)} and image {batch.ids[0]!r} has "
                f"{tuple(tensors[0].shape)}; preprocessing must bring all to one size: load_model(model, "
                f"preprocess='resize-crop', size=224) does so (in YAML preprocess: resize-crop and size: 224), as does "
                f"a function of your own as preprocess="
            )
    return torch.stack(tensors)


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
    pictures = isinstance(source.first_image(), Image.Image)
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
