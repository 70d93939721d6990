"""Captures: the representations of a whole set of images on disk, layer by layer, for comparisons of all pairs.

A capture is a chunk store. Its root holds the names of the images (`image`, `label`) and, as attributes, the settings
that decided the values. Each layer is a group `layers/000`, ... with `tokens` (image, location, channel), `prefix`
where there are class or register tokens, `pooled` (image, channel), the mean over locations, `squared_norm` (image)
and, once all images have passed, `mean` (location, channel).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsm_probe.checks import brief, listed
from rsm_probe.errors import LayerError, StorageError, did_you_mean
from rsm_probe.faces import FormerName
from rsm_probe.forward.token_kinds import CLASS, of_kind
from rsm_probe.html_table import html_table
from rsm_probe.probe.representation import Representation
from rsm_probe.storage.checksums import ARRAYS
from rsm_probe.storage.chunks import ChunkStore

KIND = "capture"
# dtypes of tokens on disk.
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
# Numbers of tokens that are converted to float64 at once.
_AT_ONCE = 1 << 23


class Capture(Mapping[str, "CapturedLayer"]):
    """Representations of all images on disk: layer name -> `CapturedLayer`, tokens (N, S, C). Values are read on use.

    Example:
        >>> import torch, rsm_probe
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
        >>> capture = rsm_probe.capture(model, torch.rand(6, 3, 8, 8), ["0", "1"], "capture.zarr")
        >>> capture = rsm_probe.Capture.open("capture.zarr")    # later, in another process
        >>> list(capture)
        ['0', '1']
        >>> capture["1"].tokens(slice(0, 2)).shape    # of two images
        torch.Size([2, 36, 4])

    Attributes:
        where: path or URL.
        ids: names of the N images.
        labels: their labels, "" where unknown.
        settings: what the values depend on: model, images, layers, dtype, and hashes of them.

    Raises:
        LayerError: when a layer is looked up that the capture does not contain.
    """

    about = FormerName("settings")

    def __init__(self, store: ChunkStore) -> None:
        self.where = store.where
        self.settings: dict[str, Any] = store.attribute("settings", dict)
        self.ids = [str(name) for name in store.read("image")]
        self.labels = [str(label) for label in store.read("label")]
        if len(set(self.ids)) < len(self.ids) or len(self.labels) != len(self.ids):
            raise StorageError(f"{self.where} has lost the names of its images; capture again into the same place")
        self._layers = {
            layer["name"]: CapturedLayer(self, store, layer, number) for number, layer in enumerate(layers_of(store))
        }

    @classmethod
    def open(cls, where: str | Path) -> Capture:
        """Open a finished capture.

        Args:
            where: path, or URL of a file system that fsspec knows (`s3://...`, with the package s3fs).

        Raises:
            StorageError: the capture is missing, unfinished or damaged.
        """
        store = ChunkStore.open(where, KIND)
        if not store.finished:
            raise StorageError(f"the capture at {where} is not finished; run rsm_probe.capture on it again")
        return cls(store)

    def __getitem__(self, name: str) -> CapturedLayer:
        if name not in self._layers:
            raise LayerError(f"{self.where} does not contain layer {name!r}{did_you_mean(str(name), self._layers)}")
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def _repr_html_(self) -> str:
        """Tabulate the layers with the shapes of their tokens, for notebooks.

        Raises:
            StorageError: see `CapturedLayer.shape`.
        """
        labels = len(set(self.labels) - {""})
        facts = {"at": self.where, "images": len(self.ids), "labels": labels or None, "layers": len(self)}

        def row(layer: CapturedLayer) -> list[object]:
            _, locations, channels = layer.shape
            grid = "" if layer.grid is None else " x ".join(map(str, layer.grid))
            dtype = str(layer.dtype).removeprefix("torch.")
            return [layer.name, locations, grid, channels, "yes" if layer.has_class_token else "", dtype, layer.input]

        columns = ["layer", "locations", "grid", "channels", "class token", "dtype", "input"]
        several = any(layer.input for layer in self.values())
        rows = (row(layer)[: None if several else -1] for layer in self.values())
        return html_table("Capture", facts, columns[: None if several else -1], rows, count=len(self))

    def __repr__(self) -> str:
        return f"Capture({self.where!r}: {len(self.ids)} images, {len(self)} layers: {listed(self)})"


class CapturedLayer:
    """One layer of a capture.

    Attributes:
        name: of the layer.
        where: path or URL of the capture.
        shape: (N, S, C).
        grid: (H, W) with H * W = S, or None.
        digest: hash of all tokens.
        input: the input of the model whose locations these are, as in `Representation`; "" if one holds images.
        has_class_token: whether the first of the prefix tokens is a class token.
        provenance: what the values depend on; results store it to recognise their tokens.
    """

    about = FormerName("provenance")

    def __init__(self, capture: Capture, store: ChunkStore, entry: Mapping[str, Any], number: int) -> None:
        self.name: str = entry["name"]
        self.where = capture.where
        self.digest: str = entry["digest"]
        self.input: str = entry.get("input", "")
        self.grid: tuple[int, ...] | None = entry["grid"] and tuple(entry["grid"])
        self.ids, self.labels = capture.ids, capture.labels
        known = {key: capture.settings.get(key) for key in ("model", "weights", "images", "content", "device")}
        self.provenance = {
            "layer": self.name, "tokens": self.digest, "dtype": entry["dtype"], "ids": _hash(capture.ids), **known,
            "grid": entry["grid"],
        }  # fmt: skip
        self.dtype: torch.dtype = getattr(torch, entry["dtype"])
        self._store = store
        self._folder = layer_folder(number)
        names = store.attribute(ARRAYS, list, [])
        # Stores of earlier versions do not list their arrays.
        self._has_prefix = f"{self._folder}/prefix" in (names or store)
        self.has_class_token: bool = self._has_prefix and entry.get("class_token", True)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Images, locations, channels.

        Raises:
            StorageError: the tokens are missing, or their shape contradicts the capture's images or grid.
        """
        shape = self._store.array(f"{self._folder}/tokens").shape
        if len(shape) != 3 or shape[0] != len(self) or (self.grid and shape[1] != math.prod(self.grid)):
            raise self._store.damaged(
                f"it has {len(self)} images and a grid of {self.grid}, and {self._folder}/tokens declares {shape}"
            )
        return shape[0], shape[1], shape[2]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def images_per_chunk(self) -> int:
        """Number of images that are best read together."""
        return int(self._store.array(f"{self._folder}/tokens").chunks[0])

    def tokens(self, images: slice = slice(None)) -> Tensor:
        """Tokens (n, S, C) of some images, as captured; half precision becomes float32.

        Raises:
            StorageError: a chunk is missing or damaged; the message names its file.
        """
        return self._tensor("tokens", images)

    def prefix(self, images: slice = slice(None)) -> Tensor:
        """Class, distillation and register tokens (n, P, C) of some images; P may be 0.

        Raises:
            StorageError: a chunk is missing or damaged; the message names its file.
        """
        if self._has_prefix:
            return self._tensor("prefix", images)
        return torch.empty(len(range(len(self))[images]), 0, self.shape[2])

    @cached_property
    def mean(self) -> Tensor:
        """The mean over images (S, C), float64.

        Raises:
            StorageError: the mean is missing or damaged.
        """
        return torch.from_numpy(self._whole("mean", self.shape[1:]))

    @cached_property
    def squared_norms(self) -> np.ndarray:
        """|z_i|^2 of the images (N,), float64, without centring.

        Raises:
            StorageError: a chunk is missing or damaged.
        """
        return self._whole("squared_norm", (len(self),))

    @cached_property
    def pooled(self) -> Tensor:
        """The mean over locations of every image (N, C), float64.

        Raises:
            StorageError: a chunk is missing or damaged.
        """
        return torch.from_numpy(self._whole("pooled", (len(self), self.shape[2])))

    def vectors(self, kind: str, images: slice = slice(None)) -> Tensor:
        """One vector for each of some images (n, C), float64, computed in float64.

        Args:
            kind: "class" for the class token, or "mean", "max" or "gem" over locations; see
                `rsm_probe.forward.token_kinds`.
            images: consecutive images.

        Raises:
            LayerError: the layer has no class token.
            StorageError: a chunk is missing or damaged; the message names its file.
        """
        if kind == CLASS and not self.has_class_token:
            raise LayerError(f"layer {self.name} has no class token")
        numbers = range(len(self))[images]
        chunk = self.images_per_chunk
        step = max(1, _AT_ONCE // (chunk * math.prod(self.shape[1:]))) * chunk
        blocks = (slice(start, min(start + step, numbers.stop)) for start in range(numbers.start, numbers.stop, step))
        return torch.cat([self._vectors(kind, block) for block in blocks])

    def _vectors(self, kind: str, images: slice) -> Tensor:
        prefix = self.prefix(images).double()
        # The class token does not depend on the locations, so do not read them.
        tokens = prefix[:, :0] if kind == CLASS else self.tokens(images).double()
        return of_kind(Representation(tokens, prefix, None), kind).tokens[:, 0]

    def _whole(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        declared = self._store.array(f"{self._folder}/{name}").shape
        if declared != shape:
            raise self._store.damaged(f"{self._folder}/{name} is declared as {declared}, but should be {shape}")
        return self._store.read(f"{self._folder}/{name}")

    def _tensor(self, name: str, images: slice) -> Tensor:
        path, array, wanted = f"{self._folder}/{name}", self._store.array(f"{self._folder}/{name}"), self.shape
        if (array.ndim, array.shape[0], array.shape[-1]) != (3, wanted[0], wanted[2]):
            raise self._store.damaged(f"{path} is declared as {array.shape} beside tokens of {wanted}")
        if array.dtype != stored_dtype(self.dtype):
            raise self._store.damaged(f"{path} is declared as {array.dtype}, but should be {self.dtype}")
        values = as_tensor(self._store.read(path, (images,)), self.dtype)
        return values.to(torch.promote_types(values.dtype, torch.float32))

    def __repr__(self) -> str:
        images, locations, channels = self.shape
        grid = "no grid" if self.grid is None else f"grid {' x '.join(map(str, self.grid))}"
        return f"CapturedLayer({self.name!r}: {images} images, {locations} locations, {channels} channels, {grid})"


def _hash(ids: list[str]) -> str:
    """A hash of names and their order."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def layer_folder(number: int) -> str:
    """The folder of a layer in a capture: names of layers may hold characters that paths may not."""
    return f"layers/{number:03d}"


def array_names(layers: int, with_prefix: Collection[int]) -> list[str]:
    """The names of all arrays of a finished capture.

    Args:
        layers: number of layers.
        with_prefix: numbers of the layers that have class or register tokens.
    """
    parts = ("tokens", "pooled", "squared_norm", "mean")
    names = [f"{layer_folder(number)}/{part}" for number in range(layers) for part in parts]
    return ["image", "label", *names, *(f"{layer_folder(number)}/prefix" for number in with_prefix)]


def layers_of(store: ChunkStore) -> list[dict[str, Any]]:
    """Read the entries of all layers: `name`, `dtype`, `grid` and `digest` of each.

    Raises:
        StorageError: an entry is damaged.
    """
    layers = store.attribute("layers", list)
    for layer in layers:
        texts = () if not isinstance(layer, dict) else [layer.get(key) for key in ("name", "dtype", "digest")]
        if not texts or not all(isinstance(text, str) for text in (*texts, layer.get("input", ""))):
            raise store.damaged(f"an entry of its attribute 'layers' is {brief(layer)}")
        grid = layer.get("grid")
        whole = isinstance(grid, list) and len(grid) in (2, 3) and all(type(side) is int and side > 0 for side in grid)
        if layer["dtype"] not in DTYPES or not (grid is None or whole) or "grid" not in layer:
            raise store.damaged(f"layer {brief(layer['name'])} has dtype {brief(layer['dtype'])}, grid {brief(grid)}")
        if not isinstance(layer.get("class_token", True), bool):
            raise store.damaged(f"layer {brief(layer['name'])} has class_token {brief(layer['class_token'])}")
    if len({layer["name"] for layer in layers}) < len(layers):
        raise store.damaged("its attribute 'layers' names one more than once")
    return layers


def is_whole(store: ChunkStore, ids: Sequence[str], labels: Sequence[str]) -> bool:
    """Whether a capture is finished, has these images, and lacks no chunk.

    Chunks are not read. An array without metadata is an error.

    Raises:
        StorageError: names what is damaged.
    """
    if not store.finished or not (store.holds_names("image", ids) and store.holds_names("label", labels)):
        return False
    layers = layers_of(store)
    required = array_names(len(layers), ())
    names = store.attribute(ARRAYS, list, required)
    # Captures of earlier versions do not say whether there are prefix tokens.
    optional = [f"{layer_folder(number)}/prefix" for number in range(len(layers))]
    return all(name in store and store.complete(name) for name in {*required, *map(str, names)}) and all(
        store.complete(name) for name in optional if name in store
    )


def stored_dtype(dtype: torch.dtype) -> np.dtype:
    """The dtype on disk for a dtype of tokens: NumPy lacks bfloat16, whose bits are stored."""
    return np.dtype(np.uint16 if dtype == torch.bfloat16 else str(dtype).removeprefix("torch."))


def as_tensor(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Tokens as captured, from their stored values."""
    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor
