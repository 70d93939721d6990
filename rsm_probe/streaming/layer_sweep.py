"""The layer sweep: images pass through every model once, and the RSMs of all layers are compared."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rsm_probe.checks import require_text
from rsm_probe.errors import LayerError, ModelError, StorageError
from rsm_probe.execution.amounts import physical_bytes
from rsm_probe.execution.execution import Execution
from rsm_probe.forward.layer_stream import LayerStream, layer_names, readings_of
from rsm_probe.matching.matching import Matching
from rsm_probe.probe.layers import Layers
from rsm_probe.probe.representation import Layout
from rsm_probe.similarity.centering import Centering, check_centering
from rsm_probe.similarity.kernels import Kernel
from rsm_probe.sources.images.any_images import as_images
from rsm_probe.sources.images.batches import BatchSource
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.loading import load_model
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.reading import Forward, Reading
from rsm_probe.storage.paths import local_folder
from rsm_probe.streaming.accumulator import Accumulator
from rsm_probe.streaming.batch_consumer import walk
from rsm_probe.streaming.cost import estimate
from rsm_probe.streaming.kept_rsms import RsmKinds
from rsm_probe.streaming.means import gather_means
from rsm_probe.streaming.mini_batches import BATCH_SIZE, batch_source
from rsm_probe.streaming.result import SweepResult
from rsm_probe.streaming.stored_sweep import stored_sweep
from rsm_probe.streaming.sweep_request import SweepRequest


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
    executor: Executor | None = None,
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
        max_hours: refuse work whose estimated time is longer; None for no limit. The time of an executor is not known.
        executor: where tiles of pairs are computed; None for threads of this process. A tile is a mini-batch of a
            model. Needs `out`: workers load models and images by the names that were given, and write into `out`.
            Models without such a name stay in this process, with a warning. Each worker matches in one thread.
        progress: show the estimated cost and progress bars.

    Returns:
        A `SweepResult`, whose `cka` is an `xarray.DataArray` (rsm_a, rsm_b).

    Example:
        >>> import torch, rsm_probe
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 8, 3)).eval()
        >>> images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> result = rsm_probe.sweep({"net": model}, images, layers=["0", "2"], batch_size=10)
        >>> result.grid("net", matching_a="optimal", matching_b="identity").shape    # layers x layers
        (2, 2)

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
        Execution(device, workers, memory, max_hours, executor, progress),
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
    request, source = sweep_request(
        models, images, layers, matchings, kernels, batch_size, seed, centering, estimators, keep, reading
    )
    if centering is not None or folder is not None:
        source.repeat("centering" if centering is not None else f"a sweep in {folder}", needed=centering is not None)
    if folder is not None:
        import zarr  # noqa: F401 - as above

        return stored_sweep(request, source, folder, execution, started)
    if execution.executor is not None:
        raise StorageError("an executor writes to disk: give out=, a folder that all workers see")
    return _streamed(request, source, execution, started)


def sweep_request(
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
    reading: Reading,
) -> tuple[SweepRequest, BatchSource]:
    """Check and load what `sweep` takes; `reading` holds what is said of all models, apart from their layers.

    Returns:
        What is compared, and the images in batches.

    Raises:
        RsmProbeError: see `sweep`.
    """
    layers, centering = _checked_layers(layers), check_centering(centering)
    # Check everything that can be checked before loading models, and long before writing anything.
    kinds = RsmKinds.of(matchings, kernels, estimators, keep)
    loaded, image_set = name_models(models), as_images(images)
    source = batch_source(image_set, batch_size, seed, [estimator.name for estimator in kinds.estimators])
    by_model = layers if isinstance(layers, dict) else None
    common = reading if isinstance(layers, dict) else replace(reading, layers=layers)
    readings = readings_of(loaded, common, by_model)
    own = isinstance(image_set, ImageSet)  # a loader decides on both
    largest, drawn = (int(batch_size), int(seed)) if own else (max(source.sizes), None)
    return SweepRequest(loaded, readings, image_set, kinds, largest, drawn, centering, layers), source


def _streamed(request: SweepRequest, source: BatchSource, execution: Execution, started: float) -> SweepResult:
    """A sweep that keeps sums alone."""
    kinds, centering = request.kinds, request.centering
    with ExitStack() as stack:
        accumulator = Accumulator(
            list(kinds.methods.values()), kinds.kernels, [estimator.name for estimator in kinds.estimators],
            keep=kinds.keep.patterns, workers=execution.workers, memory=execution.memory,
        )  # fmt: skip
        stack.callback(accumulator.close)
        stream = LayerStream(request.models, source, request.readings, execution.device)
        stack.enter_context(stream.evaluating())
        sample = stream.sample()
        kinds.keep.require_among([layer for _, layer, _ in walk(sample.representations)])
        cost = estimate(stream, sample, accumulator.methods_of, kinds, 1 if centering is None else 2, execution)
        cost.require(execution, physical_bytes())
        cost = cost.started(started, partial(accumulator.rehearse, sample.representations))
        execution.say(f"sweep: {cost}")
        inputs = {(model, layer): part.input for model, layer, part in walk(sample.representations)}
        del sample
        if centering is not None:
            accumulator.means = gather_means(stream, centering, execution)
        pairs = stack.enter_context(execution.bar("pairs", None if cost.open_ended else cost.pairs, "pair", position=1))
        accumulator.on_pairs = pairs.update
        with execution.bar("images", source.count, "image", position=0) as bar:
            for batch in source.batches():
                stream.feed(batch, accumulator)
                bar.update(len(batch))
        result = accumulator.result().with_inputs(inputs).with_steps(request.models)
    result.dataset.attrs.update(request.attributes())
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
