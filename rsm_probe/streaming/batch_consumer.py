"""Batches of layers from the layer stream, from probes in one's own loop, or as they are: checked once for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar
from weakref import ref

import torch

from rsm_probe.arrays import first_nonfinite, real_tensor
from rsm_probe.checks import require_text, require_texts
from rsm_probe.errors import ComparisonError, CostError, LayerError, MatchingError, RepresentationError
from rsm_probe.forward.layer_consumer import ImageBatch, LayerNames
from rsm_probe.probe.probe import Probe
from rsm_probe.probe.representation import Representation, require_finite

# Layer name -> representation, or the `TakenLayer` that a reducer left in its place.
Captured = Probe | Mapping[str, Any]
Probed = Captured | Mapping[str, Captured]
Work = TypeVar("Work")


@dataclass(frozen=True, eq=False)
class TakenLayer(Generic[Work]):
    """One layer of a batch, after a consumer has taken it.

    Attributes:
        consumer: the consumer.
        model: the model for which it took the layer.
        images: number of images.
        device: where the tokens were.
        bad: the first image that holds NaN or infinity; nothing was made of such a layer.
        work: what the consumer makes of the layer.
    """

    consumer: object
    model: str
    images: int
    device: torch.device
    bad: int | None
    work: Work | None


class BatchConsumer(ABC, Generic[Work]):
    """Consumes batches of layers: as a `LayerConsumer` of the layer stream, or by `update` in one's own loop.

    A subclass says what it makes of a layer (`_work_on`), which batches it accepts, and how a batch counts. It gets a
    batch as a whole, after all layers were checked: a batch that is refused leaves no trace.
    """

    def __init__(self) -> None:
        self._last: list[ref[Any]] = []
        self._batch = ImageBatch()
        self._open: dict[tuple[str, str], TakenLayer[Work]] = {}

    def begin(self, batch: ImageBatch) -> None:
        """See `LayerConsumer`."""
        self._batch, self._open = batch, {}

    def take(self, model: str, layer: str, representation: Representation) -> None:
        """See `LayerConsumer`."""
        self._open[model, layer] = self._taken(model, layer, self._lasting(representation))

    def end(self, names: LayerNames) -> None:
        """See `LayerConsumer`."""
        layers = [(model, layer, self._open[model, taken_as]) for (model, taken_as), layer in names.items()]
        self._open = {}
        self._close(self._batch, layers)

    def reducer(self, model: str = "model") -> Callable[[str, Representation], TakenLayer[Work]]:
        """Takes every layer of a `Probe` as soon as it has run, so that no batch is held as a whole.

        Pass it as `Probe(..., reduce=consumer.reducer())`, and the probe to `update` as ever.

        Args:
            model: the name of the model in `update`.
        """
        require_text(model, "the name of a model", RepresentationError)
        return lambda layer, representation: self._taken(model, layer, self._lasting(representation))

    def update(self, probed: Probed, ids: Sequence[str] = (), labels: Sequence[str] = ()) -> None:
        """Takes one batch of your own loop.

        Args:
            probed: a `Probe` after a forward pass, or model name -> probe for several models that saw the same images;
                or what such probes hold.
            ids: names of the images, for error messages and kept RSMs.
            labels: their labels.

        Raises:
            RepresentationError: NaN or infinity (the message names layer and image), or a number of images that differs
                between layers.
            ComparisonError: a layer that the reducer of another consumer, or of another model, has taken.
            LayerError: nothing was captured, or a pass that was taken already.
        """
        self._require_new(probed)
        layers = walk(probed, self)
        ids = require_texts(ids, "ids", RepresentationError)
        labels = require_texts(labels, "labels", RepresentationError)
        self._close(ImageBatch(ids, labels), layers)
        # Every pass counts once, also where what a probe holds was given in its place.
        self._last = [ref(value) for part in _by_model(probed).values() for value in _held(part).values()]

    def _require_new(self, probed: Probed) -> None:
        """Refuses what the last update took."""
        last = {id(value) for reference in self._last if (value := reference()) is not None}
        for model, part in _by_model(probed).items():
            if last & set(map(id, _held(part).values())):
                raise LayerError(
                    f"the pass that the probe of model {model!r} holds was taken already; call the model on the next "
                    f"batch before updating"
                )

    def _close(self, batch: ImageBatch, layers: Sequence[tuple[str, str, Any]]) -> None:
        """Checks the layers of a batch and adds them: those that were taken as they ran, and those that were not yet.

        The cheap checks come first, before any work on a layer that is only handed over now.
        """
        if not self._accepts([(model, layer) for model, layer, _ in layers], _require_one_batch(layers, batch)):
            return
        taken: dict[tuple[str, str], TakenLayer[Work]] = {}
        for model, layer, part in layers:
            taken[model, layer] = part if isinstance(part, TakenLayer) else self._taken(model, layer, part)
            require_finite(model, layer, taken[model, layer].bad, batch.ids)
        self._add(batch, taken)

    def _taken(self, model: str, layer: str, representation: Representation) -> TakenLayer[Work]:
        tokens = representation.tokens
        bad = first_nonfinite(tokens)
        work = self._work_on(model, layer, representation) if bad is None else None
        return TakenLayer(self, model, len(tokens), tokens.device, bad, work)

    def _lasting(self, representation: Representation) -> Representation:
        """A representation whose tokens stay as they are for as long as the work on them takes."""
        return representation

    @abstractmethod
    def _work_on(self, model: str, layer: str, representation: Representation) -> Work:
        """Starts or does the work on the finite tokens of a layer."""

    @abstractmethod
    def _accepts(self, layers: Sequence[tuple[str, str]], images: int) -> bool:
        """Whether a batch of these (model, layer) counts; raises where it must not come."""

    @abstractmethod
    def _add(self, batch: ImageBatch, taken: Mapping[tuple[str, str], TakenLayer[Work]]) -> None:
        """Adds a batch that was checked."""


def walk(probed: Probed, consumer: object = None) -> list[tuple[str, str, Any]]:
    """(model, layer, representation) of everything that was captured.

    Args:
        probed: a probe or what it holds, whose model is then called "model"; or model name -> these.
        consumer: whose reducers may have taken layers already; each has its `TakenLayer` in place of a representation.

    Raises:
        LayerError: nothing was captured; neither probes nor mappings by name.
        RepresentationError: an entry is not a representation, or its tokens are not real numbers (N, S, C).
        ComparisonError: another consumer took a layer, or the same one for another model.
    """
    layers = []
    for model, part in _by_model(probed).items():
        if not (captured := _held(part)):
            raise LayerError(
                f"model {model!r} captured nothing; call the model inside the 'with' block before updating (a layer "
                f"that runs outside of the model's forward, as in encode_image(), empties its probe)"
            )
        for layer, value in captured.items():
            require_text(layer, f"the name of a layer of model {model!r}", LayerError)
            layers.append((model, layer, _checked(model, layer, value, consumer)))
    return layers


def _by_model(probed: Probed) -> Mapping[str, Captured]:
    if isinstance(probed, Probe):
        return {"model": probed}
    if not isinstance(probed, Mapping):
        raise LayerError(
            f"give a Probe after a forward pass, its representations, or model name -> one of these; found "
            f"{type(probed).__name__}"
        )
    if not probed:
        raise LayerError("there is nothing to take up: no model was given")
    if not all(isinstance(part, Probe | Mapping) for part in probed.values()):
        return {"model": probed}
    for name in probed:
        require_text(name, "the name of a model", LayerError)
    return probed


def _checked(model: str, layer: str, value: Any, consumer: object) -> Any:
    where = f"layer {layer!r} of model {model!r}"
    if isinstance(value, TakenLayer) and consumer is not None:
        if value.consumer is not consumer or value.model != model:
            raise ComparisonError(
                f"{where} was reduced by the reducer({value.model!r}) of "
                f"{'this' if value.consumer is consumer else 'another'} {type(value.consumer).__name__}; use the "
                f"reducer({model!r}) of this {type(consumer).__name__}"
            )
        return value
    if not isinstance(value, Representation):
        raise RepresentationError(
            f"{where} holds {type(value).__name__} where a Representation belongs; give the Probe itself, and as its "
            f"reduce= nothing but the reducer of what is updated"
        )
    tokens = real_tensor(value.tokens, f"{where}: tokens", RepresentationError)
    if tokens.ndim != 3 or 0 in tokens.shape[1:]:
        raise RepresentationError(
            f"{where}: tokens must have shape (images, locations, channels), found {tuple(tokens.shape)}"
        )
    return replace(value, tokens=tokens)


def _require_one_batch(layers: Sequence[tuple[str, str, Any]], batch: ImageBatch) -> int:
    """The number of images in a batch, on which all layers and names agree.

    Raises:
        RepresentationError: they do not agree.
    """
    counts = [part.images if isinstance(part, TakenLayer) else len(part.tokens) for _, _, part in layers]
    for what, names in (("ids", batch.ids), ("labels", batch.labels)):
        if len(names) not in (0, counts[0]):
            raise RepresentationError(f"{what} holds {len(names)} names for a batch of {counts[0]} images")
    for (model, layer, _), count in zip(layers, counts, strict=True):
        if count != counts[0]:
            raise RepresentationError(
                f"layer {layer!r} of model {model!r} holds {count} images, others {counts[0]}; "
                f"all models must see the same batch"
            )
    return counts[0]


def _held(part: Captured) -> Mapping[str, Any]:
    return part.representations if isinstance(part, Probe) else part


@contextmanager
def naming(model: str, layer: str) -> Iterator[None]:
    """Adds model and layer to what matching says is wrong.

    Raises:
        MatchingError: what was raised within.
        CostError: what was raised within.
    """
    try:
        yield
    except (MatchingError, CostError) as error:
        raise type(error)(f"layer {layer!r} of model {model!r}: {error}") from error
