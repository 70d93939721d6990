"""Captures: the representations of a whole set of images on disk, layer by layer, for whoever compares all pairs.

A capture is a chunk store. Its root holds the names of the images (`image`, `label`) and, as attributes, what decided
the values. Each layer is a group `layers/000`, ... with `tokens` (image, location, channel), `prefix` where there are
class or register tokens, `pooled` (image, channel), the mean over locations, `squared_norm` (image) and, once all
images have passed, `mean` (location, channel).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsm_probe.errors import LayerError, StorageError, nearest
from rsm_probe.storage.chunks import ChunkStore

KIND = "capture"


class Capture(Mapping[str, "CapturedLayer"]):
    """Representations of all images on disk: layer name -> `CapturedLayer`. Nothing is read before it is asked for.

    Attributes:
        where: path or URL.
        ids: names of the images.
        labels: their labels, "" where unknown.
        about: what decided the values: model, images, layers, dtype, and hashes of them.
    """

    def __init__(self, store: ChunkStore) -> None:
        self.where = store.where
        self.about: dict[str, Any] = store.attributes["settings"]
        self.ids = [str(name) for name in store.read("image")]
        self.labels = [str(label) for label in store.read("label")]
        if len(set(self.ids)) < len(self.ids):
            raise StorageError(f"{self.where} has lost the names of its images; capture again into the same place")
        self._layers = {
            layer["name"]: CapturedLayer(self, store, layer, number)
            for number, layer in enumerate(store.attributes["layers"])
        }

    @classmethod
    def open(cls, where: str | Path) -> Capture:
        """Opens a finished capture.

        Args:
            where: path, or URL of a file system that fsspec knows (`s3://...`, with the package s3fs).

        Raises:
            StorageError: there is none, it is not finished, or it is damaged.
        """
        store = ChunkStore.open(where, KIND)
        if not store.attributes.get("finished"):
            raise StorageError(f"the capture at {where} is not finished; run rsm_probe.capture on it again")
        return cls(store)

    def __getitem__(self, name: str) -> CapturedLayer:
        if name not in self._layers:
            raise LayerError(f"{self.where} holds no layer {name!r}{nearest(str(name), self._layers)}")
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"Capture({self.where!r}: {len(self.ids)} images, layers {', '.join(self)})"


class CapturedLayer:
    """One layer of a capture.

    Attributes:
        name: of the layer.
        where: path or URL of the capture.
        shape: (N, S, C).
        grid: (H, W) with H * W = S, or None.
        digest: hash of all tokens.
        about: everything that decides what is compared, by which a result knows what it was made of.
    """

    def __init__(self, capture: Capture, store: ChunkStore, about: Mapping[str, Any], number: int) -> None:
        self.name: str = about["name"]
        self.where = capture.where
        self.digest: str = about["digest"]
        self.grid: tuple[int, ...] | None = about["grid"] and tuple(about["grid"])
        self.ids, self.labels = capture.ids, capture.labels
        self.about = {"layer": self.name, "tokens": self.digest, "dtype": about["dtype"], "ids": _hash(capture.ids)}
        self.about |= {key: capture.about.get(key) for key in ("model", "weights", "images", "content", "device")}
        self.about["grid"] = about["grid"]
        self.dtype: torch.dtype = getattr(torch, about["dtype"])
        self._store = store
        self._place = layer_place(number)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Images, locations, channels."""
        images, locations, channels = self._store.array(f"{self._place}/tokens").shape
        return images, locations, channels

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def images_per_chunk(self) -> int:
        """So many images are read at once."""
        return int(self._store.array(f"{self._place}/tokens").chunks[0])

    def tokens(self, images: slice = slice(None)) -> Tensor:
        """Tokens (n, S, C) of some images, as they were captured; half precision as float32.

        Raises:
            StorageError: a chunk is missing or damaged; the message names its file.
        """
        return self._tensor("tokens", images)

    def prefix(self, images: slice = slice(None)) -> Tensor:
        """Class, distillation and register tokens (n, P, C) of some images; P may be 0.

        Raises:
            StorageError: as `tokens`.
        """
        if f"{self._place}/prefix" in self._store:
            return self._tensor("prefix", images)
        return torch.empty(len(range(len(self))[images]), 0, self.shape[2])

    @cached_property
    def mean(self) -> Tensor:
        """The mean over images (S, C), float64.

        Raises:
            StorageError: it is missing or damaged.
        """
        return torch.from_numpy(self._store.read(f"{self._place}/mean"))

    @cached_property
    def squared_norms(self) -> np.ndarray:
        """|z_i|^2 of the images (N,), float64, without centring.

        Raises:
            StorageError: a chunk is missing or damaged.
        """
        return self._store.read(f"{self._place}/squared_norm")

    @cached_property
    def pooled(self) -> Tensor:
        """The mean over locations of every image (N, C), float64.

        Raises:
            StorageError: a chunk is missing or damaged.
        """
        return torch.from_numpy(self._store.read(f"{self._place}/pooled"))

    def _tensor(self, name: str, images: slice) -> Tensor:
        try:
            values = torch.from_numpy(self._store.read(f"{self._place}/{name}", (images,)))
        except StorageError as error:
            raise StorageError(
                f"{error}; remove that file and capture again into the same place, which makes only its batch anew"
            ) from None
        values = values.view(torch.bfloat16) if self.dtype == torch.bfloat16 else values
        return values.to(torch.promote_types(values.dtype, torch.float32))

    def __repr__(self) -> str:
        images, locations, channels = self.shape
        return f"CapturedLayer({self.name!r}: {images} images, {locations} locations, {channels} channels)"


def _hash(ids: list[str]) -> str:
    """Of names and their order."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def layer_place(number: int) -> str:
    """Where a layer lies in a capture: names of layers hold what paths may not."""
    return f"layers/{number:03d}"


def is_whole(store: ChunkStore) -> bool:
    """Whether a capture is finished and none of its chunks has gone missing since; they are not read."""
    if not store.attributes.get("finished"):
        return False
    parts = ("tokens", "prefix", "pooled", "squared_norm", "mean")
    names = [f"{layer_place(number)}/{part}" for number in range(len(store.attributes["layers"])) for part in parts]
    return all(store.complete(name) for name in names if name in store or name.endswith("tokens"))
