"""A whole set of images through a model, and what its layers answer onto disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rsm_probe.arrays import first_nonfinite
from rsm_probe.captures.captured_layers import DTYPES, KIND, Capture, is_whole
from rsm_probe.captures.writer import CaptureWriter
from rsm_probe.checks import brief, require_texts, require_whole
from rsm_probe.errors import LayerError, ModelError, RepresentationError, StorageError
from rsm_probe.execution.devices import find_device
from rsm_probe.matching.methods.identity import squared_norms
from rsm_probe.probe.layers import Layers
from rsm_probe.probe.probe import Probe
from rsm_probe.probe.representation import Representation, require_finite
from rsm_probe.probe.wrappers import evaluating
from rsm_probe.sources.images.any_images import as_images
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.loading import load_model
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.preprocessing import prepared, warn_of_plain_pixels
from rsm_probe.storage.chunks import ChunkStore
from rsm_probe.storage.differences import differences, other_image
from rsm_probe.storage.disk_space import require_space
from rsm_probe.storage.places import place

# Images that show the shapes of the layers; a prime, so that it is no number of locations.
_SAMPLE = 11


def capture(
    model: Any,
    images: Any,
    layers: Layers = "blocks",
    out: str | Path = "capture.zarr",
    *,
    dtype: str | torch.dtype = "float32",
    batch_size: int = 64,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Capture:
    """Writes the representations of all layers for all images into a folder, for comparisons of all pairs.

    Images pass once, in their order, in batches of `batch_size`. Interrupted, the same call continues with the batch
    under way. A capture that is finished is opened, and only batches of which a chunk is missing are made again.

    Args:
        model: a module, a `LoadedModel`, or a name; see `rsm_probe.load_model`.
        images: see `rsm_probe.as_images`.
        layers: see `Probe`.
        out: a folder, or a URL of a file system that fsspec knows.
        dtype: of tokens on disk: "float32", "float16" or "bfloat16". Half precision takes half the space.
        batch_size: images per forward pass.
        device: where the model runs, which moves it: "auto" for a GPU where there is one, or "cpu", "cuda:1", "mps".
            None leaves it where it is.
        progress: show what is needed, and a bar.

    Returns:
        The `Capture`: layer name -> `CapturedLayer`, which `rsm_probe.rsm` and `rsm_probe.nearest` take.

    Raises:
        ModelError: an unknown model.
        ImageError: no images, two of one name, or of different sizes after preprocessing.
        LayerError: unknown layers, or layers that do not run exactly once.
        RepresentationError: NaN or infinity, or beyond the range of `dtype` (the message names layer and image).
        StorageError: `out` holds another capture (the message says what differs), is being written by another process,
            cannot be written, or the disk is too small.
    """
    where = place(out)
    stored_as = DTYPES.get(str(dtype).removeprefix("torch."))
    if stored_as is None:
        raise RepresentationError(f"a capture is of dtype {', '.join(DTYPES)}, found {brief(dtype)}")
    require_whole(batch_size, "batch_size", 1, RepresentationError)
    layers = layers if isinstance(layers, str) else require_texts(layers, "layers", LayerError)
    loaded, chosen = load_model(model), as_images(images)
    moved_to = None if device is None else find_device(device, ModelError)
    settings = _settings(
        loaded, chosen, layers, str(stored_as).removeprefix("torch."), batch_size, (moved_to or loaded.device).type
    )
    # What is there is refused, or read, without a lock and without writing.
    found = ChunkStore.existing(where, KIND)
    if found is not None:
        _require_same(found, settings, chosen)
        if is_whole(found, chosen.ids, chosen.labels):
            return Capture(found)
    with ChunkStore.writing(where, KIND) as store:
        _require_same(store, settings, chosen)
        writer = CaptureWriter(store, chosen.ids, chosen.labels, batch_size)
        if store.finished:  # names may have been lost, and nothing else
            writer.put_names()
        if not is_whole(store, chosen.ids, chosen.labels):
            warn_of_plain_pixels([loaded], chosen)
            if moved_to is not None:
                loaded.module.to(moved_to)
            with evaluating(loaded.module), Probe(loaded.module, layers) as probe:
                _Capturing(probe, loaded, chosen, writer, stored_as, batch_size).run(settings, progress)
    return Capture.open(where)


class _Capturing:
    """The passes of one capture."""

    def __init__(
        self,
        probe: Probe,
        model: LoadedModel,
        images: ImageSet,
        writer: CaptureWriter,
        dtype: torch.dtype,
        batch_size: int,
    ) -> None:
        self.probe, self.model, self.images, self.writer, self.dtype = probe, model, images, writer, dtype
        self.store = writer.store
        self.batch_size = batch_size
        self.shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def run(self, settings: dict[str, Any], progress: bool) -> None:
        self._forward(np.arange(min(_SAMPLE, len(self.images))))
        seen: dict[str, Representation] = dict(self.probe.representations)
        self.shapes = {layer: (kept.tokens.shape[1:], kept.prefix.shape[1:]) for layer, kept in seen.items()}
        # Beside the tokens, means over locations and norms, in float64.
        size = sum(
            (tokens.numel() + prefix.numel()) * self.dtype.itemsize + 8 * (tokens[1] + 1)
            for tokens, prefix in self.shapes.values()
        )
        if "settings" not in self.store.attributes:  # a place where nothing fits stays free for other settings
            require_space(self.store.where, size * len(self.images))
        starts = range(0, len(self.images), self.batch_size)
        self.store.set({"settings": settings})
        self.writer.begin(seen, self.dtype)
        del seen
        done = [start for start in starts if self.writer.batch_is_there(start)]
        left = len(self.images) - sum(min(self.batch_size, len(self.images) - start) for start in done)
        about = require_space(self.store.where, size * left)
        if progress:
            tqdm.write(f"capture: {left} images, {len(self.shapes)} layers; {about}", file=sys.stderr)
        with tqdm(
            desc="capturing",
            total=len(self.images),
            initial=len(self.images) - left,
            unit="image",
            disable=not progress,
        ) as bar:
            for start in sorted(set(starts) - set(done)):
                bar.update(self._batch(start))
            repaired: set[int] = set()
            while (broken := self.writer.finish()) is not None:
                if broken in repaired:
                    raise StorageError(f"{self.store.where}: what is written there is not what is read back")
                repaired.add(broken)
                self._batch(broken)

    def _batch(self, start: int) -> int:
        numbers = np.arange(start, min(start + self.batch_size, len(self.images)))
        names = [self.images.ids[int(k)] for k in numbers]
        norms: dict[str, np.ndarray] = {}

        def write(layer: str, kept: Representation) -> None:
            require_finite(self.model.name, layer, first_nonfinite(kept.tokens), names)
            if layer not in self.shapes:
                raise LayerError(f"layer {layer!r} ran for image {names[0]!r}, and did not for the first one")
            shapes = kept.tokens.shape[1:], kept.prefix.shape[1:]
            if shapes != self.shapes[layer]:
                raise RepresentationError(
                    f"layer {layer!r} holds {tuple(shapes[0])} tokens for image {names[0]!r} and "
                    f"{tuple(self.shapes[layer][0])} for the first one; a capture needs images of one size"
                )
            tokens, prefix = kept.tokens.to(self.dtype), kept.prefix.to(self.dtype)
            require_finite(self.model.name, layer, first_nonfinite(kept.prefix), names)
            bad = next((bad for part in (tokens, prefix) if (bad := first_nonfinite(part)) is not None), None)
            if bad is not None:
                raise RepresentationError(
                    f"layer {layer!r} of image {names[bad]!r} exceeds the range of {self.dtype}; capture as "
                    "bfloat16 or float32"
                )
            self.writer.write_layer(start, layer, tokens, prefix)
            norms[layer] = squared_norms(tokens.float())

        # Layer by layer, as soon as each has run: a batch of all layers may not fit into memory.
        self.probe.reduce = write
        self._forward(numbers)
        missing = [layer for layer in self.shapes if layer not in norms]
        if missing:
            raise LayerError(f"layer {missing[0]!r} did not run for image {names[0]!r}, as it did for the first one")
        self.writer.end_batch(start, norms)
        self.store.claimed = True
        return len(numbers)

    def _forward(self, numbers: np.ndarray) -> None:
        raw: Sequence[Any] = [self.images[int(number)] for number in numbers]
        batch: Tensor = prepared(raw, self.model.preprocess, self.images, numbers)
        with torch.no_grad():
            self.model.module(batch.to(self.model.device))


def _settings(
    model: LoadedModel, images: ImageSet, layers: Layers, dtype: str, batch_size: int, device: str
) -> dict[str, Any]:
    """Everything that decides the values, as JSON gives it back."""
    settings = {
        "model": model.name,
        "weights": model.fingerprint,
        "images": images.name,
        "content": images.fingerprint(),
        "layers": layers if isinstance(layers, str) else list(layers),
        "dtype": dtype,
        "batch_size": batch_size,
        "device": device,
    }
    return dict(json.loads(json.dumps(settings)))


def _require_same(store: ChunkStore, settings: dict[str, Any], images: ImageSet) -> None:
    if "settings" not in store.attributes:
        if store.finished:
            raise store.damaged("its attribute 'settings' is missing")
        return
    stored = store.attribute("settings", dict)
    if stored == settings:
        return
    changes = differences(stored, settings)
    if stored.get("content") != settings["content"] and "image" in store:
        other = other_image([str(name) for name in store.read("image")], images.ids)
        changes = other or f"images of the same names have other content; {changes}"
    raise StorageError(f"{store.where} is another capture ({changes}); choose another place or remove it")
