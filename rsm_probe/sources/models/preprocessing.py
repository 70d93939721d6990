"""Images on their way into a model: preprocessed, stacked, on a device that is there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rsm_probe.checks import brief
from rsm_probe.errors import ImageError
from rsm_probe.sources.images.image_set import UNREADABLE, ImageSet
from rsm_probe.sources.models.loaded_model import LoadedModel


def prepared(
    raw: Sequence[Image.Image | Tensor], preprocess: Callable[..., Tensor], images: ImageSet, numbers: np.ndarray
) -> Tensor:
    """A batch as a model takes it, (B, C, H, W).

    Args:
        raw: images as they were loaded; tensors are ready already.
        preprocess: PIL image -> tensor (C, H, W).
        images: the set that they are of.
        numbers: their places in it.

    Raises:
        ImageError: preprocessing fails for an image, or leaves images of different sizes; the message names them.
    """
    tensors = [
        image if isinstance(image, Tensor) else _preprocessed(image, preprocess, images, int(number))
        for image, number in zip(raw, numbers, strict=True)
    ]
    for tensor, number in zip(tensors, numbers, strict=True):
        if tensor.shape != tensors[0].shape:
            raise ImageError(
                f"{images.name}: image {images.ids[number]!r} has shape {tuple(tensor.shape)} and image "
                f"{images.ids[numbers[0]]!r} has {tuple(tensors[0].shape)}; preprocessing must bring all to one size"
            )
    return torch.stack(tensors)


def _preprocessed(image: Image.Image, preprocess: Callable[..., Any], images: ImageSet, number: int) -> Tensor:
    try:
        tensor = preprocess(image)
        if isinstance(tensor, Tensor) and tensor.ndim >= 3:
            return tensor
        shape = f" of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else ""
        problem = f"gives {type(tensor).__name__}{shape}, and a model takes a tensor (C, H, W)"
    except UNREADABLE as error:
        problem = f"fails: {error}"
    raise ImageError(
        f"{images.name}: the preprocessing of image {brief(images.ids[number])} ({image.width} x {image.height}, mode "
        f"{image.mode}) {problem}"
    )


def warn_of_plain_pixels(models: Iterable[LoadedModel], images: ImageSet) -> None:
    """Warns where modules that bring no preprocessing are about to see pictures, whose values nobody normalises.

    Args:
        models: that are about to see the images.
        images: the set; its first image tells whether it holds pictures or tensors, which are ready.

    Raises:
        ImageError: the first image cannot be read.
    """
    plain = [model.name for model in models if model.default_preprocess]
    if plain and len(images) and isinstance(images[0], Image.Image):
        warnings.warn(
            f"{', '.join(plain)} brings no preprocessing and gets RGB in [0, 1] without normalisation, in the size of "
            f"the images; where it was trained on other values, give rsm_probe.sources.LoadedModel(name, module, "
            f"preprocess), whose preprocess makes a tensor (C, H, W) of a PIL image",
            stacklevel=4,  # above this function and the `LayerStream` that calls it
        )
