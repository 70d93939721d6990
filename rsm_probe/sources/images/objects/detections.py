"""Image sets of data sets for object detection, whose items hold boxes and classes beside their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rsm_probe.errors import ImageError, look_up
from rsm_probe.sources.images.any_images import from_dataset
from rsm_probe.sources.images.contents.dataset_items import Key
from rsm_probe.sources.images.contents.item_labels import first_and_last
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.objects.item_objects import BOX_FORMATS, item_objects


def from_detections(
    dataset: Any,
    *,
    boxes: str | None = None,
    classes: Mapping[Any, str] | Sequence[str] | None = None,
    image_key: Key | None = None,
    target_key: Key | None = None,
    name: str | None = None,
) -> ImageSet:
    """Make an image set with annotations from a data set for object detection.

    Items hold an image and its objects: a mapping of `boxes` and `labels` (torchvision's detectors) or of `bbox` and
    `category` (Hugging Face), or a list of objects with `bbox` and `category_id` (torchvision's `CocoDetection`).
    Crowds (`iscrowd`) are left out. Each annotation is read from its item when it is asked for, so boxes are those of
    the image that the item holds, after whatever transforms the data set applies to both.

    `rsm_probe.sources.as_images` recognises such data sets, too; this function takes what cannot be recognised.

    Args:
        dataset: the data set, with `__len__` and `__getitem__`.
        boxes: "xyxy" (left, top, right, bottom), "xywh" (left, top, width, height) or "cxcywh" (centre, width, height),
            in pixels. By default `boxes` are corners, unless they say otherwise, and `bbox` has a width and height.
        classes: names of the classes by number. By default those that the data set knows, else the numbers.
        image_key: name or index of the image within an item, if it cannot be recognised.
        target_key: the same of the objects.
        name: the name of the image set; the class of the data set by default.

    Raises:
        ImageError: the data set is empty, or no objects are recognised in its first and last item; give `target_key`.
            Items whose objects cannot be read raise it when their annotation is read.
    """
    if boxes is not None:
        look_up(boxes, dict.fromkeys(BOX_FORMATS, boxes), "format of boxes", ImageError)
    images = from_dataset(dataset, name, image_key=image_key, label_key=())
    notes = item_objects(dataset, first_and_last(dataset), target_key, boxes, classes)
    if notes is None:
        raise ImageError(
            f"{type(dataset).__name__}: no objects are recognised in its first and last item: a mapping of boxes and "
            f"labels, or a list of mappings with bbox and category_id; name the entry that holds them as target_key="
        )
    return images.changed(annotations=notes)
