"""The two passes of a sweep over its images: means for centring, then RSMs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

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
    centering: Centering,
    checkpoint: Checkpoint | None,
    execution: Execution,
) -> Means:
    """Run the first pass over the images and save the state after every batch.

    Raises:
        StorageError: the state on disk cannot be continued; the message says what to remove.
    """
    means = Means(centering)
    _continue(means, checkpoint, "means")
    for _ in _pass(means, stream, "first pass: means", execution):
        if checkpoint:
            _save_order(checkpoint, stream)
            checkpoint.save("means", means.state())
    return means


def accumulate(
    accumulator: Accumulator,
    stream: LayerStream,
    checkpoint: Checkpoint | None,
    pair_bar: Any,
    pairs_per_layer: int,
    execution: Execution,
) -> None:
    """Run the main pass and save the state after every finished batch.

    Raises:
        StorageError: the state on disk cannot be continued; the message says what to remove.
    """
    if checkpoint:
        accumulator.on_batch = partial(_save_batch, checkpoint, accumulator, stream)
    _continue(accumulator, checkpoint, "sums")
    done = sum(size * (size - 1) // 2 for size in stream.source.sizes[: accumulator.batches])
    pair_bar.update(done * ((pair_bar.total or 0) // max(pairs_per_layer, 1)))
    try:
        for _ in _pass(accumulator, stream, "images", execution):
            pass
    finally:
        accumulator.finish()  # also if a later batch fails, so that earlier batches are not lost
    if checkpoint and accumulator.keep.patterns:
        accumulator.batch_rsms = checkpoint.load_rsms(accumulator.batches)


def _save_order(checkpoint: Checkpoint, stream: LayerStream) -> None:
    """Save what shows whether the batches of a later process are the same, before a state that relies on them."""
    if state := stream.source.state():
        checkpoint.save("order", state)


def _save_batch(checkpoint: Checkpoint, accumulator: Accumulator, stream: LayerStream, rsms: BatchRsms) -> None:
    _save_order(checkpoint, stream)
    if rsms.keys:  # RSMs first: once the sums are saved, the batch counts as done
        checkpoint.save_rsms(accumulator.batches - 1, rsms)
    checkpoint.save("sums", accumulator.state())


def _continue(consumer: Means | Accumulator, checkpoint: Checkpoint | None, stage: str) -> None:
    """Restore the saved state of a stage, if there is one.

    Raises:
        StorageError: the state cannot be continued; the message says what to remove.
    """
    if checkpoint is None or (state := checkpoint.load(stage)) is None:
        return
    try:
        consumer.restore(state)
    except (KeyError, ValueError, TypeError) as error:
        raise StorageError(
            f"cannot continue from {checkpoint.file(stage)}: {error}. Remove this file and run again: only the pass "
            f"that it belongs to starts over"
        ) from error


def _pass(consumer: Means | Accumulator, stream: LayerStream, title: str, execution: Execution) -> Iterator[None]:
    """Feed the batches that a consumer does not have yet, and yield after each."""
    source = stream.source
    with execution.bar(title, source.count, "image", done=consumer.images, position=0) as bar:
        for batch in source.batches(done=range(consumer.batches)):
            stream.feed(batch, consumer)
            yield
            bar.update(len(batch))
