"""Preprocessing by one word, for models that bring none: the registry, one line each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from rsm_probe.checks import brief, require_whole
from rsm_probe.errors import ModelError, look_up
from rsm_probe.sources.images.limits import MOST_PIXELS
from rsm_probe.sources.images.pixels import to_rgb
from rsm_probe.sources.models.libraries import Preprocess
from rsm_probe.sources.models.loaded_model import to_tensor

_DEFAULT_SIZE = 224
# Mean and standard deviation of the colours of ImageNet, as torchvision's weights use them.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def resize_crop(image: Image.Image, height: int, width: int) -> Tensor:
    """Resize until one side fits and the other is not too short, and crop the centre: RGB in [0, 1], (3, H, W)."""
    return to_tensor(ImageOps.fit(to_rgb(image), (width, height), Image.Resampling.BILINEAR))


def imagenet(image: Image.Image, height: int, width: int) -> Tensor:
    """Do the same, and normalise with mean and standard deviation of ImageNet, (3, H, W)."""
    mean, std = torch.tensor(_MEAN)[:, None, None], torch.tensor(_STD)[:, None, None]
    return (resize_crop(image, height, width) - mean) / std


PREPROCESSING: dict[str, Callable[..., Tensor]] = {
    "resize-crop": resize_crop,
    "imagenet": imagenet,
}


def preprocessing(preprocess: str | Preprocess | None, size: int | Sequence[int] | None) -> Preprocess | None:
    """The function that a user's preprocessing stands for.

    Args:
        preprocess: a function from a PIL image to a tensor (C, H, W), a word of `PREPROCESSING`, or None.
        size: pixels of both sides, or (height, width), for a word; None for 224.

    Raises:
        ModelError: an unknown word, a size that is out of range, or a size without a word.
    """
    if not isinstance(preprocess, str):
        if preprocess is not None and not callable(preprocess):
            raise ModelError(
                f"preprocess must be a function from a PIL image to a tensor (C, H, W), or one of "
                f"{', '.join(PREPROCESSING)}, found {brief(preprocess)}"
            )
        if size is not None:
            raise ModelError(f"size= needs preprocess= to be one of {', '.join(PREPROCESSING)}")
        return preprocess
    word = look_up(preprocess, PREPROCESSING, "preprocess", ModelError)
    sides: Any = _DEFAULT_SIZE if size is None else size
    height, width = (sides, sides) if not isinstance(sides, Sequence) or len(sides) != 2 else sides
    for side in (height, width):
        require_whole(side, "size", 1, ModelError, MOST_PIXELS)
    return partial(word, height=int(height), width=int(width))
