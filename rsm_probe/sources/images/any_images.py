"""Make image sets from a folder, a tensor, a data set, or the name of an embedded set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os.path import exists
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rsm_probe.arrays import real_array, require_dense
from rsm_probe.checks import brief, require_texts
from rsm_probe.errors import ImageError, did_you_mean
from rsm_probe.sources.images.dataset_items import labels_of
from rsm_probe.sources.images.folders import folder
from rsm_probe.sources.images.image_set import ImageSet, digest, pixel_bytes

# Number of images of a data set that are read for its fingerprint.
_FINGERPRINTED = 256
# Ids take about 70 bytes each.
_MOST_IMAGES = 10**8


def as_images(images: Any) -> ImageSet:
    """Turn anything that holds images into an `ImageSet`.

    Args:
        images: an `ImageSet`; the name of an embedded set ("digits", "scenes", "cluttered", "photos"); the path of a
            folder; a tensor (N, C, H, W) that is ready for the models; or a data set with `__len__` and `__getitem__`
            that gives images or (image, label) pairs, like those of torchvision. Wrap items of other kinds in an
            `ImageSet`.

    Raises:
        ImageError: the value is none of these; the message says what to give instead.
    """
    from rsm_probe.sources.images.registry import EMBEDDED

    if isinstance(images, ImageSet):
        return images
    if isinstance(images, str) and images in EMBEDDED:
        return EMBEDDED[images]()
    if isinstance(images, str | Path):
        path = Path(images)
        # pathlib turns an empty name into the working folder.
        if images == "" or (len(path.parts) == 1 and not exists(path)):
            hint = did_you_mean(str(images), EMBEDDED)
            raise ImageError(
                f"no folder or embedded image set {brief(str(images))}{hint} (embedded: {', '.join(EMBEDDED)})"
            )
        return folder(path)
    if isinstance(images, Tensor | np.ndarray):
        return from_tensor(images)
    sequence = hasattr(images, "__len__") and hasattr(images, "__getitem__")
    if sequence and not isinstance(images, Mapping | bytes | bytearray):
        return from_dataset(images)
    raise ImageError(f"cannot take images from {type(images).__name__}; {_instead_of(images)}")


def _instead_of(images: Any) -> str:
    """Suggest what to give instead of a value that is not a sequence of images."""
    if isinstance(images, DataLoader):
        return "give its data set (loader.dataset); batch_size= makes the batches"
    if isinstance(images, Mapping):
        return "give one of its values, or list(images.values()) if the values are images"
    if isinstance(images, str | bytes | bytearray | int | float) or not isinstance(images, Iterable):
        return "give a folder, a tensor or a data set"
    return "images are read by index, and more than once; give a list, or a data set with a length"


def from_tensor(tensor: Tensor | np.ndarray, ids: Sequence[str] | None = None, labels: Sequence[str] = ()) -> ImageSet:
    """Make an image set from a tensor (N, C, H, W) of images that are ready for the models.

    float64, NumPy's default, becomes float32, which models take.

    Args:
        tensor: preprocessed images of a floating-point type.
        ids: one name per image; numbers by default.
        labels: one label per image, if known.

    Raises:
        ImageError: the tensor has another number of axes, is empty, holds integers, or has no plain values (a sparse
            one, for example); ids or labels are not text, repeat ids, or differ in number from the images.
    """
    if isinstance(tensor, Tensor):
        require_dense(tensor, "the tensor of images", ImageError)
    else:
        # Contiguous, because PyTorch does not support negative strides.
        tensor = torch.from_numpy(np.ascontiguousarray(real_array(tensor, "the array of images", ImageError)))
    if tensor.ndim != 4 or 0 in tensor.shape:
        raise ImageError(f"a tensor of images must have shape (N, C, H, W), found {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ImageError(
            f"a tensor of images must hold floating-point values that are ready for the models, found {tensor.dtype}; "
            f"give `.float()`, scaled and normalised as in the models' training"
        )
    pixels = tensor.detach().to(torch.float32 if tensor.dtype == torch.float64 else tensor.dtype)
    names = [str(k) for k in range(len(pixels))] if ids is None else require_texts(ids, "ids", ImageError)
    if len(names) != len(pixels):
        raise ImageError(f"{len(names)} ids for {len(pixels)} images")
    return ImageSet(
        "tensor",
        names,
        lambda index: pixels[index],
        labels=labels,
        content=lambda: digest(map(pixel_bytes, pixels)),
    )


def from_dataset(dataset: Any, name: str | None = None) -> ImageSet:
    """Make an image set from any sequence of images or (image, label) pairs, such as a torchvision data set.

    Labels are used only if they can be known without reading items, so that no image is decoded twice; see
    `labels_of`. Otherwise, they are "".

    Args:
        dataset: the data set, with `__len__` and `__getitem__`.
        name: the name of the image set; the class of the data set by default.

    Raises:
        ImageError: the data set is empty or has no length. Items that are not images raise it when they are loaded;
            the message names the item and says what to write instead.
    """
    try:
        count = len(dataset)
    except (TypeError, NotImplementedError, ValueError, OverflowError) as error:
        raise ImageError(f"{type(dataset).__name__} does not give its number of images: {error}") from error
    if not count:
        raise ImageError(f"{type(dataset).__name__} contains no images")
    if count > _MOST_IMAGES:
        raise ImageError(
            f"{type(dataset).__name__} holds {count} images, above the limit of {_MOST_IMAGES} (each id takes 70 "
            f"bytes); give parts of it, such as torch.utils.data.Subset"
        )
    # Hashing all images would cost a whole decoding pass, so hash an evenly spaced sample.
    some = np.unique(np.linspace(0, count - 1, _FINGERPRINTED).astype(int))
    images: ImageSet = ImageSet(
        name or type(dataset).__name__,
        [str(k) for k in range(count)],
        lambda index: dataset[index],
        labels=labels_of(dataset),
        content=lambda: digest(pixel_bytes(images[int(index)]) for index in some),
    )
    return images
