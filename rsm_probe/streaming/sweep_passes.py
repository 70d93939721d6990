"""The two passes of a sweep over its images: the means that centring subtracts, then the RSMs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from rsm_probe.errors import StorageError
from rsm_probe.execution.execution import Execution
from rsm_probe.forward.layer_stream import LayerStream
from rsm_probe.similarity.centering import Centering
from rsm_probe.streaming.accumulator import Accumulator
from rsm_probe.streaming.checkpoint import Checkpoint
from rsm_probe.streaming.kept_rsms import BatchRsms
from rsm_probe.streaming.means import Means


def gather_means(
    stream: LayerStream,
    batches: list[np.ndarray],
    centering: Centering,
    checkpoint: Checkpoint | None,
    execution: Execution,
) -> Means:
    """Runs the first pass over the images, with the state on disk after every batch.

    Raises:
        StorageError: the state on disk cannot be continued; the message says what to remove.
    """
    means = Means(centering)
    _continue(means, checkpoint, "means")
    for _ in _pass(means, stream, batches, "first pass: means", execution):
        if checkpoint:
            checkpoint.save("means", means.state())
    return means


def accumulate(
    accumulator: Accumulator,
    stream: LayerStream,
    batches: list[np.ndarray],
    checkpoint: Checkpoint | None,
    pair_bar: Any,
    pairs_per_layer: int,
    execution: Execution,
) -> None:
    """Runs the main pass, with the state on disk after every finished batch.

    Raises:
        StorageError: the state on disk cannot be continued; the message says what to remove.
    """
    if checkpoint:
        accumulator.on_batch = partial(_save_batch, checkpoint, accumulator)
    _continue(accumulator, checkpoint, "sums")
    done = sum(len(b) * (len(b) - 1) // 2 for b in batches[: accumulator.batches])
    pair_bar.update(done * (pair_bar.total // max(pairs_per_layer, 1)))
    try:
        for _ in _pass(accumulator, stream, batches, "images", execution):
            pass
    finally:
        accumulator.finish()  # also when a later batch fails: the earlier one is not lost
    if checkpoint and accumulator.keep.patterns:
        accumulator.batch_rsms = checkpoint.load_rsms(accumulator.batches)


def _save_batch(checkpoint: Checkpoint, accumulator: Accumulator, rsms: BatchRsms) -> None:
    if rsms.keys:  # RSMs first: the sums are what says that a batch is done
        checkpoint.save_rsms(accumulator.batches - 1, rsms)
    checkpoint.save("sums", accumulator.state())


def _continue(consumer: Means | Accumulator, checkpoint: Checkpoint | None, stage: str) -> None:
    """Restores the state that a stage saved, if it has begun.

    Raises:
        StorageError: it does not hold what can be continued.
    """
    if checkpoint is None or (state := checkpoint.load(stage)) is None:
        return
    try:
        consumer.restore(state)
    except (KeyError, ValueError, TypeError) as error:
        raise StorageError(
            f"cannot continue from {checkpoint.file(stage)}: {error}. Remove this file and run again: the pass that it "
            f"belongs to begins again, and everything else stays"
        ) from error


def _pass(
    consumer: Means | Accumulator, stream: LayerStream, batches: list[np.ndarray], title: str, execution: Execution
) -> Iterator[None]:
    """Feeds the batches that a consumer does not have yet, and yields after each."""
    with execution.bar(title, len(stream.images), "image", done=consumer.images, position=0) as bar:
        for numbers in batches[consumer.batches :]:
            stream.feed(numbers, consumer)
            yield
            bar.update(len(numbers))
