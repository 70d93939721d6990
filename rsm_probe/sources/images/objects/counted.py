"""What is known of the objects in images: numbers by class from annotations, or else one object per label."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rsm_probe.checks import brief
from rsm_probe.errors import ImageError
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.objects.annotation import require_box


def with_counts(images: ImageSet) -> ImageSet:
    """The images with the number of objects by class in every annotation.

    Images without annotations that have labels count as showing one object of the class that their label names.

    Args:
        images: images whose annotations hold `counts`, or images with labels.

    Raises:
        ImageError: neither is known for all images, or an annotation is malformed; the message names the image and
            says what to give.
    """
    if not any("counts" in note for note in images.annotations):
        return _by_label(images)
    for name, note in zip(images.ids, images.annotations, strict=True):
        _require_valid(f"{images.name}: the annotation of image {brief(name)}", note)
    return images


def require_objects(*sets: ImageSet) -> None:
    """Refuse images of which none shows an object.

    Raises:
        ImageError: all counts are empty.
    """
    if not any(note["counts"] for images in sets for note in images.annotations):
        raise ImageError(f"{sets[0].name} has no object in any image, so all images would score the same")


def _by_label(images: ImageSet) -> ImageSet:
    if any(note.get("boxes") for note in images.annotations):
        raise ImageError(
            f"{images.name}: its annotations hold boxes but no counts (class -> number of objects), of which the boxes "
            f"locate some or all; add counts to each annotation, {{}} for an image without objects"
        )
    labels = list(images.labels)
    if not any(labels):
        raise ImageError(
            f"{images.name} has no object annotations, and no labels in their place: retrieval needs images whose "
            f"annotations hold counts (scenes, composed, coco, egoobjects, cityscapes, or an ImageSet with "
            f"annotations=[{{'counts': {{'cup': 2}}}}, ...]), a data set of detections, or folders of classes"
        )
    if unknown := [name for name, label in zip(images.ids, labels, strict=True) if not label]:
        raise ImageError(
            f"{images.name}: {len(unknown)} of {len(images)} images have no label, first {brief(unknown[0])}, and no "
            f"image has an annotation; put each image into a folder of its class, or give labels="
        )
    notes = images.annotations or [{}] * len(images)
    return images.changed(
        annotations=[{**note, "counts": {label: 1}} for note, label in zip(notes, labels, strict=True)],
        origin=images.origin,
    )


def _require_valid(where: str, note: Mapping[str, Any]) -> None:
    counts = note.get("counts")
    if not isinstance(counts, Mapping):
        raise ImageError(f"{where} has no counts (class -> number of objects), found {brief(counts)}; {{}} is for none")
    for name, count in counts.items():
        number = isinstance(count, int | float) or hasattr(count, "__float__")
        if not isinstance(name, str) or not number or not math.isfinite(count) or count < 0:
            raise ImageError(f"{where} counts {brief(count)} objects of class {brief(name)}; give text -> a number")
    boxes = note.get("boxes", ())
    for box in boxes:
        require_box(where, box)
    if beyond := Counter(str(box[0]) for box in boxes) - Counter({str(name): int(n) for name, n in counts.items()}):
        name = next(iter(beyond))
        raise ImageError(
            f"{where} has more boxes of class {brief(name)} than its counts say ({counts.get(name, 0)}); each box is "
            f"one of the counted objects"
        )
