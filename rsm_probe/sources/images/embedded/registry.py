"""The image sets that need no network, by name."""

from __future__ import annotations

from collections.abc import Callable

from rsm_probe.sources.images.embedded.photos import photos
from rsm_probe.sources.images.embedded.scenes import cluttered, digits, scenes
from rsm_probe.sources.images.image_set import ImageSet

__all__ = ["EMBEDDED", "cluttered", "digits", "photos", "scenes"]

EMBEDDED: dict[str, Callable[..., ImageSet]] = {
    "digits": digits,
    "scenes": scenes,
    "cluttered": cluttered,
    "photos": photos,
}
