"""The layer stream: batches of images pass through probed models, and a consumer takes each layer as it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsm_probe.checks import require_text, require_texts
from rsm_probe.errors import LayerError, ModelError, nearest
from rsm_probe.execution.devices import find_device
from rsm_probe.forward.layer_consumer import ImageBatch, LayerConsumer, LayerNames
from rsm_probe.probe.layers import Layers
from rsm_probe.probe.probe import Probe
from rsm_probe.probe.representation import Representation
from rsm_probe.probe.wrappers import evaluating
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.preprocessing import prepared, warn_of_plain_pixels

# Images that show the shapes of the layers before long work starts. A prime, which divides hardly any number of tokens:
# which axis holds the images is then clear, also for later batches as long as a sequence.
SAMPLE_IMAGES = 11


class LayerStream:
    """Models with their probes: batches of images go in, and a consumer gets every layer as soon as it has run.

    Each model keeps one probe for all passes, since a probe learns in its first pass how to read the layers.

    Args:
        models: name -> model.
        images: the set that `feed` takes batches of.
        layers: see `Probe`; for all models, or model name -> layers.
        device: where to move the models; None leaves each where it is.

    Raises:
        LayerError: a name matches no layer; no hook was set then.
        ModelError: layers are given by model, and one is missing or unknown; the device is not there.
        ImageError: the first image cannot be read.

    Warns:
        UserWarning: models without preprocessing are about to see pictures.
    """

    def __init__(
        self,
        models: Mapping[str, LoadedModel],
        images: ImageSet,
        layers: Layers | Mapping[str, Layers],
        device: str | torch.device | None = None,
    ) -> None:
        target = None if device is None else find_device(device, ModelError)
        by_model = _by_model(layers, models)
        self.models, self.images = models, images
        self._consumer: LayerConsumer
        self._probes: dict[str, Probe] = {}
        for name, model in models.items():
            if target is not None:
                model.module.to(target)
            self._probes[name] = Probe(model.module, by_model[name], reduce=partial(self._hand_over, name))
        warn_of_plain_pixels(models.values(), images)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, all models are in evaluation mode; their training flags go back on the way out."""
        with ExitStack() as stack:
            for model in self.models.values():
                stack.enter_context(evaluating(model.module))
            yield

    def feed(self, numbers: np.ndarray, consumer: LayerConsumer) -> None:
        """Shows one batch to all models.

        Args:
            numbers: indices of the images, (n,).
            consumer: takes the layers.

        Raises:
            ImageError: an image cannot be read, or the sizes differ after preprocessing.
            RsmProbeError: see `Probe`, and the consumer's own.
        """
        images = self.images
        raw = [images[int(number)] for number in numbers]
        ready: dict[int, Tensor] = {}
        names: dict[tuple[str, str], str] = {}
        self._consumer = consumer
        consumer.begin(ImageBatch([images.ids[k] for k in numbers], [images.labels[k] for k in numbers], numbers))
        for name, model in self.models.items():
            key = id(model.preprocess)
            if key not in ready:
                ready[key] = prepared(raw, model.preprocess, images, numbers)
            probe = self._probes[name]
            # Hooks are on only while their own model runs, since models may share modules. Where there are several
            # models, each gets a copy of the batch, which it may change in place.
            with torch.no_grad(), probe:
                model.module(ready[key].to(model.device, copy=len(self.models) > 1))
            names |= {(name, taken_as): layer for layer, taken_as in probe.representations.items()}
        consumer.end(names)

    def sample(self, numbers: np.ndarray) -> LayerSample:
        """Shows the first few of some images, and copies the layers."""
        layers = LayerSample()
        self.feed(numbers[:SAMPLE_IMAGES], layers)
        return layers

    def _hand_over(self, model: str, layer: str, representation: Representation) -> str:
        """The probes' `reduce`; the name under which a layer was taken stays in `Probe.representations`."""
        self._consumer.take(model, layer, representation)
        return layer


class LayerSample:
    """Copies of all layers for a few images.

    Attributes:
        representations: model -> layer -> representation, in forward order.
        names: see `LayerConsumer.end`.
        batch: the images.
    """

    def __init__(self) -> None:
        self.representations: dict[str, dict[str, Representation]] = {}
        self.names: LayerNames = {}
        self.batch = ImageBatch()
        self._taken: dict[tuple[str, str], Representation] = {}

    def begin(self, batch: ImageBatch) -> None:
        """See `LayerConsumer`."""
        self.batch, self._taken = batch, {}

    def take(self, model: str, layer: str, representation: Representation) -> None:
        """See `LayerConsumer`."""
        tokens, prefix = representation.tokens.clone(), representation.prefix.clone()
        self._taken[model, layer] = replace(representation, tokens=tokens, prefix=prefix)

    def end(self, names: LayerNames) -> None:
        """See `LayerConsumer`."""
        self.names, self.representations = names, {}
        for (model, taken_as), layer in names.items():
            self.representations.setdefault(model, {})[layer] = self._taken[model, taken_as]


def layer_names(layers: Any, what: str = "layers") -> str | list[str]:
    """Names of layers as plain text, or as a list of texts.

    Args:
        layers: as a user gave them.
        what: the argument, for messages.

    Raises:
        LayerError: neither text nor several texts.
    """
    return (
        require_text(layers, what, LayerError) if isinstance(layers, str) else require_texts(layers, what, LayerError)
    )


def _by_model(layers: Layers | Mapping[str, Layers], models: Mapping[str, LoadedModel]) -> Mapping[str, Layers]:
    if not isinstance(layers, Mapping):
        return dict.fromkeys(models, layers)
    for name in [*models, *layers]:
        if name not in layers:
            raise ModelError(f"layers= names no layers for model {name!r}; it has {', '.join(layers)}")
        if name not in models:
            near = nearest(str(name), models)
            raise ModelError(f"layers= names layers for a model {name!r}{near}; there are {', '.join(models)}")
    return layers
