"""What is left of a sweep in a run folder, before it starts; nothing is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rsm_probe.execution.execution import Execution
from rsm_probe.matching.matching import Matching
from rsm_probe.matching.registry import matching_label
from rsm_probe.runs.plan import ModelLeft
from rsm_probe.sources.images.batches import BatchSource
from rsm_probe.stored_products.product_store import ProductStore
from rsm_probe.streaming.recorder import ModelWork
from rsm_probe.streaming.stored_sweep import StoredSweep, pairs_within
from rsm_probe.streaming.sweep_request import STORE, SweepRequest


def planned_sweep(
    request: SweepRequest,
    source: BatchSource,
    folder: Path,
    layers: Mapping[str, Sequence[str]],
    execution: Execution,
) -> StoredSweep | None:
    """Find out what a sweep has to compute in a folder; no lock is taken.

    Args:
        request: what is compared.
        source: the images in batches.
        folder: the folder of the sweep.
        layers: model -> its layers, which the store may not know yet.
        execution: whether to show progress.

    Returns:
        The sweep, whose `work` is what is left; None if the folder has no RSMs.

    Raises:
        StorageError: the store is damaged, or holds other mini-batches.
        ImageError: see `divide`.
    """
    store = ProductStore.existing(folder / STORE)
    if store is None or not store.parts:
        return None
    sweep = StoredSweep(request, source, folder, store, execution)
    sweep.layers = {name: sweep.layers.get(name) or dict.fromkeys(layers[name], "") for name in request.models}
    sweep.plan()
    return sweep


def left_by_model(sweep: StoredSweep) -> dict[str, ModelLeft]:
    """What is left of each model of a planned sweep."""
    methods, complete, lacking = sweep.request.kinds.methods, sweep.complete, sweep.lacking_means()
    within, left = sum(map(pairs_within, sweep.batches)), dict[str, ModelLeft]()
    for model, layers in sweep.layers.items():
        pairs = {f"{model}/{layer}": {matching_label(method): 0 for method in methods.values()} for layer in layers}
        images = matched = 0
        for batch, works in zip(sweep.batches, sweep.work, strict=True):
            images += len(batch) * ((model in works) + (model in lacking and batch.part == 0))
            for layer, of_layer in works[model].layers.items() if model in works else ():
                matched += pairs_within(batch)
                for method in of_layer.values():
                    pairs[f"{model}/{layer}"][matching_label(method)] += pairs_within(batch)
        words = f"{matched:,} of {within * len(layers):,} pairs are left to match"
        if model in complete:
            words = "complete"
        elif not matched:
            words = "to be matched once with a model of equal content"
        left[model] = ModelLeft(pairs, images, words)
    return left


def rsm_bytes(layers: Sequence[str], methods: Mapping[str, Matching], sizes: Sequence[int]) -> int:
    """Bytes on disk of the RSMs of some layers of a model in mini-batches of these sizes."""
    wanted = ModelWork.of(dict.fromkeys(layers, methods), {layer: layer for layer in layers}, {}).wanted
    return sum(ProductStore.bytes_per_batch(wanted, size) for size in sizes)
