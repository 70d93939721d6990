"""What decides the values of something stored, and words for how it differs from what is wanted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rsm_probe.checks import brief


def as_stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a store gives them back: JSON turns tuples into lists."""
    return dict(json.loads(json.dumps(settings)))


def differences(stored: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Words for the settings that differ; "" where none does."""
    before, now = _flat(stored), _flat(settings)
    return "; ".join(
        f"{key} was {brief(before.get(key), 60)}, is {brief(now.get(key), 60)}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    )


def other_image(stored: Sequence[str], ids: Sequence[str]) -> str:
    """Words for the first difference of two lists of images; "" where there is none."""
    for number, (before, now) in enumerate(itertools.zip_longest(stored, ids)):
        if before != now:
            return f"image {number} was {before!r}, is {now!r}"
    return ""


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
