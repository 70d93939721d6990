"""What a run stores for its page: some RSMs, pairs of images with their matched locations, neighbours, thumbnails."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rsm_probe.comparison.grid import RsmKey
from rsm_probe.errors import StorageError
from rsm_probe.report.page import Thumbnail
from rsm_probe.storage.files import load_arrays, save_arrays
from rsm_probe.streaming.result import SweepResult

SHOWN = "shown.npz"


@dataclass(frozen=True)
class RankChange:
    """A pair of images whose rank differs between the semantic and the spatio-semantic RSM of a layer.

    Attributes:
        model: name of the model.
        layer: name of the layer.
        images: indices of the images in the mini-batch.
        semantic: rank in the semantic RSM, from 0 for the least similar pair to 1 for the most similar.
        identity: rank in the spatio-semantic RSM.
        lines: between matched locations, as in `rsm_probe.report.page.Picture`.
        locations: number of locations of an image; the lines are some of these.
    """

    model: str
    layer: str
    images: tuple[int, int]
    semantic: float
    identity: float
    lines: Sequence[tuple[float, float, float, float, float]] = ()
    locations: int = 0


@dataclass(frozen=True)
class Neighbours:
    """The nearest images of an image in one layer.

    Attributes:
        model: name of the model.
        layer: name of the layer.
        query: index of the image in the mini-batch.
        semantic: indices of the nearest images by the semantic RSM, nearest first.
        identity: by the spatio-semantic RSM.
    """

    model: str
    layer: str
    query: int
    semantic: Sequence[int]
    identity: Sequence[int]


@dataclass(frozen=True)
class Interval:
    """A bootstrap interval of CKA between the semantic and the spatio-semantic RSM of a layer.

    Attributes:
        model: name of the model.
        layer: name of the layer.
        matching: matching of the semantic RSM.
        kernel: kernel of both.
        value: CKA.
        low: lower end.
        high: upper end.
    """

    model: str
    layer: str
    matching: str
    kernel: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Shown:
    """What the page of a sweep shows beside its result. Images are those of one mini-batch.

    Attributes:
        settings: hash of the settings of the result to which this belongs.
        ids: names of the N images of the mini-batch.
        labels: their labels.
        semantic: matching of the pairs and neighbours.
        kernel: kernel of the pairs and neighbours.
        order: indices (n,) of the images whose RSMs are shown, sorted by label.
        keys: keys of the RSMs.
        rsms: these RSMs (R, n, n), float32.
        ranges: lowest and highest similarity of different images in the whole mini-batch, (R, 2).
        ranks: ranks of the pairs of these images among all pairs of the mini-batch, from 0 to 1, (R, n, n); (0,) for
            runs that did not store them. The diagonal is NaN.
        thumbnails: index -> thumbnail.
        changes: pairs of images whose rank changes.
        neighbours: nearest neighbours.
        intervals: bootstrap intervals of the diagonal.
        repeats: bootstrap samples of these.
        notes: what was left out, as sentences.
        seconds: how long the run took that stored this; 0 if unknown.
        cells: ends of the bootstrap intervals of CKA between any two of the RSMs, (R, R, 2), NaN where there is none;
            (0,) where only the diagonal has intervals, and for runs of earlier versions.
        differences: the same of semantic minus spatio-semantic CKA of two layers, at their semantic RSMs.
        pictures: what each image is a part of, such as its photograph; () if the image set declares nothing.
        picture: what these are called, such as "photograph".
        composition: all images of the sweep in words, such as "60 crops of 18 photographs".
    """

    settings: str
    ids: Sequence[str]
    labels: Sequence[str]
    semantic: str
    kernel: str
    order: np.ndarray
    keys: Sequence[RsmKey]
    rsms: np.ndarray
    ranges: np.ndarray
    thumbnails: Mapping[int, Thumbnail] = field(default_factory=dict)
    changes: Sequence[RankChange] = ()
    neighbours: Sequence[Neighbours] = ()
    intervals: Sequence[Interval] = ()
    repeats: int = 0
    notes: Sequence[str] = ()
    seconds: float = 0.0
    ranks: np.ndarray = field(default_factory=lambda: np.empty(0))
    cells: np.ndarray = field(default_factory=lambda: np.empty(0))
    differences: np.ndarray = field(default_factory=lambda: np.empty(0))
    pictures: Sequence[str] = ()
    picture: str = ""
    composition: str = ""

    @cached_property
    def numbers(self) -> Mapping[tuple[str, int, str, str], int]:
        """Number of an RSM by its model, depth, matching and kernel."""
        return {(key.model, key.depth, key.matching, key.kernel): k for k, key in enumerate(self.keys)}

    def same_picture(self, a: int, b: int) -> bool:
        """Whether two images are known to be parts of one picture."""
        return bool(self.pictures) and self.pictures[a] == self.pictures[b]

    def named(self, image: int) -> str:
        """The name of an image, and its label if it has one."""
        return f"{self.ids[image]} ({self.labels[image]})" if self.labels[image] else self.ids[image]

    def save(self, folder: Path) -> None:
        """Write `shown.npz`, whose text is JSON.

        Raises:
            StorageError: it cannot be written.
        """
        pictures = {number: one.content for number, one in self.thumbnails.items()}
        facts = {
            "settings": self.settings,
            "ids": list(self.ids),
            "labels": list(self.labels),
            "semantic": self.semantic,
            "kernel": self.kernel,
            "keys": [list(key) for key in self.keys],
            "thumbnails": [[number, len(pictures[number]), *one.size] for number, one in self.thumbnails.items()],
            "changes": [asdict(one) for one in self.changes],
            "neighbours": [asdict(one) for one in self.neighbours],
            "intervals": [asdict(one) for one in self.intervals],
            "repeats": self.repeats,
            "notes": list(self.notes),
            "seconds": self.seconds,
            "pictures": list(self.pictures),
            "picture": self.picture,
            "composition": self.composition,
        }
        save_arrays(
            folder / SHOWN,
            {
                "facts": np.array(bytearray(json.dumps(facts).encode()), np.uint8),
                "pictures": np.array(bytearray(b"".join(pictures.values())), np.uint8),
                "order": self.order,
                "rsms": self.rsms.astype(np.float32),
                "ranges": self.ranges,
                "ranks": self.ranks.astype(np.float32),
                "cells": self.cells.astype(np.float32),
                "differences": self.differences.astype(np.float32),
            },
        )

    @classmethod
    def open(cls, folder: Path) -> Shown | None:
        """Read what a run stored; None for a run that stored nothing.

        Raises:
            StorageError: the file is damaged.
        """
        file = folder / SHOWN
        if not file.is_file():
            return None
        arrays = load_arrays(file)
        try:
            facts: dict[str, Any] = json.loads(arrays["facts"].tobytes())
            ids, labels, start = facts["ids"], facts["labels"], 0
            thumbnails: dict[int, Thumbnail] = {}
            for number, length, width, height in facts.pop("thumbnails"):
                content = arrays["pictures"][start : start + length].tobytes()
                thumbnails[number] = Thumbnail(content, (width, height), ids[number], labels[number])
                start += length
            changes = [RankChange(**{**one, "images": tuple(one["images"])}) for one in facts.pop("changes")]
            near = [Neighbours(**one) for one in facts.pop("neighbours")]
            intervals = [Interval(**one) for one in facts.pop("intervals")]
            keys = [RsmKey.from_texts(key) for key in facts.pop("keys")]
            return cls(
                **facts, order=arrays["order"], keys=keys, rsms=arrays["rsms"], ranges=arrays["ranges"],
                thumbnails=thumbnails, changes=changes, neighbours=near, intervals=intervals,
                ranks=arrays.get("ranks", np.empty(0)), cells=arrays.get("cells", np.empty(0)),
                differences=arrays.get("differences", np.empty(0)),
            )  # fmt: skip
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise StorageError(f"{file} is damaged ({error}); remove it and run again, which makes it anew") from error

    @classmethod
    def of(cls, folder: Path, result: SweepResult) -> Shown | None:
        """Read what the run of a result stored; None where that is missing, or belongs to other settings."""
        shown = cls.open(folder)
        return shown if shown is not None and shown.settings == settings_hash(result) else None


def settings_hash(result: SweepResult) -> str:
    """A hash of all settings that decide a result."""
    return hashlib.sha256(str(result.dataset.attrs.get("settings", "")).encode()).hexdigest()
