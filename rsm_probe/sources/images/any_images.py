"""Image sets from a folder, a tensor, a data set, or the name of an embedded set."""

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
from rsm_probe.errors import ImageError, nearest
from rsm_probe.sources.images.dataset_items import labels_of
from rsm_probe.sources.images.folders import folder
from rsm_probe.sources.images.image_set import ImageSet, digest, pixel_bytes

# Images of a data set that are read for its fingerprint.
_FINGERPRINTED = 256
# Ids take about 70 bytes each.
_MOST_IMAGES = 10**8


def as_images(images: Any) -> ImageSet:
    """Turn whatever a user calls images into an `ImageSet`.

    Args:
        images: an `ImageSet`; the name of an embedded set ("digits", "scenes", "cluttered", "photos"); the path of a
            folder; a tensor (N, C, H, W) that is ready for the models; or a data set with `__len__` and `__getitem__`
            giving images or (image, label) pairs, as torchvision's do. Items of other kinds need an `ImageSet`.

    Raises:
        ImageError: none of these; the message says what to give.
    """
    from rsm_probe.sources.images.registry import EMBEDDED

    if isinstance(images, ImageSet):
        return images
    if isinstance(images, str) and images in EMBEDDED:
        return EMBEDDED[images]()
    if isinstance(images, str | Path):
        path = Path(images)
        # Of an empty name, pathlib makes the working folder.
        if images == "" or (len(path.parts) == 1 and not exists(path)):
            hint = nearest(str(images), EMBEDDED)
            raise ImageError(
                f"no folder and no embedded image set {brief(str(images))}{hint} (embedded: {', '.join(EMBEDDED)})"
            )
        return folder(path)
    if isinstance(images, Tensor | np.ndarray):
        return from_tensor(images)
    sequence = hasattr(images, "__len__") and hasattr(images, "__getitem__")
    if sequence and not isinstance(images, Mapping | bytes | bytearray):
        return from_dataset(images)
    raise ImageError(f"cannot take images from {type(images).__name__}; {_instead_of(images)}")


def _instead_of(images: Any) -> str:
    """Suggest what to give instead of something that is not a sequence of images."""
    if isinstance(images, DataLoader):
        return "give its data set (loader.dataset): batches are made by batch_size="
    if isinstance(images, Mapping):
        return "give one of its values, or list(images.values()) where these are images"
    if isinstance(images, str | bytes | bytearray | int | float) or not isinstance(images, Iterable):
        return "give a folder, a tensor or a data set"
    return "images are read by number, and more than once; give a list of them, or a data set with a length"


def from_tensor(tensor: Tensor | np.ndarray, ids: Sequence[str] | None = None, labels: Sequence[str] = ()) -> ImageSet:
    """Take images (N, C, H, W) that are ready for the models; ids are numbers by default.

    Double precision, NumPy's default, becomes single precision, which models take.

    Raises:
        ImageError: another number of axes, no image, integers, or a tensor without plain values (sparse, for example);
            ids or labels that are not text, repeated, or of another number than images.
    """
    if isinstance(tensor, Tensor):
        require_dense(tensor, "the tensor of images", ImageError)
    else:
        # PyTorch does not support negative strides.
        tensor = torch.from_numpy(np.ascontiguousarray(real_array(tensor, "the array of images", ImageError)))
    if tensor.ndim != 4 or 0 in tensor.shape:
        raise ImageError(f"images as a tensor have shape (N, C, H, W), found {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ImageError(
            f"images as a tensor hold what the models take, as floating numbers; found {tensor.dtype}: give "
            f"`.float()`, scaled and normalised as the models were trained"
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
    """Take any sequence of images or of (image, label) pairs, such as a torchvision data set.

    Labels are taken only where no item has to be read for them, so that no image is decoded twice: `targets` of
    torchvision's data sets, whole numbers of a `TensorDataset`, those of the parts of `Subset` and `ConcatDataset`, and
    those of a list of pairs. Otherwise they are "".

    Raises:
        ImageError: the data set is empty, or has no length. Items that are not images raise it when they are loaded;
            the message names the item and says what to write.
    """
    try:
        count = len(dataset)
    except (TypeError, NotImplementedError, ValueError, OverflowError) as error:
        raise ImageError(f"{type(dataset).__name__} does not say how many images it holds: {error}") from error
    if not count:
        raise ImageError(f"{type(dataset).__name__} holds no images")
    if count > _MOST_IMAGES:
        raise ImageError(
            f"{type(dataset).__name__} holds {count} images, and at most {_MOST_IMAGES} can be named at once (70 bytes "
            f"for each); give parts of it, as torch.utils.data.Subset does"
        )
    # Decoding all images for a fingerprint would cost a whole pass: some, spread evenly, stand for all.
    some = np.unique(np.linspace(0, count - 1, _FINGERPRINTED).astype(int))
    images: ImageSet = ImageSet(
        name or type(dataset).__name__,
        [str(k) for k in range(count)],
        lambda index: dataset[index],
        labels=labels_of(dataset),
        content=lambda: digest(pixel_bytes(images[int(index)]) for index in some),
    )
    return images
