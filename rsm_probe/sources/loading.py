"""Images on their way into a model: preprocessed, stacked, on a device that is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rsm_probe.errors import ImageError
from rsm_probe.sources.images import ImageSet


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
        ImageError: preprocessing leaves images of different sizes; the message names two.
    """
    tensors = [image if isinstance(image, Tensor) else preprocess(image) for image in raw]
    for tensor, number in zip(tensors, numbers, strict=True):
        if tensor.shape != tensors[0].shape:
            raise ImageError(
                f"{images.name}: image {images.ids[number]!r} has shape {tuple(tensor.shape)} and image "
                f"{images.ids[numbers[0]]!r} has {tuple(tensors[0].shape)}; preprocessing must bring all to one size"
            )
    return torch.stack(tensors)
