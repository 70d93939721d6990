"""The image sets that configurations can name: one line each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rsm_probe.sources.images.annotated import cityscapes, egoobjects
from rsm_probe.sources.images.embedded.photos import photos
from rsm_probe.sources.images.embedded.scenes import cluttered, digits, scenes
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.published import cifar100, image_folder, resized


@dataclass(frozen=True)
class NamedImageSet:
    """A function that makes an image set, and what studies and recipes need to know about it.

    The function's parameters say which keys of a configuration it takes: `split`, `size`, `count`, `seed`, `frames`,
    `root`, `annotations`, `strict`. Without a default, `split` has to be train or test. A function that does not take
    `count` or `size` has its images sampled or resized afterwards.

    Attributes:
        make: the function.
        questions: how many questions the targets of the images answer; 0 where images have no targets, so that no
            recipe can train on them.
        cut_to_size: whether images are cut from larger ones and so come in any size without losing sharpness.
    """

    make: Callable[..., ImageSet]
    questions: int = 0
    cut_to_size: bool = False

    def takes(self, key: str) -> bool:
        """Whether a key of a configuration makes a difference to this set."""
        return key in inspect.signature(self.make).parameters

    def requires(self, key: str) -> bool:
        """Whether a key has no default."""
        return self.takes(key) and inspect.signature(self.make).parameters[key].default is inspect.Parameter.empty

    @property
    def on_disk(self) -> bool:
        """Whether images are read from files, which may be missing or broken."""
        return self.takes("root") or self.takes("path")

    @property
    def drawn(self) -> bool:
        """Whether there are as many images as one asks for; of the other sets, all are used by default."""
        return self.takes("count") and inspect.signature(self.make).parameters["count"].default is not None

    @property
    def trainable(self) -> bool:
        """Whether a recipe can train on the images."""
        return self.questions > 0 and self.takes("split")

    def load(self, *, size: int | None, count: int | None, seed: int, **options: Any) -> ImageSet:
        """Make the set, passing those options that it takes.

        Args:
            size: edge in pixels; None for the set's own.
            count: how many images; None for the set's own number.
            seed: of drawing or sampling.
            options: further keys of a configuration; None leaves a key out.

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
    "scenes": NamedImageSet(scenes, questions=10),
    "cluttered": NamedImageSet(cluttered, questions=1),
    "photos": NamedImageSet(photos, questions=1, cut_to_size=True),
    "cifar100": NamedImageSet(cifar100, questions=1),
    "egoobjects": NamedImageSet(egoobjects),
    "cityscapes": NamedImageSet(cityscapes),
}
# Any other name is the path of a folder.
FOLDER = NamedImageSet(image_folder, questions=1)
# Those that need no network and no files, so that a name is enough to make one.
EMBEDDED = {name: images.make for name, images in IMAGE_SETS.items() if not images.on_disk}


def named_images(name: str) -> NamedImageSet:
    """The image set of a name, or `FOLDER`."""
    return IMAGE_SETS.get(name, FOLDER)
