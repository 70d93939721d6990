"""What a batch of a loader contains: its images, and their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from rsm_probe.arrays import require_dense
from rsm_probe.errors import ImageError
from rsm_probe.sources.images.dataset_items import IMAGE_KEYS, LABEL_KEYS, described, plain_labels

_Images = Tensor | list[Image.Image | Tensor]


def images_of_batch(content: Any, key: str | int | None) -> tuple[_Images, Any]:
    """Find the images in a batch that a loader yields.

    Args:
        content: a tensor or array (N, ...), a list of PIL images, or a tuple, list or mapping that contains one.
        key: name or index of the images, if they cannot be recognised.

    Returns:
        The images, and where they are in the batch; None if they are all of it.

    Raises:
        ImageError: there are no images, or several that may be them.
    """
    if key is not None:
        try:
            value = content[key]
        except (LookupError, TypeError) as error:
            raise ImageError(f"found {described(content)}, without image_key={key!r}") from error
        if not _holds_images(value):
            raise ImageError(f"image_key={key!r} names {described(value)}, which holds no images")
        return _plain(value), key
    if _holds_images(content):
        if _is_ambiguous(content):
            raise ImageError(
                f"found {described(content)}, which may be a list of images (C, H, W) or of batches of spectrograms "
                f"(N, F, T); stack images by the collate_fn of the loader, or name the entry that holds them by "
                f"rsm_probe.sources.as_images(loader, image_key=0)"
            )
        return _plain(content), None
    parts: dict[Any, Any] = {}
    if isinstance(content, Mapping):
        parts = {name: content[name] for name in IMAGE_KEYS if name in content and _holds_images(content[name])}
        parts = parts or {name: value for name, value in content.items() if _holds_images(value)}
        if len(parts) > 1:
            raise ImageError(
                f"found {described(content)}, of which {', '.join(map(repr, parts))} may be the images; name one, as "
                f"in rsm_probe.sources.as_images(loader, image_key={next(iter(parts))!r})"
            )
    elif isinstance(content, tuple | list):
        parts = {k: value for k, value in enumerate(content) if _holds_images(value)}
        # Masks are whole numbers, images are not.
        real = {k: v for k, v in parts.items() if not isinstance(v, Tensor) or v.is_floating_point()}
        parts = real or parts
    for where, value in parts.items():
        return _plain(value), where
    raise ImageError(
        f"found {described(content)}, which is neither a tensor of images (N, C, H, W) that is ready for the models, "
        f"nor a list of PIL images, nor a tuple or mapping that contains one; name the images by "
        f"rsm_probe.sources.as_images(loader, image_key=...), or return such a batch from the collate_fn of the loader"
    )


def labels_of_batch(content: Any, images: Any, count: int, classes: Mapping[Any, Sequence[str]]) -> list[str]:
    """Find the labels in a batch: the first entry after the images, else before
    them, that has one whole number or text per image.

    Args:
        content: the batch.
        images: where the images are in it; None if they are all of it.
        count: number of images.
        classes: see `class_names`.

    Returns:
        One label per image, "" where there is none.
    """
    keys: list[Any] = []
    if isinstance(content, Mapping):
        keys = [key for key in LABEL_KEYS if key in content]
    elif images is not None:
        # What comes after an image is its label rather than what comes before, such as its number.
        keys = [*range(images + 1, len(content)), *range(images)]
    for key in keys:
        value = content[key]
        if isinstance(value, Tensor) and value.is_floating_point():
            continue
        values = value.reshape(-1) if isinstance(value, Tensor) and value.numel() == count else value
        labels = plain_labels(list(values) if isinstance(values, tuple) else values, _names(classes, key))
        if len(labels) == count:
            return labels
    return [""] * count


def class_names(dataset: Any) -> dict[Any, Sequence[str]]:
    """The names of classes that a data set knows: by key of its items, or by None for all."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        return {key: names for key, feature in features.items() if (names := getattr(feature, "names", None))}
    classes = getattr(dataset, "classes", None)
    return {None: classes} if isinstance(classes, Sequence) and not isinstance(classes, str) else {}


def _names(classes: Mapping[Any, Sequence[str]], key: Any) -> Sequence[str] | None:
    return classes.get(key, classes.get(None))


def _holds_images(value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim >= 3 and len(value) > 0 and (isinstance(value, Tensor) or value.dtype.kind == "f")
    pictures = isinstance(value, list | tuple) and len(value) > 0
    return pictures and (
        all(isinstance(part, Image.Image) for part in value)
        or all(isinstance(part, Tensor) and part.ndim == 3 for part in value)
    )


def _is_ambiguous(content: Any) -> bool:
    """Whether a batch is a list of tensors of three axes, as several inputs (N, F, T) are too."""
    return isinstance(content, list | tuple) and isinstance(content[0], Tensor)


def _plain(value: Any) -> _Images:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
        return value.float() if value.dtype == torch.float64 else value
    if isinstance(value, Tensor):
        require_dense(value, "it", ImageError)
        # Subclasses with metadata (MONAI, torchvision) would carry it into the models.
        return value if type(value) is Tensor else value.as_subclass(Tensor)
    return list(value)
