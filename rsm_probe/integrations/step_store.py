"""The steps of a training in an RSM store, each a model of its own: NAME@STEP."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rsm_probe.comparison.alignment import Estimator
from rsm_probe.comparison.grid import RsmKey
from rsm_probe.errors import StorageError
from rsm_probe.execution.execution import Execution
from rsm_probe.forward.layer_stream import readings_of
from rsm_probe.integrations.step_rsms import StepRsms
from rsm_probe.similarity.centering import Centering
from rsm_probe.similarity.kernels import Kernel
from rsm_probe.sources.images.batches import BatchSource
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.loaders import ImageLoader
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.reading import Reading
from rsm_probe.stored_products.product_store import ProductStore
from rsm_probe.streaming.kept_rsms import BatchRsms, RsmKinds
from rsm_probe.streaming.rsm_store import RsmStore
from rsm_probe.streaming.stored_sweep import StoredSweep
from rsm_probe.streaming.sweep_request import STORE, SweepRequest


class StepStore:
    """Writes the RSMs of one step after the other into the store of a folder, and reads those of earlier steps.

    Args:
        folder: the folder, as of `sweep(..., out=)`.
        images: the images.
        source: their batches.
        kinds: which RSMs of every layer.
        batch_size: largest number of images in a mini-batch.
        seed: of the order of the images; None for a loader.
        centering: which mean is subtracted.
        execution: how the work runs.
    """

    def __init__(
        self,
        folder: Path,
        images: ImageSet | ImageLoader,
        source: BatchSource,
        kinds: RsmKinds,
        batch_size: int,
        seed: int | None,
        centering: Centering | None,
        execution: Execution,
    ) -> None:
        self.folder, self._images, self._source, self._kinds, self._execution = folder, images, source, kinds, execution
        self._batch_size, self._seed, self._centering = batch_size, seed, centering

    def write(self, model: LoadedModel, reading: Reading, step: int) -> StepRsms:
        """Pass the images through a model, unless the store has its RSMs, and return these.

        Raises:
            StorageError: the store is in use, holds other mini-batches, or cannot be written.
            RsmProbeError: as of `sweep`.
        """
        models = {model.name: model}
        request = SweepRequest(
            models, readings_of(models, reading), self._images, self._kinds, self._batch_size, self._seed,
            self._centering, reading.layers,
        )  # fmt: skip
        with ProductStore.writing(self.folder / STORE) as store:
            sweep = StoredSweep(request, self._source, self.folder, store, self._execution)
            sweep.compute(time.perf_counter())
            sweep.mark_finished()
            keys = self._kinds.keys([(model.name, layer) for layer in sweep.layers[model.name]])
            rsms = StepRsms(step, self._kinds.estimators[0])
            for batch in sweep.batches:
                ids = store.parts[batch.part].ids
                values = store.rsms(sweep.series, self._kinds.kernels, batch, slice(None))
                rsms.add(BatchRsms(keys, values, [ids[k] for k in batch.positions], []))
        return rsms

    def earlier(self, network: str, step: int) -> list[StepRsms]:
        """The first and the last step before one, of an earlier run; [] if there are none."""
        try:
            store = RsmStore.open(self.folder)
        except StorageError:  # before the first step
            return []
        numbers = [model.removeprefix(f"{network}@") for model in store.models if model.startswith(f"{network}@")]
        steps = sorted(int(number) for number in numbers if number.isdecimal() and int(number) < step)
        kernels, estimator = self._kinds.kernels, self._kinds.estimators[0]
        return [
            read_rsms(store, f"{network}@{k}", kernels, estimator, k) for k in dict.fromkeys(steps[:1] + steps[-1:])
        ]


def read_rsms(
    store: RsmStore, model: str, kernels: Sequence[Kernel] | None, estimator: Estimator, step: int
) -> StepRsms:
    """Read the RSMs of one model of a store, one mini-batch at a time."""
    selected, rsms = store.select(models=model, kernels=kernels), StepRsms(step, estimator)
    for number, ids in enumerate(selected.ids):
        keys: list[RsmKey] = selected.keys
        rsms.add(BatchRsms(keys, selected.rsms(number), list(ids), []))
    return rsms
