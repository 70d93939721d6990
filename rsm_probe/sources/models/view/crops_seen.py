"""The pixels that two crops of an image share, as a model sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from rsm_probe.sources.models.view.probing import seen_region


@dataclass(frozen=True)
class SharedPixels:
    """What a model sees of the upper and the lower crop of an image, in pixels of the crops.

    Attributes:
        width: width of the part that it sees of each crop.
        height: height of that part.
        shared: height of what it sees in both; the width is that of the part.
    """

    width: float
    height: float
    shared: float


def shared_pixels(preprocess: Callable[[Image.Image], Any], edge: int, crop: int) -> SharedPixels:
    """What a model sees of crops from `rsm_probe.sources.crop_pairs`.

    Args:
        preprocess: the model's: PIL image -> tensor (C, H, W).
        edge: edge of the images in pixels.
        crop: edge of the crops.

    Raises:
        ModelError: it cannot be known; see `seen_region`.
    """
    seen = seen_region(preprocess, (crop, crop))
    # The lower crop begins this much below the upper one.
    shift = edge - crop
    return SharedPixels(seen.width, seen.height, max(0.0, seen.bottom - (shift + seen.top)))
