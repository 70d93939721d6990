"""Writing a capture batch by batch, and finishing it once all is there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsm_probe.captures.captured_layers import array_names, layer_place, layers_of
from rsm_probe.errors import StorageError
from rsm_probe.storage.chunks import ChunkStore

# Tensors of this kind are stored as their bits, since NumPy lacks it; the fill value is one of its NaNs.
_BFLOAT16_NAN = 0x7FC0


class CaptureWriter:
    """Fills a capture batch by batch; batches that are there are known by their norms, which are written last.

    Args:
        store: to write into.
        ids: names of the images.
        labels: their labels.
        batches: images in each batch but the last; chunks never cross batches.
    """

    # So many bytes per chunk were written and read fastest.
    _CHUNK_BYTES = 4 << 20

    def __init__(self, store: ChunkStore, ids: Sequence[str], labels: Sequence[str], batches: int) -> None:
        self.store = store
        self._count, self._batch = len(ids), batches
        self._ids, self._labels = ids, labels

    def put_names(self) -> None:
        """Writes the names of the images, where they are not there.

        Raises:
            StorageError: they cannot be written.
        """
        self.store.put_names("image", self._ids, "image")
        self.store.put_names("label", self._labels, "image")

    def begin(self, layers: Mapping[str, Any], dtype: torch.dtype) -> None:
        """Makes the arrays of all layers, or finds them there. Where one had to be made, no batch is there.

        Args:
            layers: name -> representation of some images, with tokens (n, S, C), prefix (n, P, C) and grid.
            dtype: of tokens on disk.

        Raises:
            StorageError: they cannot be written; other layers or shapes are there.
        """
        self.put_names()
        about, made = [], []
        self._prefixed = [number for number, kept in enumerate(layers.values()) if kept.prefix.shape[1]]
        for number, (name, kept) in enumerate(layers.items()):
            shapes = {"tokens": kept.tokens.shape[1:], "prefix": kept.prefix.shape[1:]}
            about.append(
                {
                    "name": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "grid": kept.grid and list(kept.grid),
                    "digest": "",
                }
            )
            for part, (rows, channels) in shapes.items():
                if rows:
                    made.append(self._create(f"{layer_place(number)}/{part}", (rows, channels), dtype))
            rows, channels = shapes["tokens"]
            for part, shape in (("squared_norm", ()), ("pooled", (channels,))):
                created = self.store.create(
                    f"{layer_place(number)}/{part}",
                    (self._count, *shape),
                    (self._batch, *shape),
                    np.float64,
                    np.nan,
                    ("image", "channel")[: 1 + len(shape)],
                )
                made.append(created)
        stored = layers_of(self.store) if "layers" in self.store.attributes else about
        if [{**layer, "digest": ""} for layer in stored] != about:
            raise StorageError(f"{self.store.where} holds other layers; choose another place for this capture")
        self.store.set({"layers": about, "finished": False})
        self._names = list(layers)
        self._nothing_there = any(made)

    def _create(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> bool:
        fit = max(1, self._CHUNK_BYTES // (shape[0] * shape[1] * dtype.itemsize))
        # The largest divisor of the batch that fits.
        images = next(k for k in range(min(fit, self._batch), 0, -1) if self._batch % k == 0)
        halves = dtype == torch.bfloat16
        return self.store.create(
            name,
            (self._count, *shape),
            (images, *shape),
            np.uint16 if halves else np.dtype(str(dtype).removeprefix("torch.")),
            _BFLOAT16_NAN if halves else np.nan,
            ("image", "location" if name.endswith("tokens") else "prefix_token", "channel"),
        )

    def batch_is_there(self, start: int) -> bool:
        """Whether a batch was written as a whole; its tokens are not read."""
        if self._nothing_there:
            return False
        return self.store.intact(f"{layer_place(len(self._names) - 1)}/squared_norm", (self._rows(start),))

    def write_layer(self, start: int, name: str, tokens: Tensor, prefix: Tensor) -> None:
        """Writes one layer of a batch, and the mean over locations with it.

        Args:
            start: number of the batch's first image.
            name: of the layer.
            tokens: (n, S, C), in the dtype on disk.
            prefix: (n, P, C), in the dtype on disk.

        Raises:
            StorageError: it cannot be written.
        """
        place, where = layer_place(self._names.index(name)), (self._rows(start),)
        self.store.write(f"{place}/pooled", where, tokens.mean(dim=1, dtype=torch.float64).cpu().numpy())
        for part, values in (("prefix", prefix), ("tokens", tokens)):
            if values.shape[1]:
                self.store.write(f"{place}/{part}", where, _bits(values))

    def end_batch(self, start: int, norms: Mapping[str, np.ndarray]) -> None:
        """Writes the norms of all layers: name -> |z_i|^2 (n,). From now on the batch is there.

        Raises:
            StorageError: they cannot be written.
        """
        for number, name in enumerate(self._names):
            self.store.write(f"{layer_place(number)}/squared_norm", (self._rows(start),), norms[name])

    def _rows(self, start: int) -> slice:
        return slice(start, min(start + self._batch, self._count))

    def finish(self) -> int | None:
        """Reads everything once: checks it, and adds means and digests. Then the capture is finished.

        Returns:
            None, or the first image of a batch of which a part is missing or damaged, so that it must be written again.

        Raises:
            StorageError: means or attributes cannot be written.
        """
        layers = [dict(layer) for layer in layers_of(self.store)]
        for number, layer in enumerate(layers):
            place, digest = layer_place(number), hashlib.sha256()
            total = torch.zeros(self.store.array(f"{place}/tokens").shape[1:], dtype=torch.float64)
            others = ["pooled", "squared_norm", *(["prefix"] if number in self._prefixed else [])]
            for start in range(0, self._count, self._batch):
                where = (self._rows(start),)
                try:
                    values = self.store.read(f"{place}/tokens", where)
                    for part in others:
                        self.store.read(f"{place}/{part}", where)
                except StorageError:
                    return start
                digest.update(np.ascontiguousarray(values).data)
                tokens = torch.from_numpy(values)
                tokens = tokens.view(torch.bfloat16) if layer["dtype"] == "bfloat16" else tokens
                total += tokens.sum(dim=0, dtype=torch.float64)
            layer["digest"] = digest.hexdigest()
            self.store.put(f"{place}/mean", (total / self._count).numpy(), ("location", "channel"))
        self.store.finish({"layers": layers}, array_names(len(layers), self._prefixed))
        return None


def _bits(values: Tensor) -> np.ndarray:
    """A tensor as NumPy can hold it."""
    values = values.cpu().contiguous()
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()
