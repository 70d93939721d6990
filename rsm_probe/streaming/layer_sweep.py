"""The layer sweep: images pass once through every model, and every layer's RSMs are compared with all others."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from rsm_probe.arrays import first_nonfinite
from rsm_probe.checks import require_flag, require_text
from rsm_probe.errors import ComparisonError, ModelError
from rsm_probe.matching.matching import Matching
from rsm_probe.pairs.matcher import available_cores
from rsm_probe.probe.layers import Layers
from rsm_probe.probe.representation import require_finite
from rsm_probe.similarity.centering import Centering, check_centering
from rsm_probe.similarity.kernels import Kernel
from rsm_probe.sources.images.any_images import as_images
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.loading import load_model
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.preprocessing import warn_of_plain_pixels
from rsm_probe.storage.places import local_folder
from rsm_probe.streaming.accumulator import Accumulator
from rsm_probe.streaming.checkpoint import Checkpoint
from rsm_probe.streaming.cost import Cost, available_memory, check_hours, measure
from rsm_probe.streaming.layer_stream import Passing, make_batches
from rsm_probe.streaming.names import check_kept, check_layers, is_kept
from rsm_probe.streaming.passes import accumulate, gather_means
from rsm_probe.streaming.probed_layers import walk
from rsm_probe.streaming.result import SweepResult

# Images that pass through the models before the start, to see shapes and to time them. A prime that divides hardly any
# number of tokens: which axis holds the images is then clear, also for later batches as long as a sequence.
_SAMPLE = 11


def sweep(
    models: Any,
    images: Any,
    layers: Layers | Mapping[str, Layers] = "blocks",
    matchings: Sequence[str | Matching] = ("identity", "optimal"),
    kernels: Sequence[str | Kernel] = ("linear",),
    batch_size: int = 250,
    device: str | torch.device | None = None,
    workers: int | None = None,
    seed: int = 0,
    *,
    centering: Centering | None = None,
    estimators: Sequence[str] = ("unbiased", "biased"),
    keep: Sequence[str] = (),
    memory: str | int = "1GB",
    max_hours: float | None = 12.0,
    out: str | Path | None = None,
    progress: bool = False,
) -> SweepResult:
    """Compares the RSMs of all layers of all models by mini-batch CKA (paper, appendix G).

    Images pass in one seeded permutation, the same for all models, in batches whose sizes differ by at most one. CKA
    is the ratio of HSICs summed over batches, each by its pairs. Fewer images than `batch_size` make one batch.

    Args:
        models: a module, a `LoadedModel`, a name such as "timm:vit_tiny_patch16_224", a list of these, or name -> one
            of these.
        images: see `rsm_probe.as_images`: an embedded set, a folder, a tensor, a data set.
        layers: see `Probe`; for all models, or model name -> layers.
        matchings: "identity" gives spatio-semantic RSMs, "optimal" semantic ones.
        kernels: "linear", "cosine", "rbf", or kernel objects.
        batch_size: images per mini-batch, at most.
        device: where models run, which moves them: "auto" for a GPU where there is one, or "cpu", "cuda:1", "mps"; None
            leaves each where it is. Affinities follow them, and matching where the device has a kernel.
        workers: CPU threads that match; None for all cores. Results do not depend on it.
        seed: of the permutation of the images.
        centering: None; "location-mean" as in the paper's figures; or "channel-mean". Costs a first pass over the
            images.
        estimators: the first is `result.cka`; "unbiased" needs batches of at least 4 images.
        keep: names or globs of layers whose mini-batch RSMs go into the result.
        memory: budget for affinities waiting to be matched.
        max_hours: refuse if the estimated time is longer; None for no limit.
        out: a folder for the result and its checkpoints; run again with the same settings, a sweep continues there, and
            repeats at most one mini-batch.
        progress: show the estimate and bars for images and pairs.

    Returns:
        A `SweepResult`.

    Raises:
        ModelError: no model, an unknown one, or two of one name.
        ImageError: no images, too few for the estimators, or of different sizes.
        LayerError: unknown layers, or layers that do not run exactly once.
        RepresentationError: NaN or infinity (the message names layer and image); outputs that are no concept vectors.
        CostError: the estimate is above a limit; the message names what is cheaper.
        StorageError: `out` is not the path of a folder, holds the work of other settings, is in use by another process,
            cannot be written, or was removed while the sweep was running.
        ComparisonError: an unknown kernel or estimator, or one that is named twice.
        MatchingError: an unknown matching; representations beyond the range of numbers.
    """
    folder = None if out is None else local_folder(out)
    require_flag(progress, "progress", ComparisonError)
    check_hours(max_hours)
    layers, centering = check_layers(layers), check_centering(centering)
    # Whatever can be refused is refused before anything is loaded, and long before anything is written.
    accumulator = Accumulator(matchings, kernels, estimators, keep=keep, workers=workers, memory=memory)
    loaded = name_models(models)
    chosen = as_images(images)
    named = [estimator.name for estimator in accumulator.estimators]
    batches = make_batches(chosen, batch_size, seed, named)
    checkpoint = None
    if folder is not None:
        # As JSON gives it back: tuples become lists.
        settings = json.loads(
            json.dumps(
                {
                    "models": {name: model.fingerprint for name, model in loaded.items()},
                    "images": chosen.fingerprint(),
                    "layers": layers,
                    "matchings": {label: repr(method) for label, method in accumulator.methods.items()},
                    "kernels": [repr(kernel) for kernel in accumulator.kernels],
                    "estimators": named,
                    "batch_size": int(batch_size),
                    "seed": int(seed),
                    "centering": centering,
                    "keep": accumulator.keep,
                }
            )
        )
        checkpoint = Checkpoint(folder, settings)
        if (result := checkpoint.finished()) is not None:
            return result
    with ExitStack() as stack:
        stack.callback(accumulator.close)
        begun = checkpoint is not None and checkpoint.begun
        if checkpoint is not None and begun:  # or a sweep that runs there would be noticed late
            stack.enter_context(checkpoint.held())
        passing = Passing(loaded, layers, device, stack)
        warn_of_plain_pixels(loaded.values(), chosen)
        sample = passing.forward(chosen, batches[0][:_SAMPLE])
        cost = _preflight(sample, passing, chosen, batches, accumulator, centering)
        if progress:
            tqdm.write(f"sweep: {cost}", file=sys.stderr)
        cost.require(max_hours, available_memory())
        accumulator.rehearse(sample)
        del sample
        if checkpoint is not None:
            if not begun:
                stack.enter_context(checkpoint.held())
            if (result := checkpoint.finished()) is not None:  # by another process, in the meantime
                return result
            checkpoint.claim()
        if centering is not None:
            accumulator.means = gather_means(passing, chosen, batches, centering, checkpoint, progress)
        bar = stack.enter_context(tqdm(total=cost.pairs, desc="pairs", unit="pair", position=1, disable=not progress))
        accumulator.on_pairs = bar.update
        accumulate(accumulator, passing, chosen, batches, checkpoint, bar, cost.pairs_per_layer, progress)
        result = accumulator.result()
        result.dataset.attrs.update(
            centering=str(centering), batch_size=int(batch_size), seed=int(seed), source=chosen.name
        )
        if checkpoint is not None:
            checkpoint.save_result(result)
    return result


def name_models(models: Any) -> dict[str, LoadedModel]:
    """Models as name -> loaded model, in the order given; models of one name in a list are numbered.

    Raises:
        ModelError: no model, or one that cannot be loaded.
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


def _preflight(
    sample: Mapping[str, Mapping[str, Any]],
    passing: Passing,
    images: ImageSet,
    batches: list[np.ndarray],
    accumulator: Accumulator,
    centering: str | None,
) -> Cost:
    """Checks what the models answered to a few images, and shows these again, so that the cost is known."""
    numbers, methods, kernel_count = batches[0][:_SAMPLE], accumulator.methods, len(accumulator.kernels)
    for model, layer, kept in walk(sample):
        require_finite(model, layer, first_nonfinite(kept.tokens), [images.ids[k] for k in numbers])
    names = [layer for _, layer, _ in walk(sample)]
    check_kept(accumulator.keep, names)
    start = passing.synchronised()
    passing.forward(images, numbers)
    seconds = (passing.synchronised() - start) / len(numbers)
    cores, largest = min(accumulator.workers, available_cores()), max(map(len, batches))
    layers = measure(sample, methods, accumulator.memory, cores, largest * (largest - 1) // 2)
    return Cost(
        layers,
        seconds,
        len(images),
        [len(batch) for batch in batches],
        cores,
        passes=1 if centering is None else 2,
        kernels=kernel_count,
        kept=sum(is_kept(layer, accumulator.keep) for layer in names) * len(methods) * kernel_count,
    )
