"""What the items of a data set hold: the image of each, and the labels that are known without reading any."""

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

# Entries of a tuple or keys of a mapping that a message lists.
_LISTED = 6


def image_of(item: Any) -> Image.Image | Tensor:
    """The image of an item: the item itself, or the first entry of a tuple or list.

    Raises:
        ImageError: it is something else; the message says what, and what reads it.
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
        f"nor a tuple that begins with one; {_way_out(item)}"
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


def _way_out(item: Any) -> str:
    """What to write so that such items are read."""
    reading = _reading(item, "data[k]") or "..."
    return (
        "give rsm_probe.sources.ImageSet(name, ids, load), where load makes an image of number k, as in "
        f"lambda k: {reading}"
    )


def _reading(item: Any, said: str) -> str | None:
    """The expression that makes an image of an item, or None where nothing does."""
    if isinstance(item, Image.Image):
        return said
    if isinstance(item, Mapping | tuple | list):
        # Of all that could be images, pictures come before text and numbers.
        parts = list(item.items() if isinstance(item, Mapping) else enumerate(item))
        for kinds in (Image.Image, Tensor | np.ndarray, bytes | str | PurePath | Mapping | tuple | list):
            for key, part in parts:
                reading = _reading(part, f"{said}[{key!r}]") if isinstance(part, kinds) else None
                if reading is not None:
                    return reading
        return None
    if isinstance(item, str | PurePath):
        return f"PIL.Image.open({said})"
    if isinstance(item, bytes | bytearray):
        return f"PIL.Image.open(io.BytesIO({said}))"
    if isinstance(item, np.ndarray):
        if item.dtype == np.uint8 and (item.ndim == 2 or (item.ndim == 3 and item.shape[2] in (3, 4))):
            return f"PIL.Image.fromarray({said})"
        return f"torch.as_tensor({said})" if item.ndim >= 3 and item.dtype.kind in "fiu" else None
    if isinstance(item, Tensor) and item.ndim >= 2 and item.numel():
        return said if item.ndim >= 3 else f"{said}[None]"
    return None


def labels_of(dataset: Any) -> list[str]:
    """A label for each item, "" where none is known without reading items; [] where that is so for all.

    Known are `targets` or `labels` of torchvision's data sets (with `classes` as their names), the second tensor of a
    `TensorDataset` if it holds one whole number per item, those of the parts of `Subset` and `ConcatDataset`, and those
    of pairs in a list.
    """
    if isinstance(dataset, Subset):
        own = labels_of(dataset.dataset)
        return [own[int(index)] for index in dataset.indices] if own else []
    if isinstance(dataset, ConcatDataset):
        parts = [(labels_of(part), len(part)) for part in dataset.datasets]  # type: ignore[arg-type]
        return [label for own, count in parts for label in own or [""] * count] if any(own for own, _ in parts) else []
    if isinstance(dataset, TensorDataset):
        second = dataset.tensors[1] if len(dataset.tensors) > 1 else None
        whole = second is not None and not second.is_floating_point() and not second.is_complex()
        return [str(int(number)) for number in second] if second is not None and whole and second.ndim == 1 else []
    if isinstance(dataset, list | tuple):
        pairs = all(isinstance(item, tuple | list) and len(item) == 2 for item in dataset)
        return _plain([item[1] for item in dataset], None) if pairs else []
    for name in ("targets", "labels"):
        labels = _plain(getattr(dataset, name, None), getattr(dataset, "classes", None))
        if labels and len(labels) == len(dataset):
            return labels
    return []


def _plain(targets: Any, classes: Any) -> list[str]:
    """Targets as text; [] unless there is one whole number, number or text for each item."""
    if isinstance(targets, Tensor | np.ndarray):
        if targets.ndim != 1 or (isinstance(targets, Tensor) and targets.layout != torch.strided):
            return []
        targets = targets.tolist()
    if isinstance(targets, str | bytes) or not isinstance(targets, Sequence):
        return []
    values = [value.item() if isinstance(value, Tensor | np.generic) and not value.ndim else value for value in targets]
    if not all(isinstance(value, str | int | float) for value in values):
        return []
    named = classes if isinstance(classes, Sequence) and not isinstance(classes, str) else ()
    return [str(named[value]) if isinstance(value, int) and 0 <= value < len(named) else str(value) for value in values]
