"""The two passes of a sweep over its images: the means that centring takes away, then the RSMs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rsm_probe.errors import StorageError
from rsm_probe.similarity.centering import Centering
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.streaming.accumulator import Accumulator
from rsm_probe.streaming.checkpoint import Checkpoint
from rsm_probe.streaming.layer_stream import Passing
from rsm_probe.streaming.means import Means
from rsm_probe.streaming.result import BatchRsms


def gather_means(
    passing: Passing,
    images: ImageSet,
    batches: list[np.ndarray],
    centering: Centering,
    checkpoint: Checkpoint | None,
    progress: bool,
) -> Means:
    """The first pass over the images, with the state on disk after every batch."""
    means, done = Means(centering), 0
    stored = checkpoint.load("means") if checkpoint else None
    if checkpoint is not None and stored is not None:
        _restore(means.restore, stored, checkpoint.file("means"))
        done = int(stored["batches"])
    passing.reduce(lambda model: means.summed)
    with _image_bar("first pass: means", images, means.images, progress) as bar:
        for number in range(done, len(batches)):
            means.update(passing.forward(images, batches[number]), [images.ids[k] for k in batches[number]])
            if checkpoint:
                checkpoint.save("means", {"batches": np.array(number + 1), **means.state()})
            bar.update(len(batches[number]))
    return means


def accumulate(
    accumulator: Accumulator,
    passing: Passing,
    images: ImageSet,
    batches: list[np.ndarray],
    checkpoint: Checkpoint | None,
    pair_bar: Any,
    pairs_per_layer: int,
    progress: bool,
) -> None:
    """The main pass, with the state on disk after every finished batch.

    Raises:
        StorageError: the state on disk cannot be continued; the message says what to remove.
    """
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
            _restore(accumulator.restore, stored, checkpoint.file("sums"))
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


def _restore(restore: Callable[[Mapping[str, Any]], None], stored: Mapping[str, Any], file: Path) -> None:
    """Continues from a file.

    Raises:
        StorageError: it does not hold what can be continued.
    """
    try:
        restore(stored)
    except (KeyError, ValueError, TypeError) as error:
        raise StorageError(
            f"cannot continue from {file}: {error}. Remove this file and run again: the pass that it belongs to begins "
            f"again, and everything else stays"
        ) from error


def _image_bar(title: str, images: ImageSet, done: int, progress: bool) -> Any:
    return tqdm(desc=title, total=len(images), initial=done, unit="image", position=0, disable=not progress)
