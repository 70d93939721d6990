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

# At most this many entries of a tuple or keys of a mapping are listed in a message.
_LISTED = 6


def image_of(item: Any) -> Image.Image | Tensor:
    """Extract the image from an item: the item itself, or the first entry of a tuple or list.

    Raises:
        ImageError: the item contains no image; the message describes it and says how to read it.
    """
    first = item[0] if isinstance(item, tuple | list) and item else item
    if isinstance(first, Image.Image):
        return first
    if isinstance(first, Tensor):
        require_dense(first, "it", ImageError)
        if first.ndim >= 3 and first.numel():
            return first
    raise ImageError(
        f"found {_described(item)}, which is neither a PIL image, nor a tensor (C, H, W) that is ready for the model, "
        f"nor a tuple that begins with one; give rsm_probe.sources.ImageSet(name, ids, load), where load returns image "
        f"number k, as in lambda k: {_expression(item, 'data[k]') or '...'}"
    )


def _described(item: Any) -> str:
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
        if item.dtype == np.uint8 and (item.ndim == 2 or (item.ndim == 3 and item.shape[2] in (3, 4))):
            return f"PIL.Image.fromarray({data})"
        return f"torch.as_tensor({data})" if item.ndim >= 3 and item.dtype.kind in "fiu" else None
    if isinstance(item, Tensor) and item.ndim >= 2 and item.numel():
        return data if item.ndim >= 3 else f"{data}[None]"
    return None


def labels_of(dataset: Any) -> list[str]:
    """Collect the labels of a data set without reading its items.

    They come from `targets` or `labels` of torchvision's data sets (named by `classes`), the second tensor of a
    `TensorDataset` if it holds one whole number per item, the parts of a `Subset` or `ConcatDataset`, or a list of
    pairs.

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
        return [str(int(number)) for tensor in dataset.tensors[1:2] if _is_labels(tensor) for number in tensor]
    if isinstance(dataset, list | tuple):
        pairs = all(isinstance(item, tuple | list) and len(item) == 2 for item in dataset)
        return _plain([item[1] for item in dataset], None) if pairs else []
    for name in ("targets", "labels"):
        labels = _plain(getattr(dataset, name, None), getattr(dataset, "classes", None))
        if labels and len(labels) == len(dataset):
            return labels
    return []


def _is_labels(tensor: Tensor) -> bool:
    return tensor.ndim == 1 and not tensor.is_floating_point() and not tensor.is_complex()


def _plain(targets: Any, classes: Any) -> list[str]:
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
