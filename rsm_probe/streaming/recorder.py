"""Match the pairs of mini-batches and write their products into an RSM store, here or in workers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from rsm_probe.errors import ComparisonError, ImageError, LayerError, MatchingError, ModelError, StorageError
from rsm_probe.execution.execution import Execution
from rsm_probe.execution.executors import available_cores, finished
from rsm_probe.forward.layer_consumer import ImageBatch, LayerNames, finished_name
from rsm_probe.forward.layer_stream import LayerStream
from rsm_probe.matching.matching import Matching
from rsm_probe.pairs.products import MatchedProducts
from rsm_probe.probe.representation import Representation
from rsm_probe.similarity.centering import Centering
from rsm_probe.sources.addresses import ImagesAddress, ModelAddress, images_address, model_address
from rsm_probe.sources.images.batches import RawBatch, SetBatches
from rsm_probe.sources.images.origins import OR_STAY
from rsm_probe.sources.models.user_functions import importable_name
from rsm_probe.storage.differences import as_stored
from rsm_probe.stored_products.product_store import ProductStore, StoredBatch
from rsm_probe.stored_products.series import SeriesSet, matching_text
from rsm_probe.streaming.batch_consumer import Centred, ProductConsumer, Products, naming
from rsm_probe.streaming.means import StoredMeans
from rsm_probe.streaming.mini_batches import image_digests
from rsm_probe.streaming.sweep_request import SweepRequest

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
# Tasks of a model on an executor, at most: each loads the model, or runs where it was loaded last.
_TASKS = 16


@dataclass(frozen=True, eq=False)
class ModelWork:
    """What is to be computed of one model in a mini-batch.

    Attributes:
        layers: layer -> label -> matching, of the layers and matchings that the store lacks.
        keys: layer -> its key in the store.
        wanted: the set of series that these make, in the order of `layers`.
    """

    layers: Mapping[str, Mapping[str, Matching]]
    keys: Mapping[str, str]
    wanted: SeriesSet

    @classmethod
    def of(
        cls,
        layers: Mapping[str, Mapping[str, Matching]],
        keys: Mapping[str, str],
        left_out: Mapping[int, Sequence[int]],
    ) -> ModelWork:
        """The work on these layers and matchings; `left_out` as in `SeriesSet`."""
        methods = [method for one in layers.values() for method in one.values()]
        bounded = frozenset(matching_text(method) for method in methods if not method.at_once)
        texts = {keys[layer]: [matching_text(method) for method in one.values()] for layer, one in layers.items()}
        return cls(layers, keys, SeriesSet.of(texts, bounded, left_out))


class Recorder(ProductConsumer):
    """Writes the products of mini-batches into a store, each batch as soon as its pairs are matched.

    Args:
        store: an RSM store whose arrays are declared.
        execution: see `ProductConsumer`.
        means: means to subtract; None does not centre.
        on_pairs: called with a number of pairs each time pairs were matched.
        on_written: called with a mini-batch and the models of which it was written.
    """

    def __init__(
        self,
        store: ProductStore,
        execution: Execution,
        means: Centred | None = None,
        on_pairs: Callable[[int], None] = lambda count: None,
        on_written: Callable[[StoredBatch, Collection[str]], None] = lambda batch, models: None,
    ) -> None:
        super().__init__(execution, means, on_pairs, bounds=True, alike=True)
        self._store, self._on_written = store, on_written
        self._work: Mapping[str, ModelWork] = {}

    def expect(self, batch: StoredBatch, work: Mapping[str, ModelWork]) -> None:
        """Say which mini-batch comes next, and what is to be computed of it: model -> work."""
        self._stored, self._work = batch, work

    def methods_of(self, model: str, layer: str) -> Mapping[str, Matching]:
        """See `ProductConsumer`; {} for a layer that the store has."""
        layers = self._work[model].layers if model in self._work else {}
        return layers.get(finished_name(layer, layers), {})

    def take(self, model: str, layer: str, representation: Representation) -> None:
        """See `LayerConsumer`; layers that the store has are passed over."""
        if self.methods_of(model, layer):
            super().take(model, layer, representation)

    def end(self, names: LayerNames) -> None:
        """See `LayerConsumer`."""
        super().end({taken: layer for taken, layer in names.items() if taken in self._open})

    def _accepts(self, layers: Sequence[tuple[str, str]], images: int) -> bool:
        for model, work in self._work.items():
            absent = [layer for layer in work.layers if (model, layer) not in layers]
            if absent:
                raise LayerError(
                    f"layer {absent[0]!r} of model {model!r} ran for the first images, but not for mini-batch "
                    f"{self._stored.number}; leave it out"
                )
        if images != len(self._stored):
            raise ComparisonError(f"a mini-batch of {images} images, where the store expects {len(self._stored)}")
        return True

    def _add(self, batch: ImageBatch, taken: Products) -> None:
        self._await((self._stored, self._work), taken)

    def _finish_batch(self, batch: Any, taken: Products) -> None:
        stored, of_models = batch
        for model, work in of_models.items():
            matched: list[MatchedProducts] = []
            for layer in work.layers:
                part = taken[model, layer]
                assert part.work is not None
                with naming(model, layer):
                    products = part.work.matched()
                    for label, one in products.items():
                        if np.isnan(one.products).any():
                            raise MatchingError(f"matching {label!r} returned NaN")
                    matched += products.values()
            self._store.write(work.wanted, stored, matched)
        self._on_written(stored, of_models.keys())


@dataclass(frozen=True)
class RecordJob:
    """What the tasks of one model share.

    Attributes:
        model: how a worker loads the model; its reading is that of the sweep.
        images: how it loads the images.
        folder: folder of the sweep.
        store: path of its store.
        settings: what all mini-batches of the store share.
        centering: which mean is subtracted.
        device: where the model runs.
        threads: CPU threads within a matrix product, as in the process that makes the tasks: sums in other orders would
            end in other digits.
        memory: memory budget of a worker in bytes.
    """

    model: ModelAddress
    images: ImagesAddress
    folder: Path
    store: str
    settings: Mapping[str, Any]
    centering: Centering | None
    device: str
    threads: int
    memory: int

    def means(self, store: ProductStore, keys: Mapping[str, str]) -> StoredMeans | None:
        """The stored means; `keys` maps layers to their keys."""
        if self.centering is None:
            return None
        return StoredMeans(self.folder, store, self.centering, lambda model, layer: keys[layer])

    @contextmanager
    def stream(self, batches: Sequence[StoredBatch]) -> Iterator[LayerStream]:
        """The model and some mini-batches, with the threads of the process that made the tasks."""
        images, model = self.images.load_once(), self.model.load_once()
        source, before = SetBatches(images, [batch.images for batch in batches]), torch.get_num_threads()
        torch.set_num_threads(min(self.threads, available_cores()))
        try:
            stream = LayerStream({model.name: model}, source, {model.name: model.reading}, self.device)
            with stream.evaluating():
                yield stream
        finally:
            torch.set_num_threads(before)

    @property
    def execution(self) -> Execution:
        """How a worker matches: in one thread, as the workers of an executor fill the cores."""
        return Execution(workers=1, memory=self.memory)


@dataclass(frozen=True, eq=False)
class RecordTask:
    """Some mini-batches of a model, with what is to be computed of each."""

    job: RecordJob
    work: Sequence[tuple[StoredBatch, ModelWork]]

    @property
    def pairs(self) -> int:
        """Number of pairs of images, over all layers."""
        return sum(len(work.layers) * (len(batch) * (len(batch) - 1) // 2) for batch, work in self.work)


def record(task: RecordTask) -> int:
    """Compute the mini-batches of a task that the store lacks, and write them; return the number of pairs.

    Raises:
        RsmProbeError: see `sweep`.
    """
    job = task.job
    store = opened_store(job, [batch for batch, _ in task.work])
    left = [(batch, work) for batch, work in task.work if not store.holds(work.wanted, batch)]
    if not left:
        return task.pairs
    works = [work for _, work in left]
    keys = {layer: key for work in works for layer, key in work.keys.items()}
    means, name = job.means(store, keys), job.model.name
    of_layers = None if means is None else means.of(dict.fromkeys((name, k) for work in works for k in work.layers))
    with job.stream([batch for batch, _ in left]) as stream, Recorder(store, job.execution, of_layers) as recorder:
        try:
            for (batch, work), raw in zip(left, stream.source.batches(), strict=True):
                record_batch(store, stream, recorder, batch, {name: work}, raw)
        finally:
            recorder.finish()  # also if a later batch fails, so that earlier ones are not lost
    return task.pairs


def record_batch(
    store: ProductStore,
    stream: LayerStream,
    recorder: Recorder,
    batch: StoredBatch,
    works: Mapping[str, ModelWork],
    raw: RawBatch,
) -> None:
    """Pass a mini-batch through the models that lack RSMs of it, after the digests by which images are recognised.

    One model after another, so that memory holds the products of one model.
    """
    store.require_there()
    if isinstance(stream.source, SetBatches) and not store.has_digests(batch):
        store.put_digests(batch, image_digests(raw.images))
    for model, work in works.items():
        recorder.expect(batch, {model: work})
        stream.feed(raw, recorder, {model})


@dataclass(frozen=True, eq=False)
class MeansTask:
    """The first pass of a model over some mini-batches, for the means of layers: name -> key."""

    job: RecordJob
    batches: Sequence[StoredBatch]
    layers: Mapping[str, str]


def gather_stored_means(task: MeansTask) -> dict[str, list[str]]:
    """Run the first pass of a model; return what `StoredMeans.note` takes.

    Raises:
        RsmProbeError: see `sweep`.
    """
    store = opened_store(task.job, task.batches)
    means = task.job.means(store, task.layers)
    assert means is not None
    with task.job.stream(task.batches) as stream:
        lacking = {task.job.model.name: list(task.layers)}
        return means.gather(lacking, stream, stream.source, store.require_there, task.job.execution)


def opened_store(job: RecordJob, batches: Sequence[StoredBatch]) -> ProductStore:
    """Open the store of a task.

    Raises:
        StorageError: it was removed, or another is in its place, whose mini-batches may have other images.
    """
    store = ProductStore.existing(job.store, writable=True)
    if store is None or not _is_of(store, job, batches):
        raise StorageError(f"{job.store} was removed or replaced while the sweep was running; run it again")
    store.begin(job.settings)
    return store


def _is_of(store: ProductStore, job: RecordJob, batches: Sequence[StoredBatch]) -> bool:
    """Whether a store has these mini-batches."""
    if store.chunks.attribute("settings", dict, {}) != job.settings or job.images.fingerprint not in store.image_sets:
        return False
    parts, ids = store.parts, job.images.load_once().ids
    return all(
        batch.part < len(parts)
        and batch.positions[-1] < len(parts[batch.part].ids)
        and [parts[batch.part].ids[k] for k in batch.positions] == [ids[k] for k in batch.images]
        for batch in batches
    )


def record_jobs(
    request: SweepRequest, models: Iterable[str], folder: Path, store: ProductStore, execution: Execution
) -> dict[str, RecordJob]:
    """What workers need to know of some models of a sweep, without those that they cannot load.

    Warns:
        UserWarning: models, images or matchings that workers cannot load.
    """
    jobs: dict[str, RecordJob] = {}
    for method in request.kinds.methods.values():
        if importable_name(type(method)) is None:
            warnings.warn(
                f"this process computes all RSMs: the class of matching {method!r} has no name that can be imported; "
                f"move it to a module, {OR_STAY}",
                stacklevel=7,
            )
            return {}
    try:
        images = images_address(request.images)
    except ImageError as error:
        warnings.warn(f"this process computes all RSMs: {error}", stacklevel=7)
        return {}
    for name in models:
        try:
            model = model_address(replace(request.models[name], name=name, reading=request.readings[name]))
        except ModelError as error:
            warnings.warn(f"this process computes the RSMs of {name!r}: {error}", stacklevel=7)
            continue
        jobs[name] = RecordJob(
            model, images, folder.absolute(), str(Path(store.where).absolute()), as_stored(request.settings),
            request.centering, str(execution.worker_device()), torch.get_num_threads(), execution.memory_bytes,
        )  # fmt: skip
    return jobs


def record_tasks(
    jobs: Mapping[str, RecordJob], batches: Sequence[StoredBatch], work: Sequence[Mapping[str, ModelWork]]
) -> Iterator[RecordTask]:
    """The tasks of all models, one model after another: a worker then seldom has to load a different one."""
    for name, job in jobs.items():
        own = [(batch, works[name]) for batch, works in zip(batches, work, strict=True) if name in works]
        step = -(-len(own) // _TASKS)
        yield from (RecordTask(job, own[start : start + step]) for start in range(0, len(own), step))


def results_of(
    store: ProductStore, executor: Executor, function: Callable[[_Task], _Result], tasks: Iterable[_Task]
) -> Iterator[_Result]:
    """Results of tasks, as long as the store is there: errors of tasks may name a file that was removed with it.

    Raises:
        StorageError: the store was removed.
        Exception: a task failed.
    """
    try:
        for _, result in finished(executor, function, tasks):
            store.require_there()
            yield result
    except StorageError:
        store.require_there()
        raise
