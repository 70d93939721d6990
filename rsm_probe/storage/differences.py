"""Compare the settings of something stored with those requested, and describe the differences."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rsm_probe.checks import brief
from rsm_probe.errors import StorageError

if TYPE_CHECKING:
    from rsm_probe.storage.chunks import ChunkStore


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


def has_settings(
    store: ChunkStore,
    settings: Mapping[str, Any],
    kind: str,
    ids: Mapping[str, Sequence[str]],
    obsolete: Collection[str] = (),
) -> bool:
    """Whether a store has settings; refuse a store whose settings differ.

    Args:
        store: to check.
        settings: as `as_stored` returns them.
        kind: what the store is, for the message.
        ids: array of the store -> ids of images that it should hold; the message names the first difference.
        obsolete: keys that only earlier versions wrote.

    Raises:
        StorageError: the settings differ, or a finished store has none.
    """
    if "settings" not in store.attributes:
        if store.finished:
            raise store.damaged("its attribute 'settings' is missing")
        return False
    stored = {key: value for key, value in store.attribute("settings", dict).items() if key not in obsolete}
    if changes := differences(stored, settings):
        named = (other_image([str(name) for name in store.read(array)], ids[array]) for array in ids if array in store)
        image = next(filter(None, named), "")
        compared = any(array in store for array in ids)
        if compared and not image and stored.get("content") != settings.get("content"):
            image = "images of the same names have different content"
        changes = f"{image}; {changes}" if image else changes
        raise StorageError(f"{store.where} is another {kind} ({changes}); choose another place or remove it")
    return True


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
