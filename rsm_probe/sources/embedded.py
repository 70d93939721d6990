"""The image sets that need no network, by name."""

from __future__ import annotations

from collections.abc import Callable

from rsm_probe.sources.images import ImageSet
from rsm_probe.sources.photos import photos
from rsm_probe.sources.scenes import cluttered, digits, scenes

__all__ = ["EMBEDDED", "cluttered", "digits", "photos", "scenes"]

EMBEDDED: dict[str, Callable[..., ImageSet]] = {
    "digits": digits,
    "scenes": scenes,
    "cluttered": cluttered,
    "photos": photos,
}
