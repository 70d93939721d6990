"""A sweep whose RSMs are kept: what a store lacks is computed and written, and everything is compared from there."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rsm_probe.execution.amounts import physical_bytes
from rsm_probe.execution.execution import Execution
from rsm_probe.forward.layer_stream import LayerStream
from rsm_probe.matching.matching import Matching
from rsm_probe.sources.images.batches import BatchSource, SetBatches
from rsm_probe.sources.images.contents.item_labels import ItemLabels
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.loaders import ImageLoader
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.reading import require_continuable
from rsm_probe.storage.differences import as_stored
from rsm_probe.storage.disk_space import require_space
from rsm_probe.stored_products.product_store import ProductStore, StoredBatch
from rsm_probe.stored_products.series import matching_text
from rsm_probe.streaming.batch_consumer import walk
from rsm_probe.streaming.cka_sums import rsms_per_block
from rsm_probe.streaming.cost import estimate
from rsm_probe.streaming.means import StoredMeans
from rsm_probe.streaming.mini_batches import Division, divide, divided_by_loader
from rsm_probe.streaming.recorder import (
    MeansTask,
    ModelWork,
    Recorder,
    gather_stored_means,
    record,
    record_batch,
    record_jobs,
    record_tasks,
    results_of,
)
from rsm_probe.streaming.result import SweepResult
from rsm_probe.streaming.rsm_store import StoredSums, list_models
from rsm_probe.streaming.sweep_request import RESULT, STORE, SweepRequest, finished_result

# Seconds for a result on disk.
_WRITING = 0.2
# Layers of a model by name, in forward order -> the input of the model that the layer belongs to.
_Layers = dict[str, str]


def stored_sweep(
    request: SweepRequest, source: BatchSource, folder: Path, execution: Execution, started: float
) -> SweepResult:
    """Compute what the store in a folder lacks, and compare everything from there; see `sweep`.

    Args:
        request: what is compared.
        source: the images in batches, of which those of a loader are taken as they come.
        folder: the folder of the sweep.
        execution: how the work runs.
        started: when the sweep started, by `time.perf_counter`.
    """
    settings = request.all_settings(source)
    for method in request.kinds.methods.values():
        matching_text(method)  # refuses those that a store could not recognise
    where = folder / STORE
    result, existing = finished_result(folder, settings, source), ProductStore.existing(where)
    if existing is None and result is not None:
        execution.report(f"{folder / RESULT} is finished: nothing is left to match")
        return result
    if existing is not None and existing.parts:
        sweep = StoredSweep(request, source, folder, existing, execution)
        # A file that was removed because it is damaged is computed again.
        if result is not None and sweep.has_made(result):
            execution.report(str(sweep))
            return result
        require_continuable(folder, {name: request.readings[name] for name in sweep.layers})
    with ProductStore.writing(where) as store:
        sweep = StoredSweep(request, source, folder, store, execution)
        sweep.compute(started)
        return sweep.compare(settings)


class StoredSweep:
    """One sweep over the mini-batches of a store.

    Args:
        request: what is compared.
        source: the images in batches.
        folder: the folder of the sweep.
        store: its store.
        execution: how the work runs.

    Raises:
        StorageError: the store holds other mini-batches, or those of another loader.
        ImageError: see `divide`.
    """

    def __init__(
        self, request: SweepRequest, source: BatchSource, folder: Path, store: ProductStore, execution: Execution
    ) -> None:
        self.request, self.source, self.folder, self.store, self.execution = request, source, folder, store, execution
        store.require_settings(as_stored(request.settings))
        self.division = self._divided()
        self.batches = self.division.batches
        if isinstance(request.images, ImageSet):
            self.source = SetBatches(request.images, [batch.images for batch in self.batches])
        known = store.chunks.attribute("readings", dict, {})
        # Model -> its layers, of those that were read before.
        self.layers: dict[str, _Layers] = {
            name: dict(known[key]) for name in request.models if (key := request.reading_key(name)) in known
        }
        self.work: list[dict[str, ModelWork]] = []
        self.means = None
        if request.centering is not None:
            self.means = StoredMeans(folder, store, request.centering, request.layer_key)
        self._unwritten: dict[int, set[str]] = {}

    def _divided(self) -> Division:
        images, store = self.request.images, self.store
        if isinstance(images, ImageSet):
            assert self.request.seed is not None
            estimators = [estimator.name for estimator in self.request.kinds.estimators]
            return divide(
                store, images, self.request.batch_size, self.request.seed, estimators, self.execution,
                self.request.image_fingerprint,
            )  # fmt: skip
        assert isinstance(self.source, ImageLoader)
        return divided_by_loader(store, self.source)

    def is_whole(self) -> bool:
        """Whether the layers of all models are known, and the store has all their RSMs."""
        self.plan()
        whole = self.division.added is None and len(self.layers) == len(self.request.models)
        return whole and not any(self.work)

    def has_made(self, result: SweepResult) -> bool:
        """Whether a result with these settings is all that this sweep would write."""
        return self.is_whole() and self.is_latest() and self.has_labels(result)

    def is_latest(self) -> bool:
        """Whether the images are those of which `RsmStore` tells."""
        return self.store.chunks.attribute("latest", str, "") == self._fingerprint()

    def has_labels(self, result: SweepResult) -> bool:
        """Whether the RSMs that a result keeps have the labels that the images have now."""
        if "image_label" not in result.dataset.coords:
            return True
        rows = zip(result.dataset["image_label"].values, self.batches, strict=False)
        return all(row[: len(batch)].tolist() == self._labels(batch) for row, batch in rows)

    def plan(self) -> None:
        """Find out which RSMs of which mini-batches the store lacks."""
        request, methods, seen = self.request, self.request.kinds.methods, set[str]()
        keys: dict[str, dict[str, str]] = {}
        for model, layers in self.layers.items():
            own = {layer: request.layer_key(model, layer) for layer in layers}
            # Models of equal content share their RSMs.
            keys[model] = {layer: key for layer, key in own.items() if key not in seen}
            seen |= set(own.values())
        texts = {label: matching_text(method) for label, method in methods.items()}
        alike: dict[str, ModelWork] = {}
        self.work = []
        for batch in self.batches:
            works: dict[str, ModelWork] = {}
            for model, own in keys.items():
                missing = self.store.missing({key: list(texts.values()) for key in own.values()}, batch)
                layers_left: dict[str, Mapping[str, Matching]] = {
                    layer: {label: methods[label] for label, text in texts.items() if text in missing[key]}
                    for layer, key in own.items()
                    if key in missing
                }
                if layers_left:
                    work = ModelWork.of(layers_left, own, self.division.left_out)
                    works[model] = alike.setdefault(f"{model} {work.wanted.key}", work)
            self.work.append(works)

    @cached_property
    def series(self) -> list[tuple[str, str]]:
        """(key of a layer, matching) of all RSMs but for their kernels, in the order of `RsmKinds.keys`."""
        texts = [matching_text(method) for method in self.request.kinds.methods.values()]
        return [
            (self.request.layer_key(model, layer), text)
            for model, layers in self.layers.items()
            for layer in layers
            for text in texts
        ]

    def compute(self, started: float) -> None:
        """Compute what the store lacks; `started` is when the sweep started, by `time.perf_counter`."""
        request, execution = self.request, self.execution
        for note in self.division.notes:
            execution.report(note)
        if self.is_whole():
            execution.report(str(self))
            return
        with ExitStack() as stack:
            stream = LayerStream(self._models_to_run(), self.source, request.readings, execution.device)
            stack.enter_context(stream.evaluating())
            sample = stream.sample()
            read: dict[str, _Layers] = {}
            for model, layer, part in walk(sample.representations):
                read.setdefault(model, {})[layer] = part.input
            self.layers = {name: self.layers.get(name) or read[name] for name in request.models}
            self.plan()
            request.kinds.keep.require_among({layer for layers in self.layers.values() for layer in layers})
            execution.report(str(self))
            left, lacking = self.left(), self.lacking_means()
            recorder = Recorder(self.store, execution, on_written=self._written)
            stack.callback(recorder.close)

            def methods_of(model: str, layer: str) -> Mapping[str, Matching]:
                return left.get((model, layer), {})

            sizes = [len(batch) for batch, works in zip(self.batches, self.work, strict=True) if works]
            if sizes:
                cost = estimate(stream, sample, methods_of, request.kinds, 2 if lacking else 1, execution, sizes)
                blocks = 2 * rsms_per_block(max(sizes))
                cost = replace(cost, rsms_at_once=blocks, disk=require_space(self.store.where, self.disk_bytes))
                cost.require(execution, physical_bytes())
                cost = cost.started(started, partial(recorder.rehearse, sample.representations, methods_of), _WRITING)
                execution.say(f"sweep: {cost}")
            del sample
            self._declare()
            with execution.bar("pairs", self.pairs_left, "pair", position=1) as pairs:
                self._spread(lacking, pairs.update)
                lacking = self.lacking_means()
                self._gather_means(stream, lacking)
                recorder.means = None if self.means is None else self.means.of(self.left())
                recorder.on_pairs = pairs.update
                try:
                    self._record(stream, recorder)
                finally:
                    recorder.finish()  # also if a later batch fails, so that earlier ones are not lost
            self._put_labels()

    def _spread(self, lacking: Mapping[str, list[str]], on_pairs: Callable[[int], object]) -> None:
        """Have the workers of the executor compute what they can, and leave the rest to this process.

        Args:
            lacking: model -> layers whose means are not known.
            on_pairs: called with a number of pairs whenever some are matched.

        Warns:
            UserWarning: models or images that workers cannot load.
        """
        executor = self.execution.executor
        if executor is None or not any(self.work):
            return
        names = dict.fromkeys(name for works in self.work for name in works)
        jobs = record_jobs(self.request, names, self.folder, self.store, self.execution)
        first = [batch for batch in self.batches if batch.part == 0]
        keys_of = self.request.layer_key
        means = [
            MeansTask(jobs[model], first, {layer: keys_of(model, layer) for layer in layers})
            for model, layers in lacking.items()
            if model in jobs
        ]
        with self.execution.bar("first pass: means", len(means), "model", position=0) as bar:
            for gathered in results_of(self.store, executor, gather_stored_means, means):
                assert self.means is not None
                self.means.note(gathered)
                bar.update()
        for count in results_of(self.store, executor, record, record_tasks(jobs, self.batches, self.work)):
            on_pairs(count)
        self.plan()

    def _models_to_run(self) -> dict[str, LoadedModel]:
        """The models whose layers are not known, or that lack RSMs of some mini-batches."""
        models, lacking = self.request.models, {name for works in self.work for name in works}
        every = self.division.added is not None
        return {name: m for name, m in models.items() if every or name in lacking or name not in self.layers}

    def left(self) -> dict[tuple[str, str], dict[str, Matching]]:
        """(model, layer) -> the matchings that are missing in any mini-batch, by label."""
        left: dict[tuple[str, str], dict[str, Matching]] = {}
        for works in self.work:
            for model, work in works.items():
                for layer, methods in work.layers.items():
                    left.setdefault((model, layer), {}).update(methods)
        return left

    @property
    def pairs_left(self) -> int:
        """Number of pairs that are left to match, over all layers."""
        return sum(
            len(work.layers) * pairs_within(batch)
            for batch, works in zip(self.batches, self.work, strict=True)
            for work in works.values()
        )

    def lacking_means(self) -> dict[str, list[str]]:
        """Model -> layers that lack RSMs, and whose means are not known."""
        return {} if self.means is None else self.means.lacking(self.left())

    @property
    def disk_bytes(self) -> int:
        """Bytes that the missing RSMs take on disk."""
        return sum(
            self.store.bytes_per_batch(work.wanted, len(batch))
            for batch, works in zip(self.batches, self.work, strict=True)
            for work in works.values()
        )

    @property
    def pairs(self) -> int:
        """Number of pairs over all layers, of which `pairs_left` are left."""
        return len({key for key, _ in self.series}) * sum(map(pairs_within, self.batches))

    @property
    def complete(self) -> list[str]:
        """The models that lack nothing."""
        lacking = {work.keys[layer] for works in self.work for work in works.values() for layer in work.layers}
        key = self.request.layer_key
        return [name for name, layers in self.layers.items() if not lacking & {key(name, layer) for layer in layers}]

    def __str__(self) -> str:
        return (
            f"{self.store.where}: {len(self.complete)} of {len(self.request.models)} models are complete; "
            f"{self.pairs_left:,} of {self.pairs:,} pairs are left to match"
        )

    def _declare(self) -> None:
        """Write what the mini-batches rely on, before the first of them."""
        request, store, division = self.request, self.store, self.division
        store.begin(as_stored(request.settings))
        if division.added is not None:
            store.put_part(len(store.parts), division.added, division.labels)
        store.put_image_set(self._fingerprint(), division.left_out)
        list_models(self.store, self.request, self.layers)
        for wanted in dict.fromkeys(work.wanted for works in self.work for work in works.values()):
            store.declare(wanted, range(len(store.parts)))

    def mark_finished(self) -> None:
        """Note that the store has all RSMs of this sweep: `RsmStore` then reads those of its images."""
        self.store.put_image_set(self._fingerprint(), self.division.left_out)
        list_models(self.store, self.request, self.layers)
        if not self.is_latest():
            self.store.chunks.set({"latest": self._fingerprint()})

    def _fingerprint(self) -> str:
        return self.request.fingerprint_of(self.source)

    def _put_labels(self) -> None:
        """Write the labels that only the images themselves have, and that are known once these were read."""
        images = self.request.images
        if isinstance(images, ImageLoader):
            self.store.put_part(0, self.store.parts[0], list(getattr(self.source, "labels_seen", ())))
        elif isinstance(images.labels, ItemLabels):
            by_id = dict(zip(images.ids, images.labels, strict=True))
            for number, part in enumerate(self.store.parts):
                known = zip(part.ids, self.store.labels(number), strict=True)
                self.store.put_part(number, part, [by_id.get(name, label) for name, label in known])

    def _gather_means(self, stream: LayerStream, lacking: Mapping[str, list[str]]) -> None:
        """Run a first pass over the images with which the store began, for layers whose means are not known."""
        if not lacking:
            return
        assert self.means is not None
        source, first = self.source, [batch for batch in self.batches if batch.part == 0]
        if absent := len(self.store.parts[0].ids) - sum(map(len, first)):
            warnings.warn(
                f"the means of {sum(map(len, lacking.values()))} layers that are new to {self.store.where} lack "
                f"{absent} images, over which those of its other layers were taken",
                stacklevel=4,
            )
        if isinstance(self.request.images, ImageSet):
            source = SetBatches(self.request.images, [batch.images for batch in first])
        note = partial(self._note_order, source)
        self.means.note(self.means.gather(lacking, stream, source, note, self.execution))

    def _note_order(self, source: BatchSource) -> None:
        """Write what shows whether the batches of a later process are the same, before what relies on them."""
        self.store.require_there()
        if state := source.state():
            self.store.chunks.set({"order": state["hashes"].tolist()})

    def _record(self, stream: LayerStream, recorder: Recorder) -> None:
        """Pass the mini-batches that lack RSMs through the models, and write their products."""
        left = [number for number, works in enumerate(self.work) if works]
        done = set(range(len(self.work))) - set(left)
        count = sum(len(self.batches[number]) for number in left)
        with self.execution.bar("images", count, "image", position=0) as bar:
            for number, raw in zip(left, self.source.batches(done), strict=True):
                batch = self.batches[number]
                self._note_order(self.source)
                record_batch(self.store, stream, recorder, batch, self.work[number], raw)
                bar.update(len(raw))

    @cached_property
    def _sums(self) -> StoredSums:
        keys = self.request.kinds.keys([(model, layer) for model, layers in self.layers.items() for layer in layers])
        methods = self.request.kinds.methods.values()
        scores = [not method.one_to_one for layers in self.layers.values() for _ in layers for method in methods]
        return StoredSums(self.store, self.batches, self.series, keys, self.request.kinds, scores)

    def _written(self, batch: StoredBatch, models: Collection[str]) -> None:
        """Compare the RSMs of a mini-batch as soon as it was written of all models."""
        number = self.batches.index(batch)
        left = self._unwritten.setdefault(number, set(self.work[number]))
        left -= set(models)
        if not left:
            self._sums.until(number + 1)

    def _labels(self, batch: StoredBatch) -> list[str]:
        """Labels of the images of a mini-batch, as they are now."""
        images = self.request.images
        labels = images.labels if isinstance(images, ImageSet) else []
        if len(labels) and not isinstance(labels, ItemLabels):
            return [labels[k] for k in batch.images]
        stored = self.store.labels(batch.part)
        if not len(labels):
            return [stored[k] for k in batch.positions]
        # A sweep that was killed at its end did not write them.
        return [stored[k] or labels[number] for k, number in zip(batch.positions, batch.images, strict=True)]

    def compare(self, settings: Mapping[str, Any]) -> SweepResult:
        """Compare all RSMs of all mini-batches, and write the result."""
        self.request.kinds.keep.require_among({layer for layers in self.layers.values() for layer in layers})
        left = range(self._sums.done, len(self.batches))
        for number in self.execution.bar("comparing", len(left), "batch", items=left, leave=False):
            self._sums.until(number + 1)
        every = [(model, layer) for model, layers in self.layers.items() for layer in layers]
        if self.means is not None and (fewer := self.means.over_fewer(every)):
            model, layer = fewer[0]
            warnings.warn(
                f"the means of {len(fewer)} layers, first {layer!r} of model {model!r}, were taken while images of "
                f"{self.store.where} were gone, and lack these; sweep in another folder to centre all layers alike",
                stacklevel=5,
            )
        for batch, rsms in zip(self.batches, self._sums.batch_rsms, strict=False):  # the last may be too small
            rsms.labels = self._labels(batch)
        inputs = {(model, layer): name for model, layers in self.layers.items() for layer, name in layers.items()}
        result = self._sums.result().with_inputs(inputs).with_steps(self.request.models)
        result.dataset.attrs.update(self.request.attributes(), settings=json.dumps(settings))
        self.store.require_there()
        self.mark_finished()
        result.save(self.folder / RESULT)
        return result


def pairs_within(batch: StoredBatch) -> int:
    """Number of pairs of different images in a mini-batch."""
    return len(batch) * (len(batch) - 1) // 2
