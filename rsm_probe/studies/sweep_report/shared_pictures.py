"""Which images are parts of one photograph, or frames of one scene or video, as their image set declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.objects.item_objects import ItemObjects


@dataclass(frozen=True)
class SharedPictures:
    """The picture that each image of a set is a part of.

    Attributes:
        kind: what they are: "photograph", "scene" or "video"; "" if the set declares none, or no two images share one.
        composition: the images in words, such as "60 crops of 18 photographs"; "" as above.
        picture_of: id of an image -> name of its picture.
    """

    kind: str = ""
    composition: str = ""
    picture_of: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, images: Any) -> SharedPictures:
        """Read the annotations of an image set; a loader, and items that would have to be read again, declare none.

        A `box` says that an image is cut from the photograph that is its label; `scene` and `video` are names.
        """
        if not isinstance(images, ImageSet) or isinstance(images.annotations, ItemObjects) or not images.annotations:
            return cls()
        notes = images.annotations
        for kind, part, key in (("photograph", "crops", "box"), ("scene", "frames", "scene"),
                                ("video", "frames", "video")):  # fmt: skip
            if all(note.get(key) is not None for note in notes):
                names = images.labels if key == "box" else [str(note[key]) for note in notes]
                count, pictures = len(images), len(set(names))
                if pictures < count:
                    words = f"{count} {part} of {pictures} {kind}{'s' if pictures > 1 else ''}"
                    return cls(kind, words, dict(zip(images.ids, names, strict=True)))
        return cls()

    def of_images(self, ids: Sequence[str]) -> list[str]:
        """The pictures of some images; [] where none are declared."""
        return [self.picture_of[name] for name in ids] if self.picture_of else []
