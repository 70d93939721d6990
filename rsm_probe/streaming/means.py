"""Means over all images for centring: computed in a first pass, subtracted in the second."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rsm_probe.arrays import first_nonfinite
from rsm_probe.errors import RepresentationError, StorageError
from rsm_probe.execution.execution import Execution
from rsm_probe.forward.layer_consumer import ImageBatch, finished_name
from rsm_probe.forward.layer_stream import LayerStream
from rsm_probe.probe.representation import Representation
from rsm_probe.similarity.centering import Centering, check_centering, subtract_mean, token_mean
from rsm_probe.sources.images.batches import BatchSource
from rsm_probe.storage.files import load_arrays, save_arrays
from rsm_probe.stored_products.product_store import ProductStore
from rsm_probe.streaming.batch_consumer import BatchConsumer, TakenLayer


class Means(BatchConsumer[Tensor]):
    """Means over all images, computed in a first pass, that `Accumulator` subtracts in the second.

    `update` adds a batch, as `Accumulator.update` does; all images have the same weight. It also raises
    RepresentationError if layers, locations or channels differ from those of previous batches.

    Args:
        centering: "location-mean" (the paper's) or "channel-mean" (unchanged by permutations of locations).

    Attributes:
        images: number of images so far.
        batches: number of batches so far.

    Raises:
        RepresentationError: an unknown centering, or None.
    """

    def __init__(self, centering: Centering) -> None:
        super().__init__()
        checked = check_centering(centering)
        if checked is None:
            raise RepresentationError("Means needs a centering: 'location-mean' or 'channel-mean'")
        self.centering: Centering = checked
        self.images = self.batches = 0
        self._sums: dict[tuple[str, str], Tensor] = {}

    def __repr__(self) -> str:
        return f"Means({self.centering!r}: {self.batches} batches, {self.images} images, {len(self._sums)} layers)"

    def _work_on(self, model: str, layer: str, representation: Representation) -> Tensor:
        tokens = representation.tokens
        return token_mean(tokens, self.centering).cpu() * len(tokens)

    def _accepts(self, layers: Sequence[tuple[str, str]], images: int) -> bool:
        now = dict.fromkeys(layers)
        changed = [key for key in {**self._sums, **now} if (key in self._sums) != (key in now)]
        if self._sums and changed:
            model, layer = changed[0]
            raise RepresentationError(
                f"layer {layer!r} of model {model!r} is "
                + ("missing from this batch but was in" if changed[0] in self._sums else "in this batch but not in")
                + " previous batches; the means of all layers must cover the same images"
            )
        return True

    def _add(self, batch: ImageBatch, taken: Mapping[tuple[str, str], TakenLayer[Tensor]]) -> None:
        totals = {key: part.work for key, part in taken.items() if part.work is not None}
        for (model, layer), total in totals.items():
            before = self._sums.get((model, layer))
            if before is not None and before.shape != total.shape:
                raise RepresentationError(
                    f"layer {layer!r} had {before.shape[1]} locations of {before.shape[2]} channels and now has "
                    f"{total.shape[1]} of {total.shape[2]}; resize all images to one size"
                    + (" or use 'channel-mean'" if before.shape[2] == total.shape[2] else "")
                )
        self._sums |= {key: self._sums[key] + total if key in self._sums else total for key, total in totals.items()}
        self.images += next(iter(taken.values())).images
        self.batches += 1

    def subtract(self, model: str, layer: str, tokens: Tensor) -> Tensor:
        """Subtract the mean of a layer from its tokens (N, S, C).

        Raises:
            RepresentationError: the first pass did not include this layer, or a difference overflows.
        """
        known = {name: total for (of_model, name), total in self._sums.items() if of_model == model}
        name = finished_name(layer, known)
        if name not in known:
            raise RepresentationError(
                f"there is no mean for layer {layer!r} of model {model!r}; update the means in a first pass"
            )
        return _subtracted(tokens, known[name] / self.images, model, layer)

    def mean_of(self, model: str, layer: str) -> Tensor:
        """The mean of a layer (S, C) or (1, C), float64."""
        return self._sums[model, layer] / self.images

    def state(self) -> dict[str, np.ndarray]:
        """The sums as plain arrays, (S, C) per layer or (1, C), from which `restore` continues."""
        names = [list(key) for key in self._sums]
        sums = {f"sum{k}": total.numpy() for k, total in enumerate(self._sums.values())}
        return {
            "batches": np.array(self.batches),
            "images": np.array(self.images),
            "names": np.array(names, dtype=np.str_).reshape(-1, 2),
            **sums,
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from the arrays of `state`, (S, C) or (1, C) per layer."""
        # States of earlier versions do not include the number of batches.
        self.images, self.batches = int(state["images"]), int(state.get("batches", 0))
        self._sums = {
            (str(model), str(layer)): torch.from_numpy(state[f"sum{k}"])
            for k, (model, layer) in enumerate(state["names"])
        }


class LayerMeans:
    """Means of single layers, which need not come from one pass; see `Means.subtract`.

    Args:
        means: (model, layer) -> mean (S, C) or (1, C), float64.
    """

    def __init__(self, means: Mapping[tuple[str, str], Tensor]) -> None:
        self._means: dict[str, dict[str, Tensor]] = {model: {} for model, _ in means}
        for (model, layer), mean in means.items():
            self._means[model][layer] = mean

    def subtract(self, model: str, layer: str, tokens: Tensor) -> Tensor:
        """Subtract the mean of a layer from its tokens (N, S, C).

        Raises:
            RepresentationError: a difference overflows.
        """
        known = self._means[model]
        return _subtracted(tokens, known[finished_name(layer, known)], model, layer)


def gather_means(stream: LayerStream, centering: Centering, execution: Execution) -> Means:
    """Run a first pass over the images for the means of all layers; `execution` says whether to show progress."""
    means = Means(centering)
    with execution.bar("first pass: means", stream.source.count, "image", position=0) as bar:
        for batch in stream.source.batches():
            stream.feed(batch, means)
            bar.update(len(batch))
    return means


class StoredMeans:
    """Means in the folder of a sweep, which later sweeps there subtract, too.

    They are over the images with which the store began: what is centred differently cannot be compared.

    Args:
        folder: the folder of the sweep.
        store: its store.
        centering: which mean.
        key_of: (model, layer) -> key of the layer in the store.
    """

    def __init__(
        self, folder: Path, store: ProductStore, centering: Centering, key_of: Callable[[str, str], str]
    ) -> None:
        self._folder, self._store, self._centering, self._key_of = folder, store, centering, key_of

    @property
    def _known(self) -> dict[str, list[str]]:
        """Key of a layer -> its file, its model and name there, and the number of images."""
        return self._store.chunks.attribute("means", dict, {})

    def _file(self, name: str) -> Path:
        return self._folder / "means" / f"{name}.npz"

    def lacking(self, layers: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
        """Those of some (model, layer) pairs whose means are not known: model -> layers."""
        known, lacking = self._known, dict[str, list[str]]()
        for model, layer in layers:
            of_layer = known.get(self._key_of(model, layer))
            if of_layer is None or not self._file(of_layer[0]).exists():
                lacking.setdefault(model, []).append(layer)
        return lacking

    def gather(
        self,
        lacking: Mapping[str, Sequence[str]],
        stream: LayerStream,
        source: BatchSource,
        on_batch: Callable[[], None],
        execution: Execution,
    ) -> dict[str, list[str]]:
        """Pass the images through the models, and save the sums after every batch.

        Args:
            lacking: model -> layers.
            stream: the models.
            source: the images.
            on_batch: called before the sums of a batch are saved.
            execution: whether to show progress.

        Returns:
            What `note` takes.

        Raises:
            StorageError: sums on disk cannot be continued; the message says what to remove.
        """
        keys = {(model, layer): self._key_of(model, layer) for model in lacking for layer in lacking[model]}
        content = [sorted(keys.values()), source.fingerprint(), list(source.sizes)]
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
        means = self._restored(name) if self._file(name).exists() else Means(self._centering)
        with execution.bar("first pass: means", source.count, "image", done=means.images, position=0) as bar:
            for batch in source.batches(range(means.batches)):
                stream.feed(batch, means, lacking)
                on_batch()
                save_arrays(self._file(name), means.state())
                bar.update(len(batch))
        return {key: [name, *layer, str(means.images)] for layer, key in keys.items()}

    def note(self, gathered: Mapping[str, list[str]]) -> None:
        """Write into the store which means are there; see `gather`."""
        self._store.chunks.set({"means": {**self._known, **gathered}})

    def over_fewer(self, layers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Those of some (model, layer) pairs whose means are over fewer images than the store began with."""
        known, every = self._known, len(self._store.parts[0].ids)
        keys = {layer: self._key_of(*layer) for layer in layers}
        counts = {layer: known.get(key, [])[3:] for layer, key in keys.items()}
        return [layer for layer, images in counts.items() if images and int(images[0]) < every]

    def of(self, layers: Iterable[tuple[str, str]]) -> LayerMeans:
        """The means of some (model, layer) pairs, all of which are known."""
        known, read, means = self._known, dict[str, Means](), dict[tuple[str, str], Tensor]()
        for model, layer in layers:
            name, *there = known[self._key_of(model, layer)][:3]
            if name not in read:
                read[name] = self._restored(name)
            means[model, layer] = read[name].mean_of(*there)
        return LayerMeans(means)

    def _restored(self, name: str) -> Means:
        means, file = Means(self._centering), self._file(name)
        try:
            means.restore(load_arrays(file))
        except (KeyError, ValueError, TypeError) as error:
            raise StorageError(
                f"cannot continue from {file}: {error}. Remove this file and run again: only the pass over the images "
                f"that it belongs to starts over"
            ) from error
        return means


def _subtracted(tokens: Tensor, mean: Tensor, model: str, layer: str) -> Tensor:
    centred = subtract_mean(tokens, mean)
    # The difference of two large finite numbers may overflow.
    if (bad := first_nonfinite(centred)) is not None and first_nonfinite(tokens) is None:
        raise RepresentationError(
            f"layer {layer!r} of model {model!r}: image {bad} of this batch minus the mean overflows "
            f"{tokens.dtype}; scale the outputs of the layer"
        )
    return centred
