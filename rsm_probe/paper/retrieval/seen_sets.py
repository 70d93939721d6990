"""Queries and database with the objects that a model sees of them, and what to say about these."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rsm_probe.paper.experiment import Subject
from rsm_probe.runs.pieces import once
from rsm_probe.sources import ImageSet
from rsm_probe.sources.models.view.objects_seen import seen_objects, without_hidden
from rsm_probe.storage.files import Arrays

QUERIES, DATABASE = "queries", "database"


@dataclass(frozen=True)
class SeenSets:
    """The images of a model with the objects that count.

    Attributes:
        queries: the queries.
        database: the largest database.
        summary: a clause about the objects that count, for the report.
    """

    queries: ImageSet
    database: ImageSet
    summary: str


def seen_sets(subject: Subject, least: Mapping[str, float]) -> SeenSets:
    """Leave out the objects that a model does not see. What it sees is stored with its results.

    Args:
        subject: the model; without the model itself, what was stored is read, and all objects count where nothing was.
        least: "queries" and "database" -> the least share of an object's box that the model must see.

    Raises:
        ImageError: an image whose size is not known cannot be loaded.
    """

    def compute() -> Arrays:
        if subject.model is None:
            return {}
        seen = {name: seen_objects(subject.model, subject.images[name], least[name]) for name in (QUERIES, DATABASE)}
        total, hidden = (sum(getattr(part, name) for part in seen.values()) for name in ("objects", "left_out"))
        unknown = next((part.unknown for part in seen.values() if part.unknown), "")
        if unknown:
            warnings.warn(
                f"it is not known which part of some images {subject.title} sees, so all objects in these count: "
                f"{unknown}; give the model preprocess='resize-crop' or your own resize and crop, or set seen: 0",
                stacklevel=2,
            )
        cut, images = sum(part.cut for part in seen.values()), sum(len(part.images) for part in seen.values())
        text = ""
        if any(least.values()) and any(note.get("boxes") for part in seen.values() for note in part.images.annotations):
            share = " and ".join(sorted({f"{value:.0%}" for value in least.values()}))
            text = (
                f"{hidden} of {total} objects, in {cut} of {images} images, are left out, because it sees less than "
                f"{share} of their boxes"
            )
            text += "; what it sees of some images is not known, and all objects in these count" if unknown else ""
        return {**{name: part.hidden for name, part in seen.items()}, "summary": np.array(text)}

    stored = once(subject.folder / "seen-objects.npz", f"{subject.owner} {sorted(least.items())}", compute)
    sets = {
        name: without_hidden(subject.images[name], stored[name]) if name in stored else subject.images[name]
        for name in (QUERIES, DATABASE)
    }
    summary = str(stored["summary"]) if "summary" in stored else ""
    if all(_is_label(images) for images in sets.values()):
        summary = "the one object of an image is its label"
    return SeenSets(sets[QUERIES], sets[DATABASE], summary)


def _is_label(images: ImageSet) -> bool:
    return all(
        note["counts"] == {label: 1} and not note.get("boxes")
        for note, label in zip(images.annotations, images.labels, strict=True)
    )
