"""Write a capture batch by batch, and finish it once all batches are there."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsm_probe.arrays import first_nonfinite
from rsm_probe.captures.captured_layers import array_names, as_tensor, layer_folder, layers_of, stored_dtype
from rsm_probe.errors import LayerError, RepresentationError, StorageError
from rsm_probe.forward.layer_consumer import ImageBatch, LayerNames, finished_name
from rsm_probe.matching.methods.identity import squared_norms
from rsm_probe.probe.representation import Representation, require_finite
from rsm_probe.storage.chunks import ChunkStore

# The fill value of bfloat16, whose bits are stored: one of its NaNs.
_BFLOAT16_NAN = 0x7FC0


class CaptureWriter:
    """A `LayerConsumer` that writes layers into a capture, each as soon as it has run.

    A batch counts as written once its norms are there, which are written last.

    Args:
        store: to write into.
        ids: names of the images.
        labels: their labels.
        batch_size: images per batch; the last may be smaller. Chunks never cross batches.
        dtype: of tokens on disk.
        sizes: images of each batch, where they differ.

    Attributes:
        store: as given.
        labels: as given.
        count: number of images.
        rows: the images of each batch.
    """

    # Chunks of about this size were fastest to write and read.
    _CHUNK_BYTES = 4 << 20

    def __init__(
        self,
        store: ChunkStore,
        ids: Sequence[str],
        labels: Sequence[str],
        batch_size: int,
        dtype: torch.dtype,
        sizes: Sequence[int] = (),
    ) -> None:
        self.store, self.labels = store, labels
        self.count = len(ids)
        sizes = sizes or [min(batch_size, self.count - start) for start in range(0, self.count, batch_size)]
        stops = list(itertools.accumulate(sizes))
        self.rows = [slice(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
        # The largest number of images of which all batches but the last are multiples.
        self._batch_size = math.gcd(batch_size, *(rows.start for rows in self.rows))
        self._ids = ids
        self._dtype, self._dtype_name = dtype, str(dtype).removeprefix("torch.")

    def put_names(self) -> None:
        """Write the names of the images where they are missing.

        Raises:
            StorageError: they cannot be written.
        """
        self.store.put_names("image", self._ids, "image")
        self.store.put_names("label", self.labels, "image")

    def declare(self, layers: Mapping[str, Representation], *, class_token: bool = True) -> None:
        """Create the arrays of all layers, or check existing ones. Where one had to be created, no batch is complete.

        Args:
            layers: name -> representation of some images.
            class_token: whether the first of the prefix tokens is a class token; otherwise all are registers.

        Raises:
            StorageError: they cannot be written, or exist with different layers or shapes.
        """
        self.put_names()
        self._shapes = {name: _shapes(layer) for name, layer in layers.items()}
        entries, made = [], []
        for number, (name, shapes) in enumerate(self._shapes.items()):
            grid = layers[name].grid
            entry = {"name": name, "dtype": self._dtype_name, "grid": grid and list(grid), "digest": ""}
            entry |= {"input": layers[name].input} if layers[name].input else {}
            entries.append(entry | ({"class_token": False} if shapes["prefix"][0] and not class_token else {}))
            for part, shape in shapes.items():
                if shape[0]:
                    made.append(self._create(f"{layer_folder(number)}/{part}", shape))
            for part, axes in (("squared_norm", ()), ("pooled", (shapes["tokens"][1],))):
                created = self.store.create(
                    f"{layer_folder(number)}/{part}",
                    (self.count, *axes),
                    (self._batch_size, *axes),
                    np.float64,
                    np.nan,
                    ("image", "channel")[: 1 + len(axes)],
                )
                made.append(created)
        stored = layers_of(self.store) if "layers" in self.store.attributes else entries
        if [_identity(layer) for layer in stored] != [_identity(entry) for entry in entries]:
            raise StorageError(f"{self.store.where} holds different layers; choose another folder for this capture")
        self.store.set({"layers": entries, "finished": False})
        self._nothing_there = any(made)

    def _create(self, name: str, shape: tuple[int, ...]) -> bool:
        fit = max(1, self._CHUNK_BYTES // (shape[0] * shape[1] * self._dtype.itemsize))
        # The largest divisor of the batch that fits.
        images = next(k for k in range(min(fit, self._batch_size), 0, -1) if self._batch_size % k == 0)
        return self.store.create(
            name,
            (self.count, *shape),
            (images, *shape),
            stored_dtype(self._dtype),
            _BFLOAT16_NAN if self._dtype == torch.bfloat16 else np.nan,
            ("image", "location" if name.endswith("tokens") else "prefix_token", "channel"),
        )

    def image_bytes(self, layers: Mapping[str, Representation]) -> int:
        """Bytes of one image on disk: tokens and prefix, and in float64 the means over locations and the norm."""
        return sum(
            (layer.tokens[0].numel() + layer.prefix[0].numel()) * self._dtype.itemsize + 8 * (layer.tokens.shape[2] + 1)
            for layer in layers.values()
        )

    def batch_is_there(self, number: int) -> bool:
        """Whether a batch was written completely; its tokens are not read."""
        if self._nothing_there:
            return False
        return self.store.intact(f"{layer_folder(len(self._shapes) - 1)}/squared_norm", (self.rows[number],))

    def begin(self, batch: ImageBatch) -> None:
        """See `LayerConsumer`; the images of a batch are consecutive, and `declare` comes before."""
        start = int(batch.numbers[0])
        self._names, self._where = batch.ids, (slice(start, start + len(batch.ids)),)
        self._norms: dict[str, np.ndarray] = {}

    def take(self, model: str, layer: str, representation: Representation) -> None:
        """Write one layer of a batch and its mean over locations; see `LayerConsumer`.

        Raises:
            StorageError: it cannot be written.
            RepresentationError: NaN or infinity, values beyond the range of the dtype, or images of a different size.
            LayerError: the layer did not run for the first image.
        """
        require_finite(model, layer, first_nonfinite(representation.tokens), self._names)
        name, shapes = finished_name(layer, self._shapes), _shapes(representation)
        if name not in self._shapes:
            raise LayerError(f"layer {layer!r} ran for image {self._names[0]!r}, but not for the first one")
        if shapes != self._shapes[name]:
            raise RepresentationError(
                f"layer {layer!r} holds {shapes['tokens']} tokens for image {self._names[0]!r} and "
                f"{self._shapes[name]['tokens']} for the first one; a capture needs images of one size"
            )
        require_finite(model, layer, first_nonfinite(representation.prefix), self._names)
        tokens, prefix = representation.tokens.to(self._dtype), representation.prefix.to(self._dtype)
        bad = next((bad for part in (tokens, prefix) if (bad := first_nonfinite(part)) is not None), None)
        if bad is not None:
            raise RepresentationError(
                f"layer {layer!r} of image {self._names[bad]!r} exceeds the range of {self._dtype}; capture as "
                "bfloat16 or float32"
            )
        folder = layer_folder(list(self._shapes).index(name))
        self.store.write(f"{folder}/pooled", self._where, tokens.mean(dim=1, dtype=torch.float64).cpu().numpy())
        for part, values in (("prefix", prefix), ("tokens", tokens)):
            if values.shape[1]:
                self.store.write(f"{folder}/{part}", self._where, _bits(values))
        self._norms[name] = squared_norms(tokens.float())

    def end(self, names: LayerNames) -> None:
        """Write the norms of all layers, which completes the batch; see `LayerConsumer`.

        Raises:
            StorageError: they cannot be written.
            LayerError: a layer did not run.
        """
        missing = [layer for layer in self._shapes if layer not in self._norms]
        if missing:
            first = self._names[0]
            raise LayerError(f"layer {missing[0]!r} did not run for image {first!r}, but did for the first one")
        for number, name in enumerate(self._shapes):
            self.store.write(f"{layer_folder(number)}/squared_norm", self._where, self._norms[name])
        self.store.claimed = True

    def finish(self) -> int | None:
        """Read and check everything once, add means and digests, and mark the capture as finished.

        Returns:
            None, or the number of a batch that must be written again, because a part is missing or damaged.

        Raises:
            StorageError: means or attributes cannot be written.
        """
        layers = [dict(layer) for layer in layers_of(self.store)]
        prefixed = [number for number, shapes in enumerate(self._shapes.values()) if shapes["prefix"][0]]
        for number, layer in enumerate(layers):
            folder, digest = layer_folder(number), hashlib.sha256()
            total = torch.zeros(self.store.array(f"{folder}/tokens").shape[1:], dtype=torch.float64)
            others = ["pooled", "squared_norm", *(["prefix"] if number in prefixed else [])]
            for batch, rows in enumerate(self.rows):
                where = (rows,)
                try:
                    values = self.store.read(f"{folder}/tokens", where)
                    for part in others:
                        self.store.read(f"{folder}/{part}", where)
                except StorageError:
                    return batch
                digest.update(np.ascontiguousarray(values).data)
                total += as_tensor(values, self._dtype).sum(dim=0, dtype=torch.float64)
            layer["digest"] = digest.hexdigest()
            self.store.put(f"{folder}/mean", (total / self.count).numpy(), ("location", "channel"))
        self.store.finish({"layers": layers}, array_names(len(layers), prefixed))
        return None


def _identity(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the entry of a layer must share with that of an earlier run, which may know less of the layer."""
    return {key: value for key, value in entry.items() if key not in ("digest", "input", "class_token")}


def _bits(values: Tensor) -> np.ndarray:
    """A tensor as an array; of bfloat16, its bits."""
    values = values.cpu().contiguous()
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()


def _shapes(representation: Representation) -> dict[str, tuple[int, ...]]:
    """Shapes of one image: `tokens` (S, C) and `prefix` (P, C)."""
    return {"tokens": tuple(representation.tokens.shape[1:]), "prefix": tuple(representation.prefix.shape[1:])}
