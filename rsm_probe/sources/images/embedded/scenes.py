"""Handwritten digits, and scenes composed of them: images that need no network.

The digits are scikit-learn's. Images are drawn when they are loaded. They depend only on the options and the index of
the image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
from PIL import Image

from rsm_probe.checks import require_whole
from rsm_probe.errors import ImageError, look_up
from rsm_probe.sources.images.image_set import ImageSet, Targets
from rsm_probe.sources.images.limits import require_drawing, require_edge

# Every fifth digit is held out for testing. The data interleave the writers, so both splits contain all of them.
_HELD_OUT = 5
# Targets count up to this many copies of a digit.
_MAX_COUNT = 3

# The digits of one image: index in the split ("which"), digit, position and size ("x", "y", "edge").
_Layout = list[dict[str, Any]]


def digits(split: str = "all", size: int = 32, count: int | None = None, seed: int = 0) -> ImageSet:
    """Enlarge scikit-learn's 1 797 handwritten digits, one centred digit per image.

    Args:
        split: "train" (four fifths), "test" (the rest) or "all".
        size: edge in pixels, to which the original 8 x 8 pixels are enlarged.
        count: size of a random sample; None for the whole split.
        seed: seed of the sample.

    Raises:
        ImageError: the split is unknown, or the size, count or seed is out of range.
    """
    require_edge(size)
    pixels, labels = _digit_data()
    numbers = _split_indices(split)

    def load(index: int) -> Image.Image:
        return _grey(pixels[numbers[index]]).resize((size, size), Image.Resampling.BICUBIC).convert("RGB")

    names = [f"digit-{k:04d}" for k in numbers]
    values = [str(labels[k]) for k in numbers]
    targets = Targets(labels[numbers][:, None], 10)
    images = ImageSet("digits", names, load, labels=values, targets=targets, content=lambda: f"size={size}")
    images = images.made_by(digits, split=split, size=size)
    return images if count is None else images.sample(count, seed)


def scenes(split: str = "all", size: int = 64, count: int = 1000, seed: int = 0, frames: int = 1) -> ImageSet:
    """Draw three to six real digits at random positions and scales on each canvas, among fragments of others.

    Each annotation holds `counts` (digit -> occurrences), `boxes` (digit, left, top, right, bottom) and `scene`, which
    is the same for all frames of a scene. The label lists the digits. The targets ask how often each of the ten digits
    occurs (0, 1, 2, or 3 and more).

    Args:
        split: split of the digits: "train", "test" or "all".
        size: edge in pixels.
        count: number of scenes.
        seed: seed of the scenes; scene k of a seed does not depend on `count`.
        frames: number of successive scenes that show the same digits, like frames of a video: rearranged, rescaled,
            and among different fragments.

    Raises:
        ImageError: the split is unknown, the canvas is too small for the digits, or the size, count, seed or number of
            frames is out of range.
    """
    require_whole(frames, "frames", 1, ImageError)

    def lay_out(number: int, source: np.ndarray) -> _Layout:
        if frames > 1:
            return _frame_layout(seed, number, frames, source, size)
        return _scene_layout(np.random.default_rng([seed, number]), source, size)

    layouts, load = _composed("scenes", split, size, count, seed, lay_out)
    counts = np.stack([np.bincount([d["digit"] for d in layout], minlength=10) for layout in layouts])
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
                "scene": str(number // frames),
            }
            for number, (row, layout) in enumerate(zip(counts, layouts, strict=True))
        ],
        sizes=[(size, size)] * count,
        content=lambda: f"size={size} split={split}" + (f" frames={frames}" if frames > 1 else ""),
    ).made_by(scenes, split=split, size=size, count=count, seed=seed, frames=frames)


def cluttered(split: str = "all", size: int = 64, count: int = 1000, seed: int = 0) -> ImageSet:
    """Draw one real digit at a random position and scale, among fragments of others; the label is the digit.

    Args:
        split: split of the digits: "train", "test" or "all".
        size: edge in pixels.
        count: number of images.
        seed: seed of the images; image k of a seed does not depend on `count`.

    Raises:
        ImageError: the split is unknown, the canvas is too small for the digits, or the size, count or seed is out of
            range.
    """

    layouts, load = _composed(
        "cluttered", split, size, count, seed,
        lambda number, source: _scene_layout(np.random.default_rng([seed, number]), source, size, (1, 1)),
    )  # fmt: skip
    digits_shown = np.array([layout[0]["digit"] for layout in layouts])
    return ImageSet(
        "cluttered",
        [f"cluttered-{seed}-{k:05d}" for k in range(count)],
        load,
        labels=[str(digit) for digit in digits_shown],
        targets=Targets(digits_shown[:, None], 10),
        content=lambda: f"size={size} split={split}",
    ).made_by(cluttered, split=split, size=size, count=count, seed=seed)


@cache
def _digit_data() -> tuple[np.ndarray, np.ndarray]:
    """Load the digits as (1797, 8, 8) in [0, 1], and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images / 16.0, data.target


def _split_indices(split: str) -> np.ndarray:
    every = np.arange(len(_digit_data()[0]))
    held_out = every % _HELD_OUT == 0
    return look_up(split, {"all": every, "train": every[~held_out], "test": every[held_out]}, "split", ImageError)


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray((values * 255).round().astype(np.uint8), mode=None)


def _composed(
    name: str, split: str, size: int, count: int, seed: int, lay_out: Callable[[int, np.ndarray], _Layout]
) -> tuple[list[_Layout], Callable[[int], Image.Image]]:
    """Lay out all images of a set with the digits of a split; return the layouts and the function that draws one."""
    require_drawing(size, count, seed)
    if size < 48:
        raise ImageError(f"{name} need a canvas of at least 48 pixels, found size={size}")
    source = _split_indices(split)
    layouts = [lay_out(number, source) for number in range(count)]
    return layouts, lambda index: _draw_scene(np.random.default_rng([seed, index, 1]), layouts[index], source, size)


def _scene_layout(
    rng: np.random.Generator, source: np.ndarray, size: int, objects: tuple[int, int] = (3, 6)
) -> _Layout:
    """Choose digits, sizes and positions, such that boxes overlap by at most three pixels."""
    placed: _Layout = []
    wanted = int(rng.integers(objects[0], objects[1] + 1))
    for _ in range(200):
        if len(placed) == wanted:
            break
        if (box := _free_box(rng, size, placed)) is not None:
            placed.append(_as_digit(int(rng.integers(len(source))), source) | box)
    return placed


def _frame_layout(seed: int, number: int, frames: int, source: np.ndarray, size: int) -> _Layout:
    """Lay out one frame: rearrange the digits that it shares with the other frames of its scene."""
    shown = _scene_layout(np.random.default_rng([seed, number // frames, 2]), source, size)
    rng = np.random.default_rng([seed, number, 3])
    while True:  # digits that fitted once fit again, perhaps after several attempts
        placed: _Layout = []
        for _ in range(200):
            if len(placed) == len(shown):
                return placed
            if (box := _free_box(rng, size, placed)) is not None:
                placed.append(_as_digit(shown[len(placed)]["which"], source) | box)


def _as_digit(which: int, source: np.ndarray) -> dict[str, Any]:
    return {"which": which, "digit": int(_digit_data()[1][source[which]])}


def _free_box(rng: np.random.Generator, size: int, placed: _Layout) -> dict[str, int] | None:
    """Draw a random position and scale; None if it overlaps a placed box."""
    edge = int(rng.integers(size * 3 // 16, size * 3 // 8 + 1))
    x, y = (int(v) for v in rng.integers(0, size - edge + 1, 2))
    return {"x": x, "y": y, "edge": edge} if all(_overlap(x, y, edge, other) <= 3 for other in placed) else None


def _overlap(x: int, y: int, edge: int, other: dict[str, Any]) -> int:
    """Pixels by which two square boxes overlap, along the axis with the smaller overlap."""
    wide = min(x + edge, other["x"] + other["edge"]) - max(x, other["x"])
    high = min(y + edge, other["y"] + other["edge"]) - max(y, other["y"])
    return max(0, min(wide, high))


def _draw_scene(rng: np.random.Generator, layout: _Layout, source: np.ndarray, size: int) -> Image.Image:
    canvas = rng.uniform(0.0, 0.08, (size, size))
    for _ in range(8):  # clutter: quarters of digits, which are unreadable
        which = int(source[rng.integers(len(source))])
        top, left = rng.integers(0, 2, 2) * 4
        x, y = rng.integers(0, size - 8, 2)
        _paint(canvas, _enlarged(which, 8, (int(top), int(left))), int(x), int(y), 0.6)
    for item in layout:
        digit = _enlarged(int(source[item["which"]]), item["edge"])
        _paint(canvas, digit, item["x"], item["y"], rng.uniform(0.7, 1.0))
    return _grey(np.clip(canvas * rng.uniform(0.8, 1.0), 0, 1)).convert("RGB")


@lru_cache(maxsize=32768)
def _enlarged(which: int, edge: int, quarter: tuple[int, int] | None = None) -> np.ndarray:
    """Enlarge a digit, or the quarter that begins at a row and a column; cached, because scenes reuse them."""
    pixels = _digit_data()[0][which]
    if quarter is not None:
        pixels = pixels[quarter[0] : quarter[0] + 4, quarter[1] : quarter[1] + 4]
    return np.asarray(_grey(pixels).resize((edge, edge), Image.Resampling.BICUBIC))


def _paint(canvas: np.ndarray, patch: np.ndarray, x: int, y: int, brightness: float) -> None:
    """Draw a patch as a maximum, so that brighter pixels beneath it stay visible."""
    beneath = canvas[y : y + len(patch), x : x + len(patch)]
    np.maximum(beneath, patch / 255.0 * brightness, out=beneath)
