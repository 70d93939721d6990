"""The layer sweep: images pass through every model once, and the RSMs of all layers are compared."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rsm_probe.arrays import first_nonfinite
from rsm_probe.checks import brief, require_seed, require_text, require_whole
from rsm_probe.comparison.alignment import get_estimator
from rsm_probe.errors import ImageError, LayerError, ModelError
from rsm_probe.execution.amounts import physical_bytes
from rsm_probe.execution.execution import Execution
from rsm_probe.execution.executors import available_cores
from rsm_probe.forward.layer_stream import LayerSample, LayerStream, layer_names, reading_settings, readings_of
from rsm_probe.matching.matching import Matching
from rsm_probe.probe.layers import Layers
from rsm_probe.probe.representation import Layout, require_finite
from rsm_probe.similarity.centering import Centering, check_centering
from rsm_probe.similarity.kernels import Kernel
from rsm_probe.sources.images.any_images import as_images
from rsm_probe.sources.images.batches import BatchSource, SetBatches
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.loaders import ImageLoader
from rsm_probe.sources.loading import load_model
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.reading import Forward, Reading, require_continuable
from rsm_probe.storage.differences import as_stored
from rsm_probe.storage.paths import local_folder
from rsm_probe.streaming.accumulator import Accumulator
from rsm_probe.streaming.batch_consumer import walk
from rsm_probe.streaming.checkpoint import Checkpoint
from rsm_probe.streaming.cost import Cost, measure, stopwatch
from rsm_probe.streaming.result import SweepResult
from rsm_probe.streaming.sweep_passes import accumulate, gather_means

# Images per mini-batch, unless said otherwise.
BATCH_SIZE = 250
# Seconds for a result on disk.
_WRITING = 0.2


def sweep(
    models: Any,
    images: Any,
    layers: Layers | Mapping[str, Layers] = "blocks",
    matchings: Sequence[str | Matching] = ("identity", "optimal"),
    kernels: Sequence[str | Kernel] = ("linear",),
    batch_size: int = BATCH_SIZE,
    *,
    seed: int = 0,
    centering: Centering | None = None,
    estimators: Sequence[str] = ("unbiased", "biased"),
    keep: Sequence[str] = (),
    out: str | Path | None = None,
    ids: Sequence[str] | None = None,
    labels: Any = None,
    tokens: str | Sequence[str] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    forward: Forward | None = None,
    method: str | None = None,
    inputs: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
    workers: int | None = None,
    memory: str | int = "2GB",
    max_hours: float | None = 12.0,
    progress: bool = False,
) -> SweepResult:
    """Compare the RSMs of all layers of all models by mini-batch CKA (paper, appendix G).

    All models see the images in the same seeded random order, in batches whose sizes differ by at most one. CKA is the
    ratio of HSICs summed over batches, each weighted by its pairs. Fewer images than `batch_size` form one batch.

    Args:
        models: a module, a `LoadedModel`, a name such as "timm:vit_tiny_patch16_224", a list of these, or name -> one
            of these.
        images: an embedded set, a folder, a tensor, a data set, or a `DataLoader`, whose batches are taken as they
            come, each through all models. `rsm_probe.sources.as_images(images, ...)` takes the same, and what has to be
            said of them: `axes=` of an array, `clips=` of a folder, `image_key=` and `label_key=` of items.
        layers: layers of all models, as for `Probe`; or model name -> layers.
        matchings: names or method objects; "identity" gives spatio-semantic RSMs, "optimal" semantic RSMs.
        kernels: "linear", "cosine", "rbf", or kernel objects.
        batch_size: maximum number of images per mini-batch. A loader decides on this and the next itself.
        seed: seed of the order of the images.
        centering: None; "location-mean" as in the paper's figures; or "channel-mean". Needs a first pass over the
            images.
        estimators: the first gives `result.cka`; "unbiased" needs batches of at least 4 images.
        keep: names or globs of layers whose mini-batch RSMs are kept in the result.
        out: a folder for the result and its checkpoints. An interrupted sweep resumes there when it is called again
            with the same settings, and repeats at most one mini-batch. A finished result is opened if the first, middle
            and last batches of a loader are those of that sweep; of a stream or a shuffling loader, only the first.
        ids: one name per image, in place of numbers or file names.
        labels: one label per image, as text or whole numbers, in place of those that are known.
        tokens: which vectors of a layer are compared: "locations" (the default), "class" for the class token, or
            "mean", "max" or "gem" over locations; or several of these, which are layers such as `blocks.3@class` of
            the result. This and the next four hold for all models; what `load_model` was told of one comes first.
        layouts: how to read outputs of layers, as in `Probe`; a name or glob need not match layers of every model.
        forward: makes the call from the module and a batch, where it takes more than a batch of images; of a loader
            that yields tuples or mappings, it gets these. A sweep with `out` resumes only with a function that can be
            imported from a module.
        method: the method whose calls are forward passes, as in `Probe`.
        inputs: the inputs that hold images, as in `Probe`.
        device: "auto" for a GPU if there is one, or "cpu", "cuda", "cuda:1", "mps". None leaves models and tokens
            where they are, and moves layers of captures to a GPU if there is one. Affinities are computed where
            models run, and matched there if the device has a solver.
        workers: CPU threads that match; None for all cores. Results do not depend on it.
        memory: memory budget, as bytes or text such as "2GB", for affinities that wait to be matched.
        max_hours: refuse work whose estimated time is longer; None for no limit.
        progress: show the estimated cost and progress bars.

    Returns:
        A `SweepResult`.

    Raises:
        ModelError: no model, an unknown model, or two models with the same name.
        ImageError: no images, too few for the estimators, or images of different sizes.
        LayerError: unknown layers, or layers that do not run exactly once.
        RepresentationError: NaN or infinity (the message names layer and image), or outputs that are not tokens.
        CostError: the estimate exceeds a limit; the message names cheaper settings.
        StorageError: `out` is not the path of a folder, holds a sweep with different settings, is in use by another
            process, cannot be written, or was removed while the sweep was running.
        ComparisonError: an unknown kernel or estimator, or one that is named twice.
        MatchingError: an unknown matching, or tokens too large to match.
    """
    return sweep_layers(
        models, as_images(images, ids=ids, labels=labels), layers, matchings, kernels, batch_size, seed, centering,
        estimators, keep, out,
        Reading(None, layouts, method, forward, inputs, tokens),
        Execution(device, workers, memory, max_hours, progress=progress),
    )  # fmt: skip


def sweep_layers(
    models: Any,
    images: Any,
    layers: Layers | Mapping[str, Layers],
    matchings: Sequence[str | Matching],
    kernels: Sequence[str | Kernel],
    batch_size: int,
    seed: int,
    centering: Centering | None,
    estimators: Sequence[str],
    keep: Sequence[str],
    out: str | Path | None,
    reading: Reading,
    execution: Execution,
) -> SweepResult:
    """See `sweep`; `reading` holds what is said of all models, apart from their layers."""
    started = time.perf_counter()
    # Lazy, as importing this package stays light; here, so that an estimate knows what it took.
    import xarray  # noqa: F401

    folder = None if out is None else local_folder(out)
    layers, centering = _checked_layers(layers), check_centering(centering)
    # Check everything that can be checked before loading models, and long before writing anything.
    accumulator = Accumulator(
        matchings, kernels, estimators, keep=keep, workers=execution.workers, memory=execution.memory
    )
    loaded, image_set = name_models(models), as_images(images)
    named = [estimator.name for estimator in accumulator.estimators]
    source = batch_source(image_set, batch_size, seed, named)
    if centering is not None or folder is not None:
        source.repeat("centering" if centering is not None else f"a sweep in {folder}", needed=centering is not None)
    by_model = layers if isinstance(layers, dict) else None
    common = reading if isinstance(layers, dict) else replace(reading, layers=layers)
    readings = readings_of(loaded, common, by_model)
    # A loader decides on both.
    own = isinstance(image_set, ImageSet)
    order = {"batch_size": int(batch_size), "seed": int(seed)} if own else {"batch_size": max(source.sizes)}
    checkpoint = None
    if folder is not None:
        import zarr  # noqa: F401 - as above

        settings = {
            "models": {name: model.fingerprint for name, model in loaded.items()},
            "images": source.fingerprint(),
            "layers": layers,
            "matchings": {label: repr(method) for label, method in accumulator.methods.items()},
            "kernels": [repr(kernel) for kernel in accumulator.kernels],
            "estimators": named,
            **order,
            "centering": centering,
            "keep": accumulator.keep.patterns,
            **reading_settings(loaded, readings),
        }
        checkpoint = Checkpoint(folder, as_stored(settings), source.advice)
        if (result := checkpoint.finished()) is not None:
            source.require_same(checkpoint.load("order") or {})
            return result
    with ExitStack() as stack:
        stack.callback(accumulator.close)
        begun = checkpoint is not None and checkpoint.begun
        if checkpoint is not None and begun:  # detect a sweep that runs there before any work
            require_continuable(checkpoint.out, readings)
            stack.enter_context(checkpoint.held())
            if (state := checkpoint.load("order")) is not None:
                source.restore(state)
        stream = LayerStream(loaded, source, readings, execution.device)
        stack.enter_context(stream.evaluating())
        sample = stream.sample()
        cost = _preflight(sample, stream, accumulator, centering, execution)
        cost.require(execution, physical_bytes())
        rehearsed = time.perf_counter()
        accumulator.rehearse(sample.representations)
        now = time.perf_counter()
        cost = replace(
            cost,
            batch_seconds=now - rehearsed,
            start_seconds=now - started,
            end_seconds=0.0 if checkpoint is None else _WRITING,
        )
        execution.say(f"sweep: {cost}")
        inputs = {(model, layer): part.input for model, layer, part in walk(sample.representations)}
        del sample
        if checkpoint is not None:
            if not begun:
                stack.enter_context(checkpoint.held())
            if (result := checkpoint.finished()) is not None:  # another process has finished it in the meantime
                return result
            checkpoint.claim()
        if centering is not None:
            accumulator.means = gather_means(stream, centering, checkpoint, execution)
        bar = stack.enter_context(execution.bar("pairs", None if cost.open_ended else cost.pairs, "pair", position=1))
        accumulator.on_pairs = bar.update
        accumulate(accumulator, stream, checkpoint, bar, cost.pairs_per_layer, execution)
        result = accumulator.result().with_inputs(inputs).with_steps(loaded)
        result.dataset.attrs.update(centering=str(centering), **order, source=image_set.name)
        if checkpoint is not None:
            checkpoint.save_result(result)
    return result


def name_models(models: Any) -> dict[str, LoadedModel]:
    """Load models by name, in the order given; models in a list with the same name are numbered.

    Raises:
        ModelError: no model, or a model that cannot be loaded.
    """
    if isinstance(models, Mapping):
        for name in models:
            require_text(name, "the name of a model", ModelError)
        named = {str(name): load_model(model, name=str(name)) for name, model in models.items()}
    else:
        loaded = [load_model(model) for model in (models if isinstance(models, list | tuple) else [models])]
        names = [model.name for model in loaded]
        for k, name in enumerate(names):
            free = (f"{name}-{number}" for number in itertools.count(1))
            if name in names[:k]:
                names[k] = next(candidate for candidate in free if candidate not in names)
        named = dict(zip(names, loaded, strict=True))
    if not named:
        raise ModelError("no model to sweep")
    return named


def batch_source(images: ImageSet | ImageLoader, batch_size: int, seed: int, estimators: Sequence[str]) -> BatchSource:
    """The batches of a sweep: those of a loader as they come, or an image set in a seeded random order.

    Raises:
        ImageError: as `make_batches`, or batch_size or seed is given for a loader, which decides on both.
    """
    if isinstance(images, ImageSet):
        return SetBatches(images, make_batches(images, batch_size, seed, estimators))
    for name, value, default in (("batch_size", batch_size, BATCH_SIZE), ("seed", seed, 0)):
        if value != default:
            raise ImageError(
                f"{name}={brief(value)} applies to images that a sweep divides itself, but {images.name} comes from a "
                f"loader, whose batches are taken as they come; leave it out, or give the loader's data set"
            )
    source, fewest = images.fresh(), max(get_estimator(estimator).fewest for estimator in estimators)
    if source.sizes[0] < fewest:
        raise ImageError(
            f"the first batch of {source.name} holds {source.sizes[0]} images; {' and '.join(estimators)} CKA needs at "
            f"least {fewest}: make larger batches"
        )
    return source


def make_batches(images: ImageSet, batch_size: int, seed: int, estimators: Sequence[str]) -> list[np.ndarray]:
    """Divide the images, in a seeded random order, into batches whose sizes differ by at most one.

    Returns:
        The indices of the images of each batch.

    Raises:
        ImageError: batches are too small for the estimators, or size or seed is not a whole number in range.
    """
    require_whole(batch_size, "batch_size", 1, ImageError)
    require_seed(seed, "seed", ImageError)
    fewest = max(get_estimator(estimator).fewest for estimator in estimators)
    needed = f"{' and '.join(estimators)} CKA needs at least {fewest}"
    if batch_size < fewest:
        raise ImageError(f"batch_size={batch_size} is too small: {needed}")
    if len(images) < fewest:
        raise ImageError(f"{images.name} holds {len(images)} images; {needed}")
    # Rounding up keeps every batch within batch_size; the minimum avoids batches that are too small.
    count = min(-(-len(images) // batch_size), len(images) // fewest)
    return np.array_split(np.random.default_rng(seed).permutation(len(images)), count)


def _checked_layers(layers: Any) -> str | list[str] | dict[str, str | list[str]]:
    """Convert layers of all models, or model name -> layers, to plain text and lists.

    Raises:
        LayerError: `layers` is neither.
    """
    if not isinstance(layers, Mapping):
        return layer_names(layers)
    return {
        require_text(model, "layers=: the name of a model", LayerError): layer_names(own, f"layers[{model!r}]")
        for model, own in layers.items()
    }


def _preflight(
    sample: LayerSample,
    stream: LayerStream,
    accumulator: Accumulator,
    centering: str | None,
    execution: Execution,
) -> Cost:
    """Check the outputs of the models for a few images, and run these again to estimate the cost."""
    methods, kernel_count = accumulator.methods, len(accumulator.kernels)
    layers = walk(sample.representations)
    for model, layer, representation in layers:
        require_finite(model, layer, first_nonfinite(representation.tokens), sample.batch.ids)
    names = [layer for _, layer, _ in layers]
    accumulator.keep.require_among(names)
    start = _synchronised(stream)
    stream.sample()
    seconds = (_synchronised(stream) - start) / len(sample.batch.ids)
    sizes, count = stream.source.sizes, stream.source.count
    cores, largest, passes = min(execution.worker_count, available_cores()), max(sizes), 1 if centering is None else 2
    pairs = [size * (size - 1) // 2 for size in sizes]
    layer_costs = measure(
        sample.representations,
        methods,
        execution,
        cores,
        at_once=max(pairs),
        images=largest,
        pairs=sum(pairs),
        other_seconds=seconds * sum(sizes) * passes,
    )
    return Cost(
        layer_costs,
        seconds,
        sum(sizes),
        sizes,
        cores,
        passes=passes,
        kernels=kernel_count,
        kept_rsms=sum(layer in accumulator.keep for layer in names) * len(methods) * kernel_count,
        open_ended=count is None,
    )


def _synchronised(stream: LayerStream) -> float:
    """Read the clock after all devices have finished."""
    return max(stopwatch(model.device) for model in stream.models.values())
