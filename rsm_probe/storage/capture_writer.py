"""Writing a capture batch by batch, and finishing it once all is there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsm_probe.errors import StorageError
from rsm_probe.storage.captures import layer_place
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
        store.put_names("image", ids, "image")
        store.put_names("label", labels, "image")

    def begin(self, layers: Mapping[str, Any], dtype: torch.dtype) -> None:
        """Makes the arrays of all layers, or finds them there.

        Args:
            layers: name -> representation of some images, with tokens (n, S, C), prefix (n, P, C) and grid.
            dtype: of tokens on disk.

        Raises:
            StorageError: they cannot be written; other layers or shapes are there.
        """
        about = []
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
                    self._create(f"{layer_place(number)}/{part}", (rows, channels), dtype)
            rows, channels = shapes["tokens"]
            for part, shape in (("squared_norm", ()), ("pooled", (channels,))):
                self.store.create(
                    f"{layer_place(number)}/{part}",
                    (self._count, *shape),
                    (self._batch, *shape),
                    np.float64,
                    np.nan,
                    ("image", "channel")[: 1 + len(shape)],
                )
        stored = [{**layer, "digest": ""} for layer in self.store.attributes.get("layers", about)]
        if stored != about:
            raise StorageError(f"{self.store.where} holds other layers; choose another place for this capture")
        self.store.set({"layers": about, "finished": False})
        self._names = list(layers)

    def _create(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
        fit = max(1, self._CHUNK_BYTES // (shape[0] * shape[1] * dtype.itemsize))
        # The largest divisor of the batch that fits.
        images = next(k for k in range(min(fit, self._batch), 0, -1) if self._batch % k == 0)
        halves = dtype == torch.bfloat16
        self.store.create(
            name,
            (self._count, *shape),
            (images, *shape),
            np.uint16 if halves else np.dtype(str(dtype).removeprefix("torch.")),
            _BFLOAT16_NAN if halves else np.nan,
            ("image", "location" if name.endswith("tokens") else "prefix_token", "channel"),
        )

    def batch_is_there(self, start: int) -> bool:
        """Whether a batch was written as a whole; its tokens are not read."""
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
        layers = [dict(layer) for layer in self.store.attributes["layers"]]
        for number, layer in enumerate(layers):
            place, digest = layer_place(number), hashlib.sha256()
            total = torch.zeros(self.store.array(f"{place}/tokens").shape[1:], dtype=torch.float64)
            others = [part for part in ("prefix", "pooled", "squared_norm") if f"{place}/{part}" in self.store]
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
        self.store.set({"layers": layers, "finished": True})
        return None


def _bits(values: Tensor) -> np.ndarray:
    """A tensor as NumPy can hold it."""
    values = values.cpu().contiguous()
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()
