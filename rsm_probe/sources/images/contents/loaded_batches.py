"""What a batch of a loader contains: its images, and their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from rsm_probe.arrays import require_dense
from rsm_probe.errors import ImageError
from rsm_probe.sources.images.contents.dataset_items import (
    Key,
    Path,
    described,
    entry,
    image_of,
    image_paths,
    is_image_path,
    is_pixels,
    path_of,
    unclear,
)
from rsm_probe.sources.images.contents.item_labels import label_paths, label_texts, named_label, plain_labels, text_at
from rsm_probe.sources.images.pixels import image_of_array

_Images = Tensor | list[Image.Image | Tensor]


@dataclass(frozen=True)
class BatchParts:
    """Where the images of a batch are.

    Attributes:
        images: a tensor (N, ...) or a list of images.
        path: of the images within the batch, or within each item; () if they are all of it.
        items: the batch as a list of items, one per image, as `collate_fn=list` leaves it; None if it was collated.
        unclear: why these may not be the images, "" if they are; only `forward=` takes the batch then.
        remark: what to say of other entries that may be images, "" if there are none.
    """

    images: _Images
    path: Path
    items: Sequence[Any] | None = None
    unclear: str = ""
    remark: str = ""


def images_of_batch(content: Any, key: Key | None, size: int | None = None) -> BatchParts:
    """Find the images in a batch that a loader yields.

    Args:
        content: a tensor or array (N, ...), a list of PIL images, or a tuple, list or mapping that contains one; or a
            list of items (tuples, lists, mappings), each with an image.
        key: name or index of the images, if they cannot be recognised.
        size: number of images that the batch should have, if it is known.

    Raises:
        ImageError: there are no images.
    """
    if _is_list_of_items(content, key, size):
        paths = image_paths(content[0], is_pixels) if key is None else [path_of(key)]
        images = [image_of(item, paths[0]) for item in content]
        return BatchParts(images, paths[0], content, *unclear(content[0], paths, "items"))
    if key is not None:
        value = entry(content, key, "image_key")
        if not _holds_images(value):
            raise ImageError(f"image_key={key!r} names {described(value)}, which holds no images")
        return BatchParts(_plain(value), path_of(key))
    if _holds_images(content) and _is_ambiguous(content):
        raise ImageError(
            f"found {described(content)}, which may be a list of images (C, H, W) or of batches of spectrograms "
            f"(N, F, T); stack images by the collate_fn of the loader, or name the entry that holds them by "
            f"rsm_probe.sources.as_images(loader, image_key=0)"
        )
    paths = image_paths(content, _holds_images)
    if not paths:
        raise ImageError(
            f"found {described(content)}, which is neither a tensor of images (N, C, H, W) that is ready for the "
            f"models, nor a list of PIL images, nor a tuple or mapping that contains one; name the images by "
            f"rsm_probe.sources.as_images(loader, image_key=...), or return such a batch from the collate_fn of the "
            f"loader"
        )
    return BatchParts(_plain(entry(content, paths[0], "image_key")), paths[0], None, *unclear(content, paths, "loader"))


def _is_list_of_items(content: Any, key: Key | None, size: int | None) -> bool:
    """Whether a batch was not collated: a list of tuples, lists or mappings that hold an image each."""
    if not isinstance(content, list | tuple) or not content:
        return False
    if not all(isinstance(item, list | tuple | Mapping) for item in content):
        return False
    try:
        if not all(
            image_paths(item, is_pixels) if key is None else is_pixels(entry(item, key, "")) for item in content
        ):
            return False
    except ImageError:
        return False
    # Several inputs of N images each are a list of tuples, too.
    if size is not None and len(content) == size and any(len(item) != size for item in content):
        return True
    return not any(image_paths(item, _holds_images) for item in content)


def label_candidates(parts: BatchParts, content: Any, count: int) -> dict[Path, list[str]]:
    """Where the labels of a batch may be, best first, with their texts; see `label_paths`."""
    if parts.items is None:
        return label_paths(content, parts.path, lambda value: _texts(value, count, None))
    paths = label_paths(parts.items[0], parts.path, label_texts)
    texts = {path: [text_at(item, path) for item in parts.items] for path in paths}
    return {path: labels for path, labels in texts.items() if all(labels)}


def labels_at(
    path: Path | None, parts: BatchParts, content: Any, count: int, classes: Mapping[Any, Sequence[str]]
) -> list[str]:
    """The labels in an entry of a batch.

    Args:
        path: of the entry; None if there are no labels.
        parts: the images of the batch.
        content: the batch.
        count: number of images.
        classes: see `class_names`.

    Returns:
        One label per image, "" where there is none.
    """
    if path is None:
        return [""] * count
    names = classes.get(path[-1], classes.get(None))
    if parts.items is not None:
        return [named_label(text_at(item, path), names) for item in parts.items]
    try:
        labels = _texts(entry(content, path, "label_key"), count, names)
    except ImageError:
        labels = []
    return labels or [""] * count


def _texts(value: Any, count: int, names: Sequence[str] | None) -> list[str]:
    """The labels that an entry of a batch holds, one per image as whole number or text; [] if it holds none."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return []
    values = value.reshape(-1) if isinstance(value, Tensor) and value.numel() == count else value
    labels = plain_labels(list(values) if isinstance(values, tuple) else values, names)
    return labels if len(labels) == count and not any(map(is_image_path, labels)) else []


def class_names(dataset: Any) -> dict[Any, Sequence[str]]:
    """The names of classes that a data set knows: by key of its items, or by None for all."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        return {key: names for key, feature in features.items() if (names := getattr(feature, "names", None))}
    classes = getattr(dataset, "classes", None)
    return {None: classes} if isinstance(classes, Sequence) and not isinstance(classes, str) else {}


def _holds_images(value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        real = isinstance(value, Tensor) or value.dtype.kind == "f"
        return value.ndim >= 3 and len(value) > 0 and (real or value.dtype == np.uint8)
    pictures = isinstance(value, list | tuple) and len(value) > 0
    return pictures and (
        all(isinstance(part, Image.Image) for part in value)
        or all(isinstance(part, Tensor) and part.ndim == 3 for part in value)
    )


def _is_ambiguous(content: Any) -> bool:
    """Whether a batch is a list of tensors of three axes, as several inputs (N, F, T) are too."""
    return isinstance(content, list | tuple) and isinstance(content[0], Tensor)


def _plain(value: Any) -> _Images:
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        return [image_of_array(image) for image in value]
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
        return value.float() if value.dtype == torch.float64 else value
    if isinstance(value, Tensor):
        require_dense(value, "it", ImageError)
        # Subclasses with metadata (MONAI, torchvision) would carry it into the models.
        return value if type(value) is Tensor else value.as_subclass(Tensor)
    return list(value)
