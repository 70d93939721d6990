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

from rsm_probe.errors import ModelError, StorageError
from rsm_probe.arrays import first_nonfinite
from rsm_probe.matching.protocol import Matching
from rsm_probe.matching.registry import get_matching
from rsm_probe.probe.layers import Layers
from rsm_probe.probe.tokens import require_finite
from rsm_probe.similarity.centering import Centering, check_centering
from rsm_probe.similarity.kernels import Kernel, get_kernel
from rsm_probe.similarity.pairs import available_cores
from rsm_probe.sources.images import ImageSet, as_images
from rsm_probe.sources.models import LoadedModel, load_model
from rsm_probe.storage.space import parse_bytes
from rsm_probe.studies.accumulator import Accumulator
from rsm_probe.studies.checkpoint import Checkpoint
from rsm_probe.studies.cost import Cost, available_memory, measure
from rsm_probe.studies.means import Means
from rsm_probe.studies.names import check_kept, is_kept, several
from rsm_probe.studies.passing import Passing, make_batches
from rsm_probe.studies.probed import walk
from rsm_probe.studies.result import BatchRsms, SweepResult

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
    is the ratio of HSICs summed over batches. Fewer images than `batch_size` make one batch.

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
        StorageError: `out` holds the work of other settings, or cannot be written.
    """
    loaded = name_models(models)
    chosen = as_images(images)
    matchings, kernels = several(matchings, "matchings"), several(kernels, "kernels")
    estimators = several(estimators, "estimators")
    keep = [keep] if isinstance(keep, str) else list(keep)
    batches = make_batches(chosen, batch_size, seed, estimators)
    methods = dict(map(get_matching, matchings))
    checkpoint = None
    if out is not None:
        # As JSON gives it back: tuples become lists.
        settings = json.loads(
            json.dumps(
                {
                    "models": {name: model.fingerprint for name, model in loaded.items()},
                    "images": chosen.fingerprint(),
                    "layers": layers,
                    "matchings": {label: repr(method) for label, method in methods.items()},
                    "kernels": [repr(get_kernel(kernel)) for kernel in kernels],
                    "estimators": estimators,
                    "batch_size": batch_size,
                    "seed": int(seed),
                    "centering": check_centering(centering),
                    "keep": keep,
                }
            )
        )
        checkpoint = Checkpoint(Path(out) / "checkpoint", settings)
        if (Path(out) / "result.zarr").exists():
            return _finished(Path(out) / "result.zarr", settings)
    with ExitStack() as stack:
        passing = Passing(loaded, layers, device, stack)
        cost = _preflight(passing, chosen, batches, methods, workers, memory, centering, len(kernels), keep)
        if progress:
            tqdm.write(f"sweep: {cost}", file=sys.stderr)
        cost.require(max_hours, available_memory())
        if checkpoint is not None:
            checkpoint.claim()
        means = None
        if centering is not None:
            means = _gather_means(passing, chosen, batches, centering, checkpoint, progress)
        bar = stack.enter_context(tqdm(total=cost.pairs, desc="pairs", unit="pair", position=1, disable=not progress))
        accumulator = Accumulator(
            matchings,
            kernels,
            estimators,
            means=means,
            keep=keep,
            workers=workers,
            memory=memory,
            on_pairs=bar.update,
        )
        stack.callback(accumulator.close)
        _accumulate(accumulator, passing, chosen, batches, checkpoint, bar, cost.pairs_per_layer, progress)
        result = accumulator.result()
    result.dataset.attrs.update(centering=str(centering), batch_size=batch_size, seed=int(seed), source=chosen.name)
    if out is not None:
        result.dataset.attrs["settings"] = json.dumps(settings)
        result.save(Path(out) / "result.zarr")
    return result


def _finished(path: Path, settings: Mapping[str, Any]) -> SweepResult:
    """A stored result, if it is what these settings give.

    Raises:
        StorageError: it is not.
    """
    result = SweepResult.open(path)
    if result.dataset.attrs.get("settings") != json.dumps(settings):
        raise StorageError(f"{path} is the result of other settings; choose another folder or remove it")
    return result


def name_models(models: Any) -> dict[str, LoadedModel]:
    """Models as name -> loaded model, in the order given; models of one name in a list are numbered.

    Raises:
        ModelError: no model, or one that cannot be loaded.
    """
    if isinstance(models, Mapping):
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
    passing: Passing,
    images: ImageSet,
    batches: list[np.ndarray],
    methods: Mapping[str, Matching],
    workers: int | None,
    memory: str | int,
    centering: str | None,
    kernel_count: int,
    keep: Sequence[str],
) -> Cost:
    """Shows a few images to the models, so that unusable layers fail now and the cost is known."""
    numbers = batches[0][:_SAMPLE]
    sample = passing.forward(images, numbers)
    for model, layer, kept in walk(sample):
        require_finite(model, layer, first_nonfinite(kept.tokens), [images.ids[k] for k in numbers])
    names = [layer for _, layer, _ in walk(sample)]
    check_kept(keep, names)
    start = passing.synchronised()
    passing.forward(images, numbers)
    seconds = (passing.synchronised() - start) / len(numbers)
    cores, largest = min(workers or available_cores(), available_cores()), max(map(len, batches))
    layers = measure(sample, methods, parse_bytes(memory), cores, largest * (largest - 1) // 2)
    return Cost(
        layers,
        seconds,
        len(images),
        [len(batch) for batch in batches],
        cores,
        passes=1 if centering is None else 2,
        kernels=kernel_count,
        kept=sum(is_kept(layer, keep) for layer in names) * len(methods) * kernel_count,
    )


def _gather_means(
    passing: Passing,
    images: ImageSet,
    batches: list[np.ndarray],
    centering: Centering,
    checkpoint: Checkpoint | None,
    progress: bool,
) -> Means:
    """The first pass over the images."""
    means, done = Means(centering), 0
    stored = checkpoint.load("means") if checkpoint else None
    if stored is not None:
        done = int(stored.pop("batches"))
        means.restore(stored)
    passing.reduce(lambda model: means.summed)
    with _image_bar("first pass: means", images, means.images, progress) as bar:
        for number in range(done, len(batches)):
            means.update(passing.forward(images, batches[number]), [images.ids[k] for k in batches[number]])
            if checkpoint:
                checkpoint.save("means", {"batches": np.array(number + 1), **means.state()})
            bar.update(len(batches[number]))
    return means


def _accumulate(
    accumulator: Accumulator,
    passing: Passing,
    images: ImageSet,
    batches: list[np.ndarray],
    checkpoint: Checkpoint | None,
    pair_bar: Any,
    pairs_per_layer: int,
    progress: bool,
) -> None:
    """The main pass, with the state on disk after every finished batch."""
    if checkpoint:
        store = checkpoint

        def on_batch(rsms: BatchRsms) -> None:
            # RSMs first: the sums are what says that a batch is done.
            if rsms.keys:
                store.save_rsms(accumulator.batches - 1, rsms)
            store.save("sums", accumulator.state())

        accumulator.on_batch = on_batch
        stored = checkpoint.load("sums")
        if stored is not None:
            accumulator.restore(stored)
    done = accumulator.batches
    pair_bar.update(
        sum(len(b) * (len(b) - 1) // 2 for b in batches[:done]) * (pair_bar.total // max(pairs_per_layer, 1))
    )
    passing.reduce(accumulator.reducer)
    with _image_bar("images", images, accumulator.images, progress) as bar:
        try:
            for numbers in batches[done:]:
                names, labels = [images.ids[k] for k in numbers], [images.labels[k] for k in numbers]
                accumulator.update(passing.forward(images, numbers), ids=names, labels=labels)
                bar.update(len(numbers))
        finally:
            accumulator.finish()  # also when a later batch fails: the earlier one is not lost
    if checkpoint and accumulator.keep:
        accumulator.kept = checkpoint.load_rsms(accumulator.batches)


def _image_bar(title: str, images: ImageSet, done: int, progress: bool) -> Any:
    return tqdm(desc=title, total=len(images), initial=done, unit="image", position=0, disable=not progress)
