"""The objects in images as a model sees them: those that its resize and crop cut away do not count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsm_probe.checks import brief
from rsm_probe.errors import ModelError
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.view.views import ModelView

# What rounding may take from a share.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class SeenObjects:
    """The objects in the images of a set, as a model sees them.

    Attributes:
        images: the images, with the annotations that hold only the objects that count.
        hidden: whether the model does not see an object, for all boxes of all images in their order.
        objects: number of objects in all images.
        left_out: number of those that the model does not see.
        cut: number of images of which it does not see all objects.
        unknown: why it is not known what the model sees of an image, with the first such image, so that all of its
            objects count; "" where it is known of all.
    """

    images: ImageSet
    hidden: np.ndarray
    objects: int
    left_out: int
    cut: int
    unknown: str


def seen_objects(model: LoadedModel, images: ImageSet, least: float) -> SeenObjects:
    """Leave out the objects that a model does not see, because its preprocessing cuts them away.

    Objects without boxes count. Boxes are cut at the edges of their image before their share is measured.

    Args:
        model: the model.
        images: images whose annotations hold `counts` and, where they are known, `boxes` in pixels of the images.
        least: the least share of an object's box that must be seen for the object to count; 0 counts all.

    Raises:
        ImageError: an image whose size is not known cannot be loaded.
    """
    view, hidden, unknown = ModelView(model), list[np.ndarray](), list[str]()
    for index, note in enumerate(images.annotations):
        boxes = note.get("boxes", ())
        of_image = np.zeros(len(boxes), bool)
        if least > 0 and len(boxes):
            try:
                region, whole = view.of_image(images, index)
                shares = [region.share(whole.cut(box[1:])) for box in boxes]
                of_image = np.array(shares) < least - _ROUNDING
            except ModelError as error:
                unknown.append(f"{brief(images.ids[index])}: {error}")
        hidden.append(of_image)
    flat = np.concatenate([*hidden, np.zeros(0, bool)])
    more = f", and {len(unknown) - 1} more images" if len(unknown) > 1 else ""
    return SeenObjects(
        without_hidden(images, flat),
        flat,
        sum(int(sum(note["counts"].values())) for note in images.annotations),
        int(flat.sum()),
        sum(bool(of_image.any()) for of_image in hidden),
        f"{unknown[0]}{more}" if unknown else "",
    )


def without_hidden(images: ImageSet, hidden: np.ndarray) -> ImageSet:
    """The images with annotations that leave out some objects.

    Args:
        images: the images.
        hidden: see `SeenObjects`.
    """
    notes, begin = list[Mapping[str, Any]](), 0
    for note in images.annotations:
        of_image = hidden[begin : begin + len(note.get("boxes", ()))]
        notes.append(_without(note, of_image) if of_image.any() else note)
        begin += len(of_image)
    return images.changed(annotations=notes, origin=images.origin)


def _without(note: Mapping[str, Any], hidden: np.ndarray) -> dict[str, Any]:
    """The annotation without some of its boxes."""
    counts = Counter({name: count for name, count in note["counts"].items()})
    counts.subtract(Counter(str(box[0]) for box, away in zip(note["boxes"], hidden, strict=True) if away))
    return {
        **note,
        "counts": {name: count for name, count in counts.items() if count > 0},
        "boxes": [box for box, away in zip(note["boxes"], hidden, strict=True) if not away],
    }
