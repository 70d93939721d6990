"""Objects that the items of a data set hold beside their images, as object detection writes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rsm_probe.checks import brief
from rsm_probe.errors import ImageError
from rsm_probe.sources.images.contents.dataset_items import Key, Path, described, entry, path_of
from rsm_probe.sources.images.contents.read_once import ReadOnce
from rsm_probe.sources.images.objects.annotation import Located, annotation
from rsm_probe.sources.images.objects.masks import box_of_segmentation

# Names of the boxes and of the classes in a target. `boxes` are corners, as in torchvision's detectors, and `bbox` a
# corner with a size, as in COCO.
_BOXES = {"boxes": "xyxy", "bbox": "xywh", "bboxes": "xywh"}
_CLASSES = ("labels", "label", "category_id", "category", "categories", "category_ids", "class_labels", "classes")
# How four numbers give the corners of a box.
_CORNERS: dict[str, Callable[[float, float, float, float], tuple[float, float, float, float]]] = {
    "xyxy": lambda left, top, right, bottom: (left, top, right, bottom),
    "xywh": lambda left, top, width, height: (left, top, left + width, top + height),
    "cxcywh": lambda x, y, width, height: (x - width / 2, y - height / 2, x + width / 2, y + height / 2),
}
BOX_FORMATS = tuple(_CORNERS)


class ItemObjects(ReadOnce[Mapping[str, Any]]):
    """Annotations that the items of a data set hold beside their images."""


def item_objects(
    dataset: Any,
    items: Sequence[Any],
    target_key: Key | None = None,
    boxes: str | None = None,
    classes: Any = None,
) -> ItemObjects | None:
    """The annotations of a data set of object detection; None if some of its items hold no objects.

    Args:
        dataset: the data set.
        items: some of its items, by which it is recognised.
        target_key: name or index of the objects within an item; None to recognise it.
        boxes: format of the boxes, one of `BOX_FORMATS`; None for what their name says.
        classes: names of the classes, by number; None for those that the data set knows.
    """
    path = None if target_key is None else path_of(target_key)
    if path is None:
        paths = [target for item in items for target in _target_paths(item)]
        if not paths:
            return None
        path = paths[0]
    names = classes_of_dataset(dataset) if classes is None else classes

    def note(index: int) -> dict[str, Any]:
        target = entry(dataset[index], path, "target_key")
        try:
            return annotation(located(target, boxes, names))
        except (ValueError, TypeError, LookupError) as error:
            raise ImageError(f"item {index} of {type(dataset).__name__}: {error}") from error

    return ItemObjects(len(dataset), note)


def _target_paths(item: Any, depth: int = 2) -> list[Path]:
    """Where the objects of an item may be."""
    if _is_target(item):
        return [()]
    entries: Any = ()
    if isinstance(item, Mapping):
        entries = item.items()
    elif isinstance(item, tuple | list):
        entries = enumerate(item)
    return [(key, *path) for key, value in entries if depth for path in _target_paths(value, depth - 1)]


def _is_target(value: Any) -> bool:
    """Whether a value holds objects: boxes beside classes, or a list of objects with a class and a box or mask."""
    if isinstance(value, Mapping):
        return _first(value, _BOXES) is not None and _first(value, _CLASSES) is not None
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(v, Mapping) and ("segmentation" in v or _is_target(v)) for v in value)


def located(target: Any, boxes: str | None, names: Any) -> list[Located]:
    """The class and box of each object of a target.

    Args:
        target: a mapping of boxes and classes, as torchvision's detectors and Hugging Face's data sets have them, or a
            list of objects, as in COCO. None or an empty list is for no object.
        boxes: see `item_objects`.
        names: names of the classes by number, as a mapping or sequence; None for the numbers.

    Raises:
        ValueError: it is neither, or a box is not four finite numbers in the right order.
    """
    if target is None or (isinstance(target, list | tuple) and not target):
        return []
    if isinstance(target, Mapping):
        key, kinds = _first(target, _BOXES), _first(target, _CLASSES)
        if key is None or kinds is None:
            raise ValueError(f"found {described(target)}, without boxes ({', '.join(_BOXES)}) beside classes")
        several, classes = _plain(target[key]), _plain(target[kinds])
        if len(several) != len(classes):
            raise ValueError(f"{len(several)} {key} for {len(classes)} {kinds}")
        own = getattr(getattr(target[key], "format", None), "value", _BOXES[key])
        form = boxes or str(own).lower()
        return [(_named(kind, names), _corners(box, form)) for kind, box in zip(classes, several, strict=True)]
    if not isinstance(target, list | tuple):
        raise ValueError(f"found {described(target)}, which is neither a mapping of boxes nor a list of objects")
    return [_object(item, boxes, names) for item in target if not item.get("iscrowd")]


def _object(item: Mapping[str, Any], boxes: str | None, names: Any) -> Located:
    key, kind = _first(item, _BOXES), _first(item, _CLASSES)
    if kind is None:
        raise ValueError(f"found {described(item)}, without a class ({', '.join(_CLASSES)})")
    box = None if key is None or item[key] is None else _plain(item[key])
    if box:
        assert key is not None
        return _named(item[kind], names), _corners(box, boxes or _BOXES[key])
    return _named(item[kind], names), box_of_segmentation(item["segmentation"]) if item.get("segmentation") else None


def _corners(box: Any, form: str) -> tuple[float, float, float, float]:
    if form not in _CORNERS:
        raise ValueError(f"unknown format of boxes {form!r} (known: {', '.join(_CORNERS)})")
    if len(box) != 4 or not all(math.isfinite(value) for value in box):
        raise ValueError(f"the box {brief(box)} is not four finite numbers")
    left, top, right, bottom = _CORNERS[form](*box)
    if right < left or bottom < top:
        raise ValueError(
            f"the box {brief(box)} ends before it begins, read as {form}; say its format, as in "
            f"rsm_probe.sources.from_detections(data, boxes='xywh'), one of {', '.join(_CORNERS)}"
        )
    return left, top, right, bottom


def _named(kind: Any, names: Any) -> str:
    """The name of a class."""
    value = _plain(kind)
    if isinstance(names, Mapping):
        return str(names.get(value, value))
    known = isinstance(names, Sequence) and isinstance(value, int) and 0 <= value < len(names)
    return str(names[value] if known else value)


def _plain(value: Any) -> Any:
    """A tensor or array as numbers or lists of these."""
    return value.tolist() if hasattr(value, "tolist") else value


def _first(target: Mapping[Any, Any], names: Any) -> str | None:
    return next((name for name in names if name in target), None)


def classes_of_dataset(dataset: Any) -> Any:
    """Names of the classes of objects, by number, as far as a data set knows them; None if it does not."""
    while hasattr(dataset, "dataset") and not hasattr(dataset, "coco"):
        dataset = dataset.dataset  # of a subset
    if (listing := getattr(getattr(dataset, "coco", None), "cats", None)) is not None:  # torchvision's CocoDetection
        return {number: category["name"] for number, category in listing.items()}
    if (names := _names_in(getattr(dataset, "features", None))) is not None:  # Hugging Face's data sets
        return names
    return next((names for key in ("categories", "classes") if (names := getattr(dataset, key, None))), None)


def _names_in(features: Any, below: bool = False) -> Any:
    """The names of a class within features, below the objects."""
    if below and (names := getattr(features, "names", None)):
        return names
    inner = getattr(features, "feature", features)  # of a list
    if inner is not features:
        return _names_in(inner, below)
    for key, feature in features.items() if isinstance(features, Mapping) else ():
        # Classes of whole images are not those of objects.
        if (not below or key in _CLASSES) and (names := _names_in(feature, below or key not in _CLASSES)) is not None:
            return names
    return None
