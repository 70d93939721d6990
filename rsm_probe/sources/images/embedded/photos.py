"""Crops of the 18 photographs that come with scikit-learn and scikit-image.

Images are cut when they are loaded. They depend only on the options and the index of the image.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from rsm_probe.errors import ImageError, look_up
from rsm_probe.sources.images.image_set import ImageSet, Targets
from rsm_probe.sources.images.limits import require_drawing

# The left share of each photograph, from which training crops come; test crops come from the rest.
_TRAINING_SHARE = 0.55
_SHORT_SIDE = 320
_PHOTOS = {
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
    "skimage": (
        "data",
        "astronaut.png brick.png camera.png cell.png chelsea.png coffee.png coins.png grass.png gravel.png "
        "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png page.png retina.jpg rocket.jpg",
    ),
}


def photos(split: str = "all", size: int = 64, count: int = 500, seed: int = 0) -> ImageSet:
    """Crop random squares from 18 photographs; the label is the photograph.

    Args:
        split: "train" crops the left 55 % of each photograph, "test" the rest, and "all" the whole.
        size: edge in pixels; crops of one to one and a half times this edge are downsampled to it.
        count: number of crops, spread evenly over the photographs.
        seed: seed of the crops; crop k of a seed does not depend on `count`.

    Raises:
        ImageError: the split is unknown, the crops are larger than its part of a photograph, or the size, count or
            seed is out of range.
    """
    require_drawing(size, count, seed)
    names = [name for _, files in _PHOTOS.values() for name in files.split()]
    boxes = [_photo_box(np.random.default_rng([seed, k]), names[k % len(names)], split, size) for k in range(count)]

    def load(index: int) -> Image.Image:
        crop = _photo(names[index % len(names)]).crop(boxes[index])
        return crop.resize((size, size), Image.Resampling.BICUBIC)

    labels = [Path(names[k % len(names)]).stem for k in range(count)]
    return ImageSet(
        "photos",
        [f"{label}-{seed}-{k:05d}" for k, label in enumerate(labels)],
        load,
        labels=labels,
        targets=Targets(np.arange(count)[:, None] % len(names), len(names)),
        annotations=[{"box": list(box)} for box in boxes],
        content=lambda: f"size={size} split={split}",
    ).made_by(photos, split=split, size=size, count=count, seed=seed)


@cache
def _photo(name: str) -> Image.Image:
    """Read a photograph from the package that ships it, as RGB with a short side of 320 pixels."""
    for package, (folder, files) in _PHOTOS.items():
        spec = find_spec(package)
        if name in files.split() and spec is not None and spec.origin is not None:
            with Image.open(Path(spec.origin).parent / folder / name) as opened:
                image = opened.convert("RGB")
            scale = _SHORT_SIDE / min(image.size)
            width, height = round(image.width * scale), round(image.height * scale)
            return image.resize((width, height), Image.Resampling.LANCZOS)
    raise ImageError(f"photograph {name!r} not found; install scikit-learn and scikit-image, which ship it")


def _photo_box(rng: np.random.Generator, name: str, split: str, size: int) -> tuple[int, int, int, int]:
    width, height = _photo(name).size
    boundary = round(width * _TRAINING_SHARE)
    parts = {"all": (0, width), "train": (0, boundary), "test": (boundary, width)}
    left, right = look_up(split, parts, "split", ImageError)
    largest = min(height, right - left)
    if size > largest:
        raise ImageError(f"crops of {size} pixels do not fit the {split!r} part of {name} ({right - left} x {height})")
    edge = int(rng.integers(size, min(size * 3 // 2, largest) + 1))
    x, y = int(rng.integers(left, right - edge + 1)), int(rng.integers(0, height - edge + 1))
    return (x, y, x + edge, y + edge)
