"""Batches of images on their way through probed models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsm_probe.checks import require_seed, require_whole
from rsm_probe.comparison.alignment import get_estimator
from rsm_probe.errors import ImageError, ModelError, nearest
from rsm_probe.execution.devices import find_device
from rsm_probe.probe.layers import Layers
from rsm_probe.probe.probe import Probe
from rsm_probe.probe.representation import Representation
from rsm_probe.probe.wrappers import evaluating
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.preprocessing import prepared
from rsm_probe.streaming.cost import stopwatch


def make_batches(images: ImageSet, batch_size: int, seed: int, estimators: Sequence[str]) -> list[np.ndarray]:
    """One seeded permutation of the images, cut into batches whose sizes differ by at most one.

    Raises:
        ImageError: batches that are too small for the estimators; no whole numbers.
    """
    require_whole(batch_size, "batch_size", 1, ImageError)
    require_seed(seed, "seed", ImageError)
    fewest = max(get_estimator(estimator).fewest for estimator in estimators)
    if batch_size < fewest:
        raise ImageError(
            f"batch_size={batch_size} is too small: {' and '.join(estimators)} CKA needs at least {fewest}"
        )
    if len(images) < fewest:
        raise ImageError(
            f"{images.name} holds {len(images)} images; {' and '.join(estimators)} CKA needs at least {fewest}"
        )
    # Rounding up keeps every batch within batch_size; where that would leave batches too small, they get fewer.
    count = min(-(-len(images) // batch_size), len(images) // fewest)
    return np.array_split(np.random.default_rng(seed).permutation(len(images)), count)


class Passing:
    """The models with their probes: batches of images go in, representations come out.

    Args:
        models: name -> model.
        layers: see `Probe`; for all models, or model name -> layers.
        device: where to move the models; None leaves each where it is.
        stack: on whose exit training flags go back.

    Raises:
        LayerError: a name matches no layer; no hook was set then.
        ModelError: layers are given by model, and one is missing or unknown; the device is not there.
    """

    def __init__(
        self,
        models: Mapping[str, LoadedModel],
        layers: Layers | Mapping[str, Layers],
        device: str | torch.device | None,
        stack: ExitStack,
    ) -> None:
        moved_to = None if device is None else find_device(device, ModelError)
        if isinstance(layers, Mapping):
            for name in models:
                if name not in layers:
                    raise ModelError(f"layers= names no layers for model {name!r}; it has {', '.join(layers)}")
            for name in layers:
                if name not in models:
                    near = nearest(str(name), models)
                    raise ModelError(f"layers= names layers for a model {name!r}{near}; there are {', '.join(models)}")
        self.models = models
        self.probes: dict[str, Probe] = {}
        for name, model in models.items():
            if moved_to is not None:
                model.module.to(moved_to)
            self.probes[name] = Probe(model.module, layers[name] if isinstance(layers, Mapping) else layers)
        # Training flags change only after every name of every model was found.
        for model in models.values():
            stack.enter_context(evaluating(model.module))

    def reduce(self, reducer: Callable[[str], Callable[[str, Representation], Any]]) -> None:
        """What becomes of each representation as soon as it is there, from now on: by model, see `Probe`."""
        for name, probe in self.probes.items():
            probe.reduce = reducer(name)

    def forward(self, images: ImageSet, numbers: np.ndarray) -> dict[str, dict[str, Any]]:
        """Shows a batch to all models; model -> layer -> representation, or what `reduce` makes of it."""
        captured = {}
        raw = [images[int(number)] for number in numbers]
        ready: dict[int, Tensor] = {}
        for name, model in self.models.items():
            key = id(model.preprocess)
            if key not in ready:
                ready[key] = prepared(raw, model.preprocess, images, numbers)
            # Hooks are on only while their own model runs, since models may share modules. Each gets a copy of the
            # batch, which it may change in place.
            with torch.no_grad(), self.probes[name]:
                model.module(ready[key].to(model.device, copy=True))
            captured[name] = self.probes[name].representations
        return captured

    def synchronised(self) -> float:
        """The time when all devices are done."""
        return max(stopwatch(model.device) for model in self.models.values())
