"""Handwritten digits, and scenes composed of them: images that need no network.

The digits are scikit-learn's. Everything is drawn when it is asked for and depends on nothing but the options and the
image's number.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np
from PIL import Image

from rsm_probe.checks import require_seed, require_whole
from rsm_probe.errors import ImageError
from rsm_probe.sources.images.image_set import ImageSet, Targets
from rsm_probe.sources.images.limits import require_drawn, require_edge

# Every fifth digit is held out from training: the set interleaves its writers, so both parts hold all of them.
_HELD_OUT = 5
# More copies of one digit than this count as this many.
_MAX_COUNT = 3


def digits(split: str = "all", size: int = 32, count: int | None = None, seed: int = 0) -> ImageSet:
    """scikit-learn's 1 797 handwritten digits, one centred digit an image.

    Args:
        split: "train" (four fifths), "test" (the rest) or "all".
        size: edge in pixels; the original 8 x 8 is enlarged.
        count: a random sample of so many; None for the whole split.
        seed: of the sample.

    Raises:
        ImageError: unknown split, or a size, count or seed out of range.
    """
    require_edge(size)
    pixels, labels = _digit_data()
    numbers = _split_indices(len(pixels), split)

    def load(index: int) -> Image.Image:
        return _grey(pixels[numbers[index]]).resize((size, size), Image.Resampling.BICUBIC).convert("RGB")

    names = [f"digit-{k:04d}" for k in numbers]
    values = [str(labels[k]) for k in numbers]
    targets = Targets(labels[numbers][:, None], 10)
    images = ImageSet("digits", names, load, labels=values, targets=targets, content=lambda: f"size={size}")
    return images if count is None else images.sample(count, seed)


def scenes(split: str = "all", size: int = 64, count: int = 1000, seed: int = 0, frames: int = 1) -> ImageSet:
    """Canvases with three to six real digits at random places and scales, among fragments of others.

    Each scene's `annotation` holds `counts` (how often each digit occurs), `boxes` (digit, left, top, right, bottom)
    and `scene`, which frames share. Its label names the digits. Targets ask, for each of the ten digits, how often it
    occurs (3 or more count as 3).

    Args:
        split: which digits are used: "train", "test" or "all".
        size: edge in pixels.
        count: how many scenes.
        seed: scene k of a seed never changes, whatever the count.
        frames: so many scenes in a row show the same digits, as frames of videos of one place do: rearranged, rescaled,
            among other fragments.

    Raises:
        ImageError: unknown split, a canvas too small for the digits, or a size, count or seed out of range.
    """
    _require_canvas("scenes", size, count, seed)
    require_whole(frames, "frames", 1, ImageError)
    source = _split_indices(len(_digit_data()[0]), split)
    if frames == 1:
        layouts = [_scene_layout(np.random.default_rng([seed, k]), source, size) for k in range(count)]
    else:
        layouts = [_frame_layout(seed, k, frames, source, size) for k in range(count)]
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
                "scene": str(number // frames),
            }
            for number, (row, layout) in enumerate(zip(counts, layouts, strict=True))
        ],
        content=lambda: f"size={size} split={split}" + (f" frames={frames}" if frames > 1 else ""),
    )


def cluttered(split: str = "all", size: int = 64, count: int = 1000, seed: int = 0) -> ImageSet:
    """One real digit at a random place and scale, among fragments of others; the label is the digit.

    Args:
        split: which digits are used: "train", "test" or "all".
        size: edge in pixels.
        count: how many images.
        seed: image k of a seed never changes, whatever the count.

    Raises:
        ImageError: unknown split, a canvas too small for the digits, or a size, count or seed out of range.
    """
    _require_canvas("cluttered", size, count, seed)
    source = _split_indices(len(_digit_data()[0]), split)
    layouts = [_scene_layout(np.random.default_rng([seed, k]), source, size, (1, 1)) for k in range(count)]
    digits_shown = np.array([layout[0]["digit"] for layout in layouts])

    def load(index: int) -> Image.Image:
        return _draw_scene(np.random.default_rng([seed, index, 1]), layouts[index], source, size)

    return ImageSet(
        "cluttered",
        [f"cluttered-{seed}-{k:05d}" for k in range(count)],
        load,
        labels=[str(digit) for digit in digits_shown],
        targets=Targets(digits_shown[:, None], 10),
        content=lambda: f"size={size} split={split}",
    )


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


def _require_canvas(name: str, size: int, count: int, seed: int) -> None:
    require_edge(size)
    require_drawn(count)
    require_seed(seed, "seed", ImageError)
    if size < 48:
        raise ImageError(f"{name} need a canvas of at least 48 pixels, found size={size}")


def _scene_layout(
    rng: np.random.Generator, source: np.ndarray, size: int, objects: tuple[int, int] = (3, 6)
) -> list[dict[str, Any]]:
    """Which digits, how large and where: boxes that overlap by at most three pixels."""
    placed: list[dict[str, Any]] = []
    wanted = int(rng.integers(objects[0], objects[1] + 1))
    for _ in range(200):
        if len(placed) == wanted:
            break
        if (box := _free_box(rng, size, placed)) is not None:
            placed.append(_as_digit(int(rng.integers(len(source))), source) | box)
    return placed


def _frame_layout(seed: int, number: int, frames: int, source: np.ndarray, size: int) -> list[dict[str, Any]]:
    """The digits of a set of frames, placed anew for one of them."""
    shown = _scene_layout(np.random.default_rng([seed, number // frames, 2]), source, size)
    rng = np.random.default_rng([seed, number, 3])
    while True:  # digits that fitted once fit again, if not in the first try
        placed: list[dict[str, Any]] = []
        for _ in range(200):
            if len(placed) == len(shown):
                return placed
            if (box := _free_box(rng, size, placed)) is not None:
                placed.append(_as_digit(shown[len(placed)]["which"], source) | box)


def _as_digit(which: int, source: np.ndarray) -> dict[str, Any]:
    return {"which": which, "digit": int(_digit_data()[1][source[which]])}


def _free_box(rng: np.random.Generator, size: int, placed: list[dict[str, Any]]) -> dict[str, int] | None:
    """A random place and scale, if it is free."""
    edge = int(rng.integers(size * 3 // 16, size * 3 // 8 + 1))
    x, y = (int(v) for v in rng.integers(0, size - edge + 1, 2))
    return {"x": x, "y": y, "edge": edge} if all(_overlap(x, y, edge, other) <= 3 for other in placed) else None


def _overlap(x: int, y: int, edge: int, other: dict[str, Any]) -> int:
    """How many pixels two square boxes overlap along the axis on which they overlap less."""
    wide = min(x + edge, other["x"] + other["edge"]) - max(x, other["x"])
    high = min(y + edge, other["y"] + other["edge"]) - max(y, other["y"])
    return max(0, min(wide, high))


def _draw_scene(rng: np.random.Generator, layout: list[dict[str, Any]], source: np.ndarray, size: int) -> Image.Image:
    canvas = rng.uniform(0.0, 0.08, (size, size))
    for _ in range(8):  # clutter: quarters of digits, which are no digits
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
    """Bytes of a digit, or of its quarter that begins at a row and a column; scenes draw the same ones often."""
    pixels = _digit_data()[0][which]
    if quarter is not None:
        pixels = pixels[quarter[0] : quarter[0] + 4, quarter[1] : quarter[1] + 4]
    return np.asarray(_grey(pixels).resize((edge, edge), Image.Resampling.BICUBIC))


def _paint(canvas: np.ndarray, patch: np.ndarray, x: int, y: int, brightness: float) -> None:
    """Draws a patch by maximum, so that what is beneath shows through where it is brighter."""
    part = canvas[y : y + len(patch), x : x + len(patch)]
    np.maximum(part, patch / 255.0 * brightness, out=part)
