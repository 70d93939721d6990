"""Compare the settings of something stored with those requested, and describe the differences."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rsm_probe.checks import brief


def as_stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert settings to the form in which a store returns them: JSON turns tuples into lists."""
    return dict(json.loads(json.dumps(settings)))


def differences(stored: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Describe the settings that differ; "" if none does."""
    before, now = _flat(stored), _flat(settings)
    return "; ".join(
        f"{key} was {brief(before.get(key), 60)}, is {brief(now.get(key), 60)}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    )


def other_image(stored: Sequence[str], ids: Sequence[str]) -> str:
    """Describe the first difference between two lists of image ids; "" if they are equal."""
    pairs = enumerate(itertools.zip_longest(stored, ids))
    return next((f"image {k} was {before!r}, is {now!r}" for k, (before, now) in pairs if before != now), "")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
