"""The objects in images as a model sees them: those that its resize and crop cut away do not count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rsm_probe.checks import brief
from rsm_probe.errors import ModelError
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.view.region import Region
from rsm_probe.sources.models.view.views import ModelView

# What rounding may take from a share.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class SeenObjects:
    """The objects in the images of a set, as a model sees them.

    Attributes:
        images: the images, with the annotations that hold only the objects that count.
        objects: number of objects in all images.
        left_out: number of those that the model does not see.
        cut: number of images of which it does not see all objects.
        unknown: why it is not known what the model sees of an image, with the first such image, so that all of its
            objects count; "" where it is known of all.
    """

    images: ImageSet
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
    view, notes, unknown = ModelView(model), list[Mapping[str, Any]](), list[str]()
    left_out = cut = 0
    for index, note in enumerate(images.annotations):
        hidden = list[Any]()
        if least > 0 and note.get("boxes"):
            try:
                region, whole = view.of_image(images, index)
                hidden = [box for box in note["boxes"] if not _counts(box[1:], region, whole, least)]
            except ModelError as error:
                unknown.append(f"{brief(images.ids[index])}: {error}")
        notes.append(_without(note, hidden) if hidden else note)
        left_out, cut = left_out + len(hidden), cut + bool(hidden)
    total = sum(int(sum(note["counts"].values())) for note in images.annotations)
    more = f", and {len(unknown) - 1} more images" if len(unknown) > 1 else ""
    seen = images.changed(annotations=notes, origin=images.origin)
    return SeenObjects(seen, total, left_out, cut, f"{unknown[0]}{more}" if unknown else "")


def _counts(box: Any, region: Region, whole: Region, least: float) -> bool:
    return region.share(whole.cut(box)) >= least - _ROUNDING


def _without(note: Mapping[str, Any], hidden: list[Any]) -> dict[str, Any]:
    """The annotation without some of its boxes."""
    counts = Counter({name: count for name, count in note["counts"].items()})
    counts.subtract(Counter(str(box[0]) for box in hidden))
    return {
        **note,
        "counts": {name: count for name, count in counts.items() if count > 0},
        "boxes": [box for box in note["boxes"] if box not in hidden],
    }
