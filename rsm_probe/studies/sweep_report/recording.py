"""Choose what the page of a sweep shows, and store it while models and images are at hand.

RSMs come from the store of the sweep. Only the matched locations of the pairs on the page are computed again: the
mini-batch that they belong to passes through the models once more.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rsm_probe.comparison.grid import RsmKey
from rsm_probe.errors import ImageError, RsmProbeError
from rsm_probe.figures import thinned
from rsm_probe.forward.layer_consumer import ImageBatch, LayerNames, finished_name
from rsm_probe.forward.layer_stream import LayerStream
from rsm_probe.matching.matches import match
from rsm_probe.matching.matching import Matching
from rsm_probe.probe.representation import Representation
from rsm_probe.report.page import Thumbnail
from rsm_probe.report.thumbnails import joining_lines, thumbnail
from rsm_probe.sources.images.batches import BatchSource, RawBatch, batch_of
from rsm_probe.sources.images.clips import Clip
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.models.preprocessing import prepared
from rsm_probe.stored_products.product_store import ProductStore
from rsm_probe.streaming.batch_consumer import Centred
from rsm_probe.streaming.means import StoredMeans
from rsm_probe.streaming.result import SweepResult
from rsm_probe.streaming.rsm_store import RsmStore
from rsm_probe.streaming.sweep_request import STORE, SweepRequest
from rsm_probe.studies.panels import semantic_matchings
from rsm_probe.studies.sweep_report.bootstrapping import intervals_of
from rsm_probe.studies.sweep_report.choosing import (
    changed_pairs,
    neighbours,
    query_images,
    rank_shares,
    sorted_by_label,
)
from rsm_probe.studies.sweep_report.shared_pictures import SharedPictures
from rsm_probe.studies.sweep_report.shown import Neighbours, RankChange, Shown, settings_hash

# Entries of all RSMs on the page, and the images of one, at least and at most.
_MOST_ENTRIES, _FEWEST_IMAGES, _MOST_IMAGES = 600_000, 16, 64
# Models, and layers of a model, whose RSMs and pictures are on the page.
MOST_MODELS, MOST_LAYERS = 12, 48
# Pairs of images per layer and direction; images whose neighbours are shown, and their number.
_PAIRS, _QUERIES, _NEIGHBOURS = 4, 3, 5


def record_shown(
    request: SweepRequest, source: BatchSource, folder: Path, result: SweepResult, device: Any, seconds: float = 0.0
) -> None:
    """Store what the page of a finished sweep shows, unless it is there; a failure is a warning, not an error.

    Args:
        request: the sweep.
        source: its images in batches; a loader has begun no pass.
        folder: its folder.
        result: its result.
        device: where the models run.
        seconds: how long the sweep took.

    Warns:
        UserWarning: something cannot be shown; the page says so, too.
    """
    try:
        if Shown.of(folder, result) is None:
            replace(shown_of(request, source, folder, result, device), seconds=seconds).save(folder)
    except RsmProbeError as error:
        warnings.warn(f"the report page will have no images: {error}", stacklevel=2)


def shown_of(request: SweepRequest, source: BatchSource, folder: Path, result: SweepResult, device: Any) -> Shown:
    """What the page shows; see `record_shown`."""
    kernels = [kernel.name for kernel in request.kinds.kernels]
    store = RsmStore.open(folder).select(kernels=list(request.kinds.kernels))
    ids, notes = store.ids[0], list[str]()
    raw = _first_batch(request, source, ids)
    labels = [str(label) for label in raw.labels]
    keys = _shown_keys(result, kernels, notes)
    most = int(np.clip(np.sqrt(_MOST_ENTRIES / len(keys)), _FEWEST_IMAGES, _MOST_IMAGES))
    order = sorted_by_label(labels, most)
    batches = len(store.sizes)
    if batches > 1:
        images = f"{len(ids)} of {sum(store.sizes)} images"
        notes.append(f"RSMs, pairs and neighbours are those of the first of {batches} mini-batches ({images}).")
    if len(order) < len(ids):
        notes.append(f"RSMs show {len(order)} of {len(ids)} images, evenly spread over labels.")
    semantic, picked = next(iter(semantic_matchings(result)), ""), _Picked([], [])
    number_of = _numbers(store)
    rsms, ranges = np.empty((len(keys), len(order), len(order)), np.float32), np.empty((len(keys), 2))
    ranks = np.empty_like(rsms)
    whole_rsms: dict[RsmKey, np.ndarray] = {}
    queries = query_images(labels, _QUERIES)
    apart = ~np.eye(len(ids), dtype=bool)
    for k, key in enumerate(keys):
        number = number_of[key._replace(depth=0)]
        values = store.rsms(0, slice(number, number + 1))[0]
        rsms[k], ranks[k] = values[np.ix_(order, order)], rank_shares(values)[np.ix_(order, order)]
        ranges[k] = values[apart].min(), values[apart].max()
        if semantic and key.kernel == kernels[0] and key.matching in ("identity", semantic):
            whole_rsms[key] = values
            other = key._replace(matching="identity" if key.matching == semantic else semantic)
            if other in whole_rsms:
                pair = {one.matching: whole_rsms.pop(one) for one in (key, other)}
                picked.add(key, pair[semantic], pair["identity"], queries)
    picked = _with_lines(picked, request, source, raw, folder, device, semantic)
    shown = {int(k) for k in order} | picked.images
    thumbnails = _thumbnails(raw, sorted(shown), request, notes)
    intervals = intervals_of(store, keys, number_of, semantic, result)
    notes += [intervals.note] if intervals.note else []
    pictures = SharedPictures.of(request.images)
    return Shown(
        settings_hash(result), ids, labels, semantic, kernels[0], order, keys, rsms, ranges, thumbnails,
        picked.changes, picked.neighbours, intervals.diagonal, intervals.repeats, notes, ranks=ranks,
        cells=intervals.cells, differences=intervals.differences, pictures=pictures.of_images(ids),
        picture=pictures.kind, composition=pictures.composition,
    )  # fmt: skip


def _numbers(store: RsmStore) -> dict[RsmKey, int]:
    """Numbers of the RSMs of a store by their keys with depth 0: a store that grew may know more layers of a model."""
    return {key._replace(depth=0): k for k, key in enumerate(store.keys)}


def _first_batch(request: SweepRequest, source: BatchSource, ids: Sequence[str]) -> RawBatch:
    """The images of the first mini-batch.

    Raises:
        ImageError: a loader yields others now.
    """
    images = request.images
    if isinstance(images, ImageSet):
        index = {name: k for k, name in enumerate(images.ids)}
        return batch_of(images, np.array([index[name] for name in ids]))
    raw = next(iter(source.batches()), None)
    if raw is None or list(raw.ids) != list(ids):
        raise ImageError(f"the first batch of {source.name} holds other images than the sweep saw{source.advice}")
    return raw


def _shown_keys(result: SweepResult, kernels: Sequence[str], notes: list[str]) -> list[RsmKey]:
    """The RSMs on the page, in the order of the result."""
    models = thinned(result.models, MOST_MODELS)
    layers = {model: thinned(result.layers(model), MOST_LAYERS) for model in models}
    if len(models) < len(result.models):
        notes.append(f"RSMs and pictures are those of {len(models)} of {len(result.models)} models.")
    if any(len(layers[model]) < len(result.layers(model)) for model in models):
        notes.append(f"RSMs and pictures are those of at most {MOST_LAYERS} layers of a model, evenly chosen.")
    columns = [result.dataset[f"{name}_a"].values for name in RsmKey._fields]
    keys = [RsmKey.from_texts(texts) for texts in zip(*columns, strict=True)]
    return [key for key in keys if key.layer in layers.get(key.model, ()) and key.kernel in kernels]


@dataclass
class _Picked:
    """Pairs of images and neighbours of all layers so far."""

    changes: list[RankChange]
    neighbours: list[Neighbours]

    def add(self, key: RsmKey, semantic: np.ndarray, identity: np.ndarray, queries: Sequence[int]) -> None:
        """Add what is shown of a layer, from its two RSMs."""
        ranks, aligned = rank_shares(semantic), rank_shares(identity)
        difference = ranks - aligned
        pairs = changed_pairs(difference, _PAIRS) + changed_pairs(-difference, _PAIRS)
        self.changes += [
            RankChange(key.model, key.layer, pair, float(ranks[pair]), float(aligned[pair])) for pair in pairs
        ]
        self.neighbours += [
            Neighbours(
                key.model, key.layer, query, neighbours(semantic, query, _NEIGHBOURS),
                neighbours(identity, query, _NEIGHBOURS),
            )
            for query in queries
        ]  # fmt: skip

    @property
    def images(self) -> set[int]:
        """Indices of all images."""
        near = {k for one in self.neighbours for k in (one.query, *one.semantic, *one.identity)}
        return near | {k for one in self.changes for k in one.images}


class _PairMatches:
    """A `LayerConsumer` that matches the locations of single pairs of images of a batch.

    Args:
        changes: the pairs.
        method: the matching.
        means: means to subtract first; None does not centre.
    """

    def __init__(self, changes: Sequence[RankChange], method: Matching, means: Centred | None) -> None:
        self.changes, self._method, self._means = list(changes), method, means
        self._numbers: dict[str, dict[str, list[int]]] = {}
        for number, one in enumerate(changes):
            self._numbers.setdefault(one.model, {}).setdefault(one.layer, []).append(number)

    def begin(self, batch: ImageBatch) -> None:
        """See `LayerConsumer`."""

    def take(self, model: str, layer: str, representation: Representation) -> None:
        """See `LayerConsumer`."""
        of_model = self._numbers.get(model, {})
        for number in of_model.get(finished_name(layer, of_model), ()):
            one, grid = self.changes[number], representation.grid
            tokens = representation.tokens[list(one.images)]
            tokens = tokens if self._means is None else self._means.subtract(model, layer, tokens)
            matched = match(tokens[0], tokens[1], self._method, grid=grid)
            if matched.permutation is not None and matched.affinities is not None:
                lines = joining_lines(matched.permutation, matched.affinities, (grid, grid))
                self.changes[number] = replace(one, lines=lines, locations=len(matched.permutation))

    def end(self, names: LayerNames) -> None:
        """See `LayerConsumer`."""


def _with_lines(
    picked: _Picked,
    request: SweepRequest,
    source: BatchSource,
    raw: RawBatch,
    folder: Path,
    device: Any,
    semantic: str,
) -> _Picked:
    """Match the locations of all pairs."""
    if not picked.changes:
        return picked
    models = {one.model: request.models[one.model] for one in picked.changes}
    layers = dict.fromkeys((one.model, one.layer) for one in picked.changes)
    means, store = None, ProductStore.existing(folder / STORE)
    if request.centering is not None and store is not None:
        means = StoredMeans(folder, store, request.centering, request.layer_key).of(layers)
    consumer = _PairMatches(picked.changes, request.kinds.methods[semantic], means)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the sweep gave them
        stream = LayerStream(models, source, request.readings, device)
        with stream.evaluating():
            stream.feed(raw, consumer)
    return _Picked(consumer.changes, picked.neighbours)


def _thumbnails(
    raw: RawBatch, numbers: Sequence[int], request: SweepRequest, notes: list[str]
) -> Mapping[int, Thumbnail]:
    """Small copies of images, as the first model sees them: after its preprocessing, which may crop them."""
    model = next(iter(request.models.values()))
    some = replace(
        raw, images=[raw.images[k] for k in numbers], ids=[raw.ids[k] for k in numbers],
        labels=[raw.labels[k] for k in numbers], numbers=raw.numbers[list(numbers)], whole=None,
    )  # fmt: skip
    try:
        images: list[Any] = list(some.images)
        if not isinstance(images[0], Clip):
            ready = prepared(some, model.preprocess)
            sizes = [tuple(np.shape(image))[-2:] if hasattr(image, "shape") else image.size[::-1] for image in images]
            if any(size != tuple(ready.shape[-2:]) for size in sizes):
                images = list(ready)
                notes.append(
                    f"Thumbnails show images after the preprocessing of {model.name}, with stretched contrast."
                )
        return {k: thumbnail(image, raw.ids[k], str(raw.labels[k])) for k, image in zip(numbers, images, strict=True)}
    except ImageError as error:
        notes.append(f"There are no thumbnails, because these images are not pictures: {error}.")
        return {}
