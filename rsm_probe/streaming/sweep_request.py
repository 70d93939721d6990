"""What a sweep is asked for, and whether a folder holds its result already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rsm_probe.errors import StorageError
from rsm_probe.forward.layer_stream import reading_settings
from rsm_probe.similarity.centering import Centering
from rsm_probe.sources.images.batches import BatchSource
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.loaders import ImageLoader
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.reading import Reading
from rsm_probe.storage.differences import as_stored, differences
from rsm_probe.storage.files import load_arrays
from rsm_probe.stored_products.product_store import ProductStore
from rsm_probe.stored_products.series import StoredLayer
from rsm_probe.streaming.kept_rsms import RsmKinds
from rsm_probe.streaming.result import SweepResult

# The RSMs and the result of a sweep, within its folder.
STORE, RESULT = "rsms.zarr", "result.zarr"


@dataclass(frozen=True, eq=False)
class SweepRequest:
    """What a sweep is asked for, checked and loaded.

    Attributes:
        models: name -> model.
        readings: name of a model -> how it is called and its layers are read.
        images: the images.
        kinds: which RSMs of every layer.
        batch_size: largest number of images in a mini-batch.
        seed: of the order of the images; None for a loader.
        centering: which mean is subtracted.
        layers: layers as the user named them.
    """

    models: Mapping[str, LoadedModel]
    readings: Mapping[str, Reading]
    images: ImageSet | ImageLoader
    kinds: RsmKinds
    batch_size: int
    seed: int | None
    centering: Centering | None
    layers: Any

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Model -> fingerprint, computed once."""
        return {name: model.fingerprint for name, model in self.models.items()}

    @cached_property
    def image_fingerprint(self) -> str:
        """Fingerprint of an image set, computed once, because it reads all files of a folder."""
        return self.images.fingerprint()

    def fingerprint_of(self, source: BatchSource) -> str:
        """Fingerprint of the images that a source yields; a loader knows what it has shown."""
        return self.image_fingerprint if isinstance(self.images, ImageSet) else source.fingerprint()

    @property
    def settings(self) -> dict[str, Any]:
        """What all mini-batches of a store share."""
        return {"batch_size": self.batch_size, "seed": self.seed, "centering": self.centering}

    def attributes(self) -> dict[str, Any]:
        """Attributes of the result."""
        return {"centering": str(self.centering), **self._order, "source": self.images.name}

    @property
    def _order(self) -> dict[str, int]:
        """What decides the mini-batches; a loader decides on their order."""
        return {"batch_size": self.batch_size} | ({} if self.seed is None else {"seed": self.seed})

    def reading_key(self, model: str) -> str:
        """Stands for a model and the layers that are probed in it."""
        reading = self.readings[model]
        content = [self.fingerprints[model], reading.settings(), reading.layers or "blocks"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def layer_key(self, model: str, layer: str) -> str:
        """The key of a layer in a store."""
        return StoredLayer.of(self.fingerprints[model], self.readings[model], layer).key

    def all_settings(self, source: BatchSource) -> dict[str, Any]:
        """All that decides the result, as its attribute `settings` holds it."""
        kinds = self.kinds
        return as_stored(
            {
                "models": self.fingerprints,
                "images": self.fingerprint_of(source),
                "layers": self.layers,
                "matchings": {label: repr(method) for label, method in kinds.methods.items()},
                "kernels": [repr(kernel) for kernel in kinds.kernels],
                "estimators": [estimator.name for estimator in kinds.estimators],
                **self._order,
                "centering": self.centering,
                "keep": kinds.keep.patterns,
                **reading_settings(self.models, self.readings),
            }
        )


def finished_result(folder: Path, settings: Mapping[str, Any], source: BatchSource) -> SweepResult | None:
    """The result in a folder, if it is that of these settings.

    Raises:
        StorageError: the folder holds a sweep of an earlier version, which kept no RSMs: with other settings, or
            unfinished.
    """
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} is a file; choose a folder")
    earlier = folder / "checkpoint"
    store = ProductStore.existing(folder / STORE)
    if (folder / RESULT).exists():
        result = SweepResult.open(folder / RESULT)
        stored = json.loads(result.dataset.attrs.get("settings", "{}"))
        if stored == settings:
            order = store.chunks.attribute("order", list, []) if store is not None else []
            if store is None and (earlier / "order.npz").exists():
                order = load_arrays(earlier / "order.npz")["hashes"].tolist()
            source.require_same({"hashes": np.array(order, np.str_)})
            return result
        if store is None:
            changes = differences(stored, settings)
            raise StorageError(
                f"{folder} holds a sweep with different settings ({changes}), whose RSMs were not kept; choose another "
                f"folder or remove it{source.advice if 'images was' in changes else ''}"
            )
    elif store is None and (earlier / "settings.json").exists():
        raise StorageError(
            f"{folder} holds an unfinished sweep of an earlier version of rsm_probe, which kept sums alone; finish it "
            f"with that version, or remove {earlier} to start again"
        )
    return None
