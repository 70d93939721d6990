"""Images on their way into a model: preprocessed, stacked, on a device that is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rsm_probe.errors import ImageError, ModelError
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


def require_device(device: str | torch.device | None) -> None:
    """Makes sure that a device is there.

    Raises:
        ModelError: it is not, or its name is none.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"cannot run on device {str(device)!r}: {reason}") from error
