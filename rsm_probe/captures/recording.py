"""`capture`: pass a whole set of images through a model, and write its layers to disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rsm_probe.captures.captured_layers import DTYPES, KIND, Capture, is_whole
from rsm_probe.captures.writer import CaptureWriter
from rsm_probe.checks import brief, require_whole
from rsm_probe.errors import ImageError, ModelError, RepresentationError, StorageError
from rsm_probe.execution.execution import Execution
from rsm_probe.forward.layer_stream import LayerStream, layer_names, reading_settings, readings_of
from rsm_probe.forward.token_kinds import has_class_token
from rsm_probe.probe.layers import Layers
from rsm_probe.probe.representation import Layout
from rsm_probe.sources.images.any_images import as_images
from rsm_probe.sources.images.batches import RawBatch, SetBatches
from rsm_probe.sources.images.contents.item_labels import ItemLabels
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.loaders import ImageLoader
from rsm_probe.sources.loading import load_model
from rsm_probe.sources.models.reading import Forward, Reading, require_continuable
from rsm_probe.storage.chunks import ChunkStore
from rsm_probe.storage.differences import as_stored, has_settings
from rsm_probe.storage.disk_space import require_space
from rsm_probe.storage.paths import path_or_url

# The attribute that holds hashes of the batches of a loader.
_ORDER = "batches"
# Images per forward pass, unless said otherwise.
BATCH_SIZE = 64


def capture(
    model: Any,
    images: Any,
    layers: Layers = "blocks",
    out: str | Path = "capture.zarr",
    *,
    dtype: str | torch.dtype = "float32",
    batch_size: int = BATCH_SIZE,
    ids: Sequence[str] | None = None,
    labels: Any = None,
    tokens: str | Sequence[str] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    forward: Forward | None = None,
    method: str | None = None,
    inputs: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Capture:
    """Write the representations of all layers for all images into a folder, for comparisons of all pairs.

    Images pass once, in order, in batches of `batch_size`. The same call resumes after an interruption, with the batch
    that was interrupted. A finished capture is opened, and only batches with missing chunks are computed again. Of a
    loader, the first, middle and last batches must be those of that capture; of a stream or a shuffling one, the first.

    Args:
        model: a module, a `LoadedModel`, or a name; see `rsm_probe.load_model`.
        images: as for `sweep`; give `rsm_probe.sources.as_images(images, ...)` to name axes, clips, or the keys of
            items. Batches of a `DataLoader` are taken as they come.
        layers: see `Probe`.
        out: a folder, or a URL of a file system that fsspec knows.
        dtype: of tokens on disk: "float32", "float16" or "bfloat16". Half precision takes half the space.
        batch_size: images per forward pass. A loader decides on it itself.
        ids: one name per image, in place of numbers or file names.
        labels: one label per image, as text or whole numbers, in place of those that are known.
        tokens: which vectors of a layer are kept: "locations" (the default), "class" for the class token, or "mean",
            "max" or "gem" over locations; or several of these, which are layers such as `blocks.3@class`.
        layouts: how to read outputs of layers, as in `Probe`.
        forward: makes the call from the module and a batch, where it takes more than a batch of images. A capture
            resumes only with a function that can be imported from a module.
        method: the method whose calls are forward passes, as in `Probe`.
        inputs: the inputs that hold images, as in `Probe`.
        device: "auto" for a GPU if there is one, or "cpu", "cuda", "cuda:1", "mps". None leaves models and tokens
            where they are, and moves layers of captures to a GPU if there is one.
        progress: show the estimated cost and progress bars.

    Returns:
        The `Capture`: layer name -> `CapturedLayer`, which `rsm_probe.rsm` and `rsm_probe.nearest` take.

    Example:
        >>> import torch, rsm_probe
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
        >>> capture = rsm_probe.capture(model, torch.rand(6, 3, 8, 8), ["0", "1"], "capture.zarr")
        >>> capture["1"].shape, capture["1"].grid    # images, locations, channels
        ((6, 36, 4), (6, 6))

    Raises:
        ModelError: an unknown model.
        ImageError: an empty set, two images of one name, or different sizes after preprocessing.
        LayerError: unknown layers, or layers that do not run exactly once.
        CostError: progress is not True or False.
        RepresentationError: NaN or infinity, or values beyond the range of `dtype` (the message names layer and image).
        StorageError: `out` holds another capture (the message says what differs), is being written by another process,
            cannot be written, or the disk is too small.
    """
    reading = Reading(None, layouts, method, forward, inputs, tokens)
    images = as_images(images, ids=ids, labels=labels)
    return capture_layers(model, images, layers, out, dtype, batch_size, reading, Execution(device, progress=progress))


def capture_layers(
    model: Any,
    images: Any,
    layers: Layers,
    out: str | Path,
    dtype: str | torch.dtype,
    batch_size: int,
    reading: Reading,
    execution: Execution,
) -> Capture:
    """See `capture`; `reading` holds what is said of all models, apart from their layers."""
    where = path_or_url(out)
    stored_as = DTYPES.get(str(dtype).removeprefix("torch."))
    if stored_as is None:
        raise RepresentationError(f"a capture is of dtype {', '.join(DTYPES)}, found {brief(dtype)}")
    require_whole(batch_size, "batch_size", 1, RepresentationError)
    layers = layer_names(layers)
    loaded, source = load_model(model), batch_source(as_images(images), batch_size)
    models = {loaded.name: loaded}
    readings = readings_of(models, replace(reading, layers=layers))
    # The device of a model is not checked here: a model without values is refused below, by the name of its layer.
    device = loaded.device if execution.device is None else execution.device_or("cpu", ModelError)
    settings = as_stored(
        {
            "model": loaded.name,
            "weights": loaded.fingerprint,
            "images": source.name,
            "content": source.fingerprint(),
            "layers": layers,
            "dtype": str(stored_as).removeprefix("torch."),
            "batch_size": source.sizes[0] if isinstance(source, ImageLoader) else batch_size,
            "device": device.type,
            **reading_settings(models, readings),
        }
    )
    source.repeat(f"a capture in {where}", needed=False)
    # Refuse or read an existing capture without a lock and without writing.
    existing = ChunkStore.existing(where, KIND)
    if existing is not None:
        _require_settings(existing, settings, source)
        ids, labels = _names(existing, source)
        if is_whole(existing, ids, labels):
            source.require_same({"hashes": np.array(existing.attribute(_ORDER, list, []), np.str_)})
            return Capture(existing)
        require_continuable(where, readings)
    with ChunkStore.writing(where, KIND) as store:
        _require_settings(store, settings, source)
        if _ORDER in store.attributes:
            source.restore({"hashes": np.array(store.attribute(_ORDER, list), np.str_)})
        count_images(source)
        ids, labels = _names(store, source)
        writer = CaptureWriter(store, ids, labels, settings["batch_size"], stored_as, source.sizes)
        if store.finished:  # only names may be missing
            writer.put_names()
        if not is_whole(store, ids, labels):
            stream = LayerStream(models, source, readings, execution.device)
            with stream.evaluating():
                _record(stream, writer, settings, execution)
    return Capture.open(where)


def batch_source(images: ImageSet | ImageLoader, batch_size: int) -> SetBatches | ImageLoader:
    """The batches of a capture: those of a loader as they come, or an image set in its order.

    Raises:
        ImageError: a batch_size is given for a loader, which decides on it itself.
    """
    if isinstance(images, ImageSet):
        count = len(images)
        starts = range(0, count, batch_size)
        return SetBatches(
            images, [np.arange(start, min(start + batch_size, count)) for start in starts], np.arange(count)
        )
    if batch_size != BATCH_SIZE:
        raise ImageError(
            f"batch_size={brief(batch_size)} applies to images that a capture divides itself, but {images.name} comes "
            f"from a loader, whose batches are taken as they come; leave it out, or give the loader's data set"
        )
    return images.fresh()


def count_images(source: SetBatches | ImageLoader) -> None:
    """Pass over a loader once where the sizes of its batches are unknown, because a capture declares them first."""
    if isinstance(source, ImageLoader) and not source.sizes_known:
        source.repeat("a capture of a loader that does not give its number of images", needed=True)
        source.measure()


def _names(store: ChunkStore, source: SetBatches | ImageLoader) -> tuple[Sequence[str], Sequence[str]]:
    """Ids and labels of the images; labels that only a pass shows are those in the store, or ""."""
    if isinstance(source, SetBatches):
        ids = source.images.ids
        if not isinstance(source.images.labels, ItemLabels):
            return ids, source.images.labels
    else:
        ids = [str(k) for k in range(sum(source.sizes))] if source.ids is None else source.ids
        if source.labels:
            return ids, source.labels
    with suppress(StorageError):  # damaged: the next pass shows them again
        if "label" in store:
            return ids, [str(label) for label in store.read("label")]
    return ids, [""] * len(ids)


def _require_settings(store: ChunkStore, settings: dict[str, Any], source: SetBatches | ImageLoader) -> None:
    names = {"image": source.images.ids} if isinstance(source, SetBatches) else {}
    try:
        has_settings(store, settings, "capture", names)
    except StorageError as error:
        if "content was" not in str(error):
            raise
        raise StorageError(f"{error}{source.advice}") from None


def _record(stream: LayerStream, writer: CaptureWriter, settings: dict[str, Any], execution: Execution) -> None:
    """Write the missing batches, and finish the capture."""
    store, source, count = writer.store, stream.source, writer.count
    (layers,), (model,) = stream.sample().representations.values(), stream.models.values()
    image_bytes = writer.image_bytes(layers)
    if "settings" not in store.attributes:  # a disk that is too small leaves the folder free for different settings
        require_space(store.where, image_bytes * count)
    store.set({"settings": settings})
    writer.declare(layers, class_token=has_class_token(model.module))
    layer_count = len(layers)
    del layers
    done = {number for number in range(len(writer.rows)) if writer.batch_is_there(number)}
    left = sum(rows.stop - rows.start for number, rows in enumerate(writer.rows) if number not in done)
    space = require_space(store.where, image_bytes * left)
    execution.say(f"capture: {left} images, {layer_count} layers; {space}")
    with execution.bar("capturing", count, "image", done=count - left) as bar:
        for batch in source.batches(done):
            _write(stream, writer, batch)
            bar.update(len(batch))
        if isinstance(source, ImageLoader):
            writer.labels = source.labels_seen
            writer.put_names()
        elif isinstance(source, SetBatches) and isinstance(source.images.labels, ItemLabels):
            writer.labels = list(source.images.labels)
            writer.put_names()
        repaired: set[int] = set()
        while (broken := writer.finish()) is not None:
            if broken in repaired:
                raise StorageError(f"{store.where}: data read back differs from what was written")
            repaired.add(broken)
            for batch in source.batches(set(range(len(writer.rows))) - {broken}):
                _write(stream, writer, batch)


def _write(stream: LayerStream, writer: CaptureWriter, batch: RawBatch) -> None:
    if state := stream.source.state():  # before the batch, which is recognised by it
        writer.store.set({_ORDER: state["hashes"].tolist()})
    stream.feed(batch, writer)
