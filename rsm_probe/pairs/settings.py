"""The settings that decide the values of all pairs, and whether a result on disk has the same ones."""

from __future__ import annotations

from typing import Any

from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.matching.matching import Matching
from rsm_probe.pairs.tiles import Job
from rsm_probe.similarity.centering import Centering
from rsm_probe.storage.chunks import ChunkStore
from rsm_probe.storage.differences import as_stored, has_settings


def own_tile(store: ChunkStore, settings: dict[str, Any], tile: int, x: CapturedLayer, y: CapturedLayer | None) -> int:
    """Refuse a store of different settings, and return its tile size.

    Raises:
        StorageError: its settings differ.
    """
    ids = {"image_a": x.ids, "image_b": (x if y is None else y).ids}
    if not has_settings(store, settings, "result", ids, obsolete=("device",)):
        return tile
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
