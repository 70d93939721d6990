"""The settings that decide the values of all pairs, and whether a result on disk has the same ones."""

from __future__ import annotations

from typing import Any

from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.errors import StorageError
from rsm_probe.matching.matching import Matching
from rsm_probe.pairs.tiles import Job
from rsm_probe.similarity.centering import Centering
from rsm_probe.storage.chunks import ChunkStore
from rsm_probe.storage.differences import as_stored, differences, other_image


def own_tile(store: ChunkStore, settings: dict[str, Any], tile: int, x: CapturedLayer, y: CapturedLayer | None) -> int:
    """Refuse a store of different settings, and return its tile size.

    Raises:
        StorageError: its settings differ.
    """
    if "settings" not in store.attributes:
        if store.finished:
            raise store.damaged("its attribute 'settings' is missing")
        return tile
    stored = store.attribute("settings", dict)
    stored = {key: value for key, value in stored.items() if key != "device"}  # a part of them in earlier versions
    changes = differences(stored, settings)
    if changes:
        for name, layer in (("image_a", x), ("image_b", x if y is None else y)):
            if name in store and (other := other_image([str(stored_id) for stored_id in store.read(name)], layer.ids)):
                changes = f"{other}; {changes}"
                break
        raise StorageError(f"{store.where} is another result ({changes}); choose another place or remove it")
    own = store.attribute("tile", int)
    if own < 1:
        raise store.damaged(f"its attribute 'tile' is {own}")
    return own


def settings_of(
    x: CapturedLayer,
    y: CapturedLayer | None,
    label: str,
    method: Matching,
    centering: Centering | None,
    permutations: bool,
) -> dict[str, Any]:
    """All settings that decide the values, as JSON reads them back."""
    sides = {"x": x.provenance, "y": y and y.provenance}
    how = {"matching": label, "method": repr(method), "centering": centering, "permutations": permutations}
    return as_stored({**sides, **how})


def attributes_of(job: Job, settings: dict[str, Any]) -> dict[str, Any]:
    """Attributes of the dataset that an RSM reads."""
    return {
        "matching": settings["matching"],
        "one_to_one": int(job.method.one_to_one),
        "centering": str(job.centering),
        "image_sets": 1 if job.y is None else 2,
        "layer": job.x.layer,
    }
