"""Labels of data sets: those that are known without reading items, and those that items hold beside their images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from rsm_probe.errors import ImageError
from rsm_probe.sources.images.contents.dataset_items import (
    LABEL_KEYS,
    LISTED,
    Key,
    Path,
    described,
    entry,
    is_image_path,
    is_pixels,
    is_whole,
    path_of,
    paths_in_item,
    shown_key,
    unclear,
)
from rsm_probe.sources.images.contents.read_once import ReadOnce


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


class ItemLabels(ReadOnce[str]):
    """Labels that the items of a data set hold beside their images."""

    def see(self, index: int, label: str) -> None:
        """Remember the label of an item that was read for its image."""
        self._seen[index] = label


def label_paths(content: Any, images: Path, texts: Callable[[Any], Sequence[str]]) -> dict[Path, list[str]]:
    """Where the labels of an item or batch may be, best first, with their texts.

    They are the entries of known names of a mapping. In a tuple, they come after the images rather than before, where
    numbers of the images are.

    Args:
        content: the item or batch.
        images: the path of its images.
        texts: the labels that a value holds, if it may hold them.
    """
    candidates: dict[Path, list[str]] = {}
    if isinstance(content, Mapping):
        keys: list[Any] = [key for key in LABEL_KEYS if key in content and (key,) != images]
    elif isinstance(content, tuple | list) and images:
        first = int(images[0])
        keys = [*range(first + 1, len(content)), *range(first), *([first] if len(images) > 1 else [])]
    else:
        keys = []
    for key in keys:
        if labels := list(texts(content[key])):
            candidates[key,] = labels
        elif isinstance(content[key], Mapping):
            inner = images[1:] if images[:1] == (key,) else ()
            candidates |= {(key, *path): labels for path, labels in label_paths(content[key], inner, texts).items()}
    if not candidates and isinstance(content, Mapping) and images[1:]:  # beside an image in a nested mapping
        beside = label_paths(content[images[0]], images[1:], texts)
        candidates = {(images[0], *path): labels for path, labels in beside.items()}
    return candidates


def choose_labels(candidates: Mapping[Path, Sequence[str]], numbers: Sequence[int], what: str) -> tuple[Path, str]:
    """Choose which entry of an item or batch holds the labels.

    Args:
        candidates: see `label_paths`; texts of the same images, of at least one entry.
        numbers: the positions of these images.
        what: "data" or "loader".

    Returns:
        The path of the entry, and what to say to the user where it may be another, or "".
    """
    counting = [str(number) for number in numbers]
    unlike = [path for path, texts in candidates.items() if len(counting) < 2 or list(texts) != counting]
    paths = unlike or list(candidates)
    # Names of images differ, classes repeat.
    paths.sort(key=lambda path: len(counting) > 2 and len(set(candidates[path])) == len(counting))
    if len(paths) < 2 and (unlike or isinstance(paths[0][-1], str)):
        return paths[0], ""
    others = "".join(f", or {shown_key(path)}" for path in paths[1:LISTED])
    doubt = f"they may be entry {others[5:]}" if others else "it counts the images"
    return paths[0], f"entry {shown_key(paths[0])} is taken for the labels, but {doubt}; {other_labels(what)}"


def other_labels(what: str) -> str:
    """How to say which labels are meant, of "data" or a "loader"."""
    return (
        f"if they are not meant, name their entry by rsm_probe.sources.as_images({what}, label_key=...), or give "
        f"labels=, where labels=[] is for none"
    )


def label_texts(value: Any) -> list[str]:
    """The label that an entry of an item holds, as text: a whole number or text; [] if it holds none."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        plain = value.size if isinstance(value, np.ndarray | np.generic) else value.numel()
        whole = is_whole(value) if isinstance(value, Tensor) else value.dtype.kind in "iubU"
        return [str(value.item())] if plain == 1 and value.ndim < 2 and whole else []
    if isinstance(value, str):
        return [] if is_image_path(value) else [value]
    return [str(value)] if isinstance(value, int) else []


def first_and_last(dataset: Any) -> list[Any]:
    """The first and the last item of a data set, by which it is recognised; [] if they cannot be read."""
    try:
        return [dataset[number] for number in sorted({0, len(dataset) - 1})]
    except Exception:  # noqa: BLE001 - a user's data set may raise anything, and says so when the image is loaded
        return []


def label_reader(
    dataset: Any, items: Sequence[Any], image_key: Key | None, label_key: Key | None
) -> Callable[[Any], str] | None:
    """How to read the label of an item of a data set, judging by its first and last; None if they hold none.

    Args:
        dataset: the data set.
        items: see `first_and_last`.
        image_key: see `image_of`.
        label_key: the entry that holds the label, if it is known; () if labels are not wanted.

    Raises:
        ImageError: `label_key` names no label.

    Warns:
        UserWarning: which entry is taken for the image or the labels, if this is unclear.
    """
    numbers = sorted({0, len(dataset) - 1})
    try:
        paths = paths_in_item(items[0])
    except Exception:  # noqa: BLE001 - so may its items
        return None
    if image_key is None and (remark := unclear(items[0], paths, "data")[1]):
        warnings.warn(f"{type(dataset).__name__}: {remark}", stacklevel=5)
    if label_key == ():
        return None
    if label_key is not None:
        path = path_of(label_key)
        if not label_texts(value := entry(items[0], path, "label_key")):
            raise ImageError(
                f"label_key={label_key!r} names {described(value)}, which is not a label (a whole number or text)"
            )
    else:
        images = (paths[0] if paths else ()) if image_key is None else path_of(image_key)
        candidates = label_paths(items[0], images, label_texts)
        both = {where: [text_at(item, where) for item in items] for where in candidates}
        both = {where: texts for where, texts in both.items() if all(texts)}
        if not both:
            return None
        path, doubt = choose_labels(both, numbers, "data")
        if doubt:
            warnings.warn(f"{type(dataset).__name__}: of {described(items[0])}, {doubt}", stacklevel=5)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    return lambda item: named_label(text_at(item, path), names)


def text_at(item: Any, path: Path) -> str:
    """The label in an entry of an item, "" if it holds none."""
    try:
        return next(iter(label_texts(entry(item, path, "label_key"))), "")
    except ImageError:
        return ""


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
    return [named_label(str(value), classes) if isinstance(value, int) else str(value) for value in values]


def named_label(text: str, classes: Any) -> str:
    """The name of a class that is given as a number, if its name is known."""
    names = classes if isinstance(classes, Sequence) and not isinstance(classes, str) else ()
    return str(names[int(text)]) if text.isdecimal() and int(text) < len(names) else text
