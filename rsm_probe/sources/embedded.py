"""Images that need no network: handwritten digits, scenes composed of them, crops of photographs.

The digits are scikit-learn's; the photographs are those that scikit-learn and scikit-image carry. Everything is drawn
when it is asked for and depends on nothing but the options and the image's number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rsm_probe.errors import ImageError
from rsm_probe.sources.images import ImageSet, Targets

# Every fifth digit is held out from training: the set interleaves its writers, so both parts hold all of them.
_HELD_OUT = 5
# More copies of one digit than this count as this many.
_MAX_COUNT = 3
# Left share of each photograph that training sees; crops for testing come from beyond it.
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


def digits(split: str = "all", size: int = 32, count: int | None = None, seed: int = 0) -> ImageSet:
    """scikit-learn's 1 797 handwritten digits, one centred digit an image.

    Args:
        split: "train" (four fifths), "test" (the rest) or "all".
        size: edge in pixels; the original 8 x 8 is enlarged.
        count: a random sample of so many; None for the whole split.
        seed: of the sample.

    Raises:
        ImageError: unknown split.
    """
    pixels, labels = _digit_data()
    chosen = _split_indices(len(pixels), split)

    def load(index: int) -> Image.Image:
        return _grey(pixels[chosen[index]]).resize((size, size), Image.Resampling.BICUBIC).convert("RGB")

    names = [f"digit-{k:04d}" for k in chosen]
    values = [str(labels[k]) for k in chosen]
    targets = Targets(labels[chosen][:, None], 10)
    images = ImageSet("digits", names, load, labels=values, targets=targets, content=lambda: f"size={size}")
    return images if count is None else images.sample(count, seed)


def scenes(split: str = "all", size: int = 64, count: int = 1000, seed: int = 0) -> ImageSet:
    """Canvases with three to six real digits at random places and scales, among fragments of others.

    Each scene's `annotation` holds `counts` (how often each digit occurs) and `boxes` (digit, left, top, right,
    bottom). Its label names the digits. Targets ask, for each of the ten digits, how often it occurs (3 or more count
    as 3).

    Args:
        split: which digits are used: "train", "test" or "all".
        size: edge in pixels.
        count: how many scenes.
        seed: scene k of a seed never changes, whatever the count.

    Raises:
        ImageError: unknown split, or a canvas too small for the digits.
    """
    if size < 48:
        raise ImageError(f"scenes need a canvas of at least 48 pixels, found size={size}")
    source = _split_indices(len(_digit_data()[0]), split)
    layouts = [_scene_layout(np.random.default_rng([seed, k]), source, size) for k in range(count)]
    counts = np.stack([np.bincount([d["digit"] for d in layout], minlength=10) for layout in layouts])

    def load(index: int) -> Image.Image:
        return _draw_scene(np.random.default_rng([seed, index, 1]), layouts[index], source, size)

    return ImageSet(
        "scenes",
        [f"scene-{seed}-{k:05d}" for k in range(count)],
        load,
        labels=["".join(str(d) for d in range(10) for _ in range(row[d])) for row in counts],
        targets=Targets(np.minimum(counts, _MAX_COUNT), _MAX_COUNT + 1),
        annotations=[
            {
                "counts": {str(d): int(row[d]) for d in range(10) if row[d]},
                "boxes": [[d["digit"], d["x"], d["y"], d["x"] + d["edge"], d["y"] + d["edge"]] for d in layout],
            }
            for row, layout in zip(counts, layouts, strict=True)
        ],
        content=lambda: f"size={size} split={split}",
    )


def photos(split: str = "all", size: int = 64, count: int = 500, seed: int = 0) -> ImageSet:
    """Random square crops of 18 photographs; the label is the photograph.

    Args:
        split: "train" takes crops from the left 55 % of each photograph, "test" from the rest, "all" from anywhere.
        size: edge in pixels; crops of one to one and a half times that edge are reduced to it.
        count: how many crops, spread evenly over the photographs.
        seed: crop k of a seed never changes, whatever the count.

    Raises:
        ImageError: unknown split, or crops larger than that part of the photographs.
    """
    names = [name for _, files in _PHOTOS.values() for name in files.split()]
    boxes = [_photo_box(np.random.default_rng([seed, k]), names[k % len(names)], split, size) for k in range(count)]

    def load(index: int) -> Image.Image:
        crop = _photo(names[index % len(names)]).crop(boxes[index])
        return crop.resize((size, size), Image.Resampling.BICUBIC)

    return ImageSet(
        "photos",
        [f"{Path(names[k % len(names)]).stem}-{seed}-{k:05d}" for k in range(count)],
        load,
        labels=[Path(names[k % len(names)]).stem for k in range(count)],
        targets=Targets(np.arange(count)[:, None] % len(names), len(names)),
        annotations=[{"box": list(box)} for box in boxes],
        content=lambda: f"size={size} split={split}",
    )


EMBEDDED: dict[str, Callable[..., ImageSet]] = {"digits": digits, "scenes": scenes, "photos": photos}


@cache
def _digit_data() -> tuple[np.ndarray, np.ndarray]:
    """Digits as (1797, 8, 8) in [0, 1] and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images / 16.0, data.target


def _split_indices(count: int, split: str) -> np.ndarray:
    everything = np.arange(count)
    held_out = everything % _HELD_OUT == 0
    parts = {"all": everything, "train": everything[~held_out], "test": everything[held_out]}
    if split not in parts:
        raise ImageError(f"unknown split {split!r} (known: {', '.join(parts)})")
    return parts[split]


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray((values * 255).round().astype(np.uint8), mode=None)


def _scene_layout(rng: np.random.Generator, source: np.ndarray, size: int) -> list[dict[str, Any]]:
    """Which digits, how large and where: boxes that overlap by at most three pixels."""
    labels = _digit_data()[1]
    placed: list[dict[str, Any]] = []
    wanted, edges = int(rng.integers(3, 7)), (size * 3 // 16, size * 3 // 8)
    for _ in range(200):
        if len(placed) == wanted:
            break
        edge = int(rng.integers(edges[0], edges[1] + 1))
        x, y = (int(v) for v in rng.integers(0, size - edge + 1, 2))
        if all(_overlap(x, y, edge, other) <= 3 for other in placed):
            which = int(rng.integers(len(source)))
            placed.append({"which": which, "digit": int(labels[source[which]]), "x": x, "y": y, "edge": edge})
    return placed


def _overlap(x: int, y: int, edge: int, other: dict[str, Any]) -> int:
    """How many pixels two square boxes overlap along the axis on which they overlap less."""
    wide = min(x + edge, other["x"] + other["edge"]) - max(x, other["x"])
    high = min(y + edge, other["y"] + other["edge"]) - max(y, other["y"])
    return max(0, min(wide, high))


def _draw_scene(rng: np.random.Generator, layout: list[dict[str, Any]], source: np.ndarray, size: int) -> Image.Image:
    pixels = _digit_data()[0]
    canvas = rng.uniform(0.0, 0.08, (size, size))
    for _ in range(8):  # clutter: quarters of digits, which are no digits
        quarter = pixels[source[rng.integers(len(source))]]
        top, left = rng.integers(0, 2, 2) * 4
        x, y = rng.integers(0, size - 8, 2)
        _paint(canvas, quarter[top : top + 4, left : left + 4], int(x), int(y), 8, 0.6)
    for item in layout:
        _paint(canvas, pixels[source[item["which"]]], item["x"], item["y"], item["edge"], rng.uniform(0.7, 1.0))
    return _grey(np.clip(canvas * rng.uniform(0.8, 1.0), 0, 1)).convert("RGB")


def _paint(canvas: np.ndarray, patch: np.ndarray, x: int, y: int, edge: int, brightness: float) -> None:
    """Draws a patch by maximum, so that what is beneath shows through where it is brighter."""
    large = np.asarray(_grey(patch).resize((edge, edge), Image.Resampling.BICUBIC)) / 255.0
    part = canvas[y : y + edge, x : x + edge]
    np.maximum(part, large * brightness, out=part)


@cache
def _photo(name: str) -> Image.Image:
    """A photograph in RGB with a short side of 320 pixels, read from the package that carries it."""
    for package, (folder, files) in _PHOTOS.items():
        spec = find_spec(package)
        if name in files.split() and spec is not None and spec.origin is not None:
            with Image.open(Path(spec.origin).parent / folder / name) as opened:
                image = opened.convert("RGB")
            scale = _SHORT_SIDE / min(image.size)
            width, height = round(image.width * scale), round(image.height * scale)
            return image.resize((width, height), Image.Resampling.LANCZOS)
    raise ImageError(f"photograph {name!r} is not installed; it comes with scikit-learn or scikit-image")


def _photo_box(rng: np.random.Generator, name: str, split: str, size: int) -> tuple[int, int, int, int]:
    width, height = _photo(name).size
    boundary = round(width * _TRAINING_SHARE)
    parts = {"all": (0, width), "train": (0, boundary), "test": (boundary, width)}
    if split not in parts:
        raise ImageError(f"unknown split {split!r} (known: {', '.join(parts)})")
    left, right = parts[split]
    largest = min(height, right - left)
    if size > largest:
        raise ImageError(f"crops of {size} pixels do not fit the {split!r} part of {name} ({right - left} x {height})")
    edge = int(rng.integers(size, min(size * 3 // 2, largest) + 1))
    x, y = int(rng.integers(left, right - edge + 1)), int(rng.integers(0, height - edge + 1))
    return (x, y, x + edge, y + edge)
