"""The image sets that configurations can name, one line each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rsm_probe.sources.images.embedded.photos import photos
from rsm_probe.sources.images.embedded.scenes import cluttered, digits, scenes
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.objects.annotated import cityscapes, egoobjects
from rsm_probe.sources.images.objects.coco import coco
from rsm_probe.sources.images.objects.composed import composed
from rsm_probe.sources.images.published import cifar100, image_folder, resized


@dataclass(frozen=True)
class NamedImageSet:
    """A function that makes an image set, with what studies and recipes need to know about it.

    The parameters of the function decide which keys of a configuration apply: `split`, `size`, `count`, `seed`,
    `frames`, `root`, `annotations`, `strict`, and those of `composed` and `coco`. If `split` has no default, it must be
    "train" or "test". If the function does not take `count` or `size`, images are sampled or resized afterwards.

    Attributes:
        make: the function.
        questions: number of questions that the targets answer; 0 if the images have no targets, so that recipes
            cannot train on them.
        cut_to_size: whether images are cut from larger ones, and so are sharp in any size.
        counts_all: whether retrieval counts all objects unless it is told otherwise, as earlier versions and the paper
            did, and not only those that a model sees.
    """

    make: Callable[..., ImageSet]
    questions: int = 0
    cut_to_size: bool = False
    counts_all: bool = False

    def takes(self, key: str) -> bool:
        """Whether a key of a configuration applies to this set."""
        return key in inspect.signature(self.make).parameters

    def requires(self, key: str) -> bool:
        """Whether a key applies and has no default."""
        return self.takes(key) and inspect.signature(self.make).parameters[key].default is inspect.Parameter.empty

    @property
    def on_disk(self) -> bool:
        """Whether images are read from files, which may be missing or broken."""
        return any(self.takes(key) for key in ("root", "path", "cutouts"))

    @property
    def drawn(self) -> bool:
        """Whether images are generated, as many as requested; other sets use all of their images by default."""
        return self.takes("count") and inspect.signature(self.make).parameters["count"].default is not None

    @property
    def trainable(self) -> bool:
        """Whether a recipe can train on the images."""
        return self.questions > 0 and self.takes("split")

    def load(self, *, size: int | None, count: int | None, seed: int, **options: Any) -> ImageSet:
        """Make the set, passing the options that apply to it.

        Args:
            size: edge in pixels; None for the set's own size.
            count: number of images; None for the set's own number.
            seed: seed of generating or sampling.
            options: further keys of a configuration; keys with the value None are left out.

        Raises:
            ImageError: an option is out of range, or files are missing or broken.
        """
        options |= {"size": size, "count": count, "seed": seed}
        images = self.make(**{key: value for key, value in options.items() if value is not None and self.takes(key)})
        if count is not None and not self.takes("count"):
            images = images.sample(count, seed)
        return images if size is None or self.takes("size") else resized(images, size)


IMAGE_SETS = {
    "digits": NamedImageSet(digits, questions=1),
    "scenes": NamedImageSet(scenes, questions=10, counts_all=True),
    "cluttered": NamedImageSet(cluttered, questions=1),
    "photos": NamedImageSet(photos, questions=1, cut_to_size=True),
    "composed": NamedImageSet(composed),
    "cifar100": NamedImageSet(cifar100, questions=1),
    "egoobjects": NamedImageSet(egoobjects, counts_all=True),
    "cityscapes": NamedImageSet(cityscapes),
    "coco": NamedImageSet(coco),
}
# Any other name is read as the path of a folder.
FOLDER = NamedImageSet(image_folder, questions=1)
# The sets that need no files: the name alone makes one.
EMBEDDED = {name: images.make for name, images in IMAGE_SETS.items() if not images.on_disk}


def named_images(name: str) -> NamedImageSet:
    """Look up the image set of a name; `FOLDER` if there is none."""
    return IMAGE_SETS.get(name, FOLDER)
