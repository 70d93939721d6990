"""Items of a data set: the image in each, and labels that are known without reading items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from rsm_probe.arrays import require_dense
from rsm_probe.checks import brief
from rsm_probe.errors import ImageError
from rsm_probe.sources.images.pixels import IMAGE_SUFFIXES, image_of_array, read_rgb

# Names of images and labels in items that are mappings, as in Hugging Face's data sets, MONAI and WebDataset.
IMAGE_KEYS = ("image", "img", "pixel_values", "images", "pixels", "inputs", "input", "x", "jpg", "jpeg", "png", "webp")
LABEL_KEYS = ("label", "labels", "target", "targets", "fine_label", "class", "category", "y", "cls")
# At most this many entries of a tuple or keys of a mapping are listed in a message.
_LISTED = 6


def image_of(item: Any, key: str | int | None = None) -> Image.Image | Tensor:
    """Extract the image from an item of a data set.

    An image is a PIL image, a tensor of at least three axes, an array (see `image_of_array`), or the path of an image
    file. In a tuple or list it is the first of these, in a mapping the one under a name such as `image`, `img` or
    `pixel_values`, or the only one.

    Args:
        item: an image, or a tuple, list or mapping that contains one.
        key: name or index of the image within the item, if it cannot be recognised.

    Raises:
        ImageError: the item contains no image, or several; the message describes it and says how to read it.
    """
    if key is not None:
        try:
            value = item[key]
        except (LookupError, TypeError) as error:
            raise ImageError(f"found {described(item)}, without image_key={key!r}") from error
        if not (is_pixels(value) or isinstance(value, str | PurePath)):
            raise ImageError(f"image_key={key!r} names {described(value)}, which is not an image")
        return _as_image(value)
    if is_pixels(item) or is_image_path(item):
        return _as_image(item)
    parts: dict[Any, Any] = {}
    if isinstance(item, Mapping):
        parts = image_parts(item)
        if len(parts) > 1:
            keys = ", ".join(repr(name) for name in parts)
            raise ImageError(
                f"found {described(item)}, of which {keys} may be the image; name one, as in "
                f"rsm_probe.sources.as_images(data, image_key={next(iter(parts))!r})"
            )
    elif isinstance(item, tuple | list):
        parts = dict(enumerate(filter(is_pixels, item))) or dict(enumerate(filter(is_image_path, item)))
    if parts:
        return _as_image(next(iter(parts.values())))
    raise ImageError(
        f"found {described(item)}, which is neither a PIL image, nor a tensor (C, H, W) that is ready for the model, "
        f"nor a tuple or mapping that contains one; give rsm_probe.sources.ImageSet(name, ids, load), where load "
        f"returns image number k, as in lambda k: {_expression(item, 'data[k]') or '...'}"
    )


def image_parts(item: Mapping[Any, Any]) -> dict[Any, Any]:
    """The entries of a mapping that may be its image: those of known names, else all that hold pixels."""
    named = {key: item[key] for key in IMAGE_KEYS if key in item}
    named = {key: value for key, value in named.items() if is_pixels(value) or is_image_path(value)}
    return named or {key: value for key, value in item.items() if is_pixels(value)}


def is_pixels(value: Any) -> bool:
    """Whether a value may be an image: a PIL image, or a tensor or array whose axes can be those of one."""
    if isinstance(value, Image.Image):
        return True
    if isinstance(value, Tensor):
        return value.ndim >= 3 and value.numel() > 0
    if not isinstance(value, np.ndarray) or not value.size:
        return False
    return value.ndim >= 3 if value.dtype.kind == "f" else value.dtype == np.uint8 and value.ndim in (2, 3)


def is_image_path(value: Any) -> bool:
    """Whether a value is the path of an image file, judging by its name."""
    return isinstance(value, str | PurePath) and PurePath(value).suffix.lower() in IMAGE_SUFFIXES


def _as_image(value: Any) -> Image.Image | Tensor:
    if isinstance(value, str | PurePath):
        return read_rgb(value)
    if isinstance(value, np.ndarray):
        return image_of_array(value)
    if isinstance(value, Tensor):
        require_dense(value, "it", ImageError)
        # Subclasses with metadata (MONAI, torchvision) would carry it into the models.
        return value if type(value) is Tensor else value.as_subclass(Tensor)
    return value


def described(item: Any) -> str:
    """Describe an item or a batch in a message."""
    if isinstance(item, Mapping):
        keys = [brief(key, 40) for key in list(item)[:_LISTED]]
        return f"a mapping with the keys {', '.join(keys)}{', ...' if len(item) > _LISTED else ''}"
    if isinstance(item, tuple | list):
        kinds = [type(part).__name__ for part in item[:_LISTED]]
        return f"a {type(item).__name__} ({', '.join(kinds)}{', ...' if len(item) > _LISTED else ''})"
    if isinstance(item, Tensor | np.ndarray):
        return f"{type(item).__name__} of shape {tuple(item.shape)} and dtype {item.dtype}"
    if item is None:
        return "None"
    return f"{type(item).__name__} {brief(item, 40)}" if isinstance(item, str | PurePath | int) else type(item).__name__


def _expression(item: Any, data: str) -> str | None:
    """The Python expression that turns the item `data` into an image, or None if there is none."""
    if isinstance(item, Image.Image):
        return data
    if isinstance(item, Mapping | tuple | list):
        # Prefer images to arrays, and arrays to texts and nested items.
        parts = list(item.items() if isinstance(item, Mapping) else enumerate(item))
        kinds = (Image.Image, Tensor | np.ndarray, bytes | str | PurePath | Mapping | tuple | list)
        expressions = (
            _expression(part, f"{data}[{key!r}]") for kind in kinds for key, part in parts if isinstance(part, kind)
        )
        return next(filter(None, expressions), None)
    if isinstance(item, str | PurePath):
        return f"PIL.Image.open({data})"
    if isinstance(item, bytes | bytearray):
        return f"PIL.Image.open(io.BytesIO({data}))"
    if isinstance(item, np.ndarray):
        return f"torch.as_tensor({data})" if item.ndim >= 3 and item.dtype.kind in "fiu" else None
    if isinstance(item, Tensor) and item.ndim >= 2 and item.numel():
        return data if item.ndim >= 3 else f"{data}[None]"
    return None


def labels_of(dataset: Any) -> list[str]:
    """Collect the labels of a data set without reading its items.

    They come from `targets` or `labels` of torchvision's data sets (named by `classes`), the second tensor of a
    `TensorDataset` (or the first, if the second holds the images) if it holds one whole number per item, the parts of
    a `Subset` or `ConcatDataset`, a column such as `label` of Hugging Face's data sets, or a list of pairs or mappings.

    Returns:
        One label per item, "" where it is unknown; [] if none is known.
    """
    if isinstance(dataset, Subset):
        whole = labels_of(dataset.dataset)
        return [whole[int(index)] for index in dataset.indices] if whole else []
    if isinstance(dataset, ConcatDataset):
        parts = [(labels_of(part), len(part)) for part in dataset.datasets]  # type: ignore[arg-type]
        any_labels = any(labels for labels, _ in parts)
        return [label for labels, count in parts for label in labels or [""] * count] if any_labels else []
    if isinstance(dataset, TensorDataset):
        tensors = dataset.tensors[1:2] if is_pixels(dataset.tensors[0]) else dataset.tensors[:1]
        return [str(int(number)) for tensor in tensors if _is_labels(tensor) for number in tensor]
    if isinstance(dataset, list | tuple):
        return _labels_of_items(dataset)
    features, columns = getattr(dataset, "features", None), getattr(dataset, "column_names", None)
    if isinstance(features, Mapping) and isinstance(columns, list) and hasattr(dataset, "with_format"):
        known = (key for key in LABEL_KEYS if key in columns and key in features)
        # Without its format, because a transform of the data set may expect whole items.
        values = {key: list(dataset.with_format(None)[key]) for key in known}
        by_key = (plain_labels(column, getattr(features[key], "names", None)) for key, column in values.items())
        return next(filter(None, by_key), [])
    for name in ("targets", "labels"):
        labels = plain_labels(getattr(dataset, name, None), getattr(dataset, "classes", None))
        if labels and len(labels) == len(dataset):
            return labels
    return []


def _labels_of_items(items: Sequence[Any]) -> list[str]:
    """The labels in a list of pairs or of mappings; [] if they are not known for all."""
    if items and all(isinstance(item, Mapping) for item in items):
        keys: list[Any] = [key for key in LABEL_KEYS if all(key in item for item in items)]
    else:
        pairs = all(isinstance(item, tuple | list) and len(item) == 2 for item in items)
        keys = [1, 0] if pairs else []
    columns = ([item[key] for item in items] for key in keys)
    return next(
        filter(None, (plain_labels(values, None) for values in columns if not any(map(is_image_path, values)))), []
    )


def _is_labels(tensor: Tensor) -> bool:
    return tensor.ndim == 1 and not tensor.is_floating_point() and not tensor.is_complex()


def as_texts(labels: Any) -> Any:
    """Labels that are whole numbers (a tensor, an array, a list) as text; all others as they are."""
    values = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else labels
    if isinstance(values, Sequence) and values and all(isinstance(v, int | np.integer) for v in values):
        return [str(value) for value in values]
    return labels


def plain_labels(targets: Any, classes: Any) -> list[str]:
    """Convert targets to text; [] unless there is one number or text per item."""
    if isinstance(targets, Tensor | np.ndarray):
        if targets.ndim != 1 or (isinstance(targets, Tensor) and targets.layout != torch.strided):
            return []
        targets = targets.tolist()
    if isinstance(targets, str | bytes) or not isinstance(targets, Sequence):
        return []
    values = [value.item() if isinstance(value, Tensor | np.generic) and not value.ndim else value for value in targets]
    if not all(isinstance(value, str | int | float) for value in values):
        return []
    names = classes if isinstance(classes, Sequence) and not isinstance(classes, str) else ()
    return [str(names[value]) if isinstance(value, int) and 0 <= value < len(names) else str(value) for value in values]
