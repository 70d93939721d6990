"""Batches of layers from the layer stream, from probes in your own loop, or from mappings, all checked here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar
from weakref import ref

import torch
from torch import Tensor

from rsm_probe.arrays import first_nonfinite, real_tensor
from rsm_probe.checks import require_text, require_texts
from rsm_probe.errors import ComparisonError, CostError, LayerError, MatchingError, RepresentationError
from rsm_probe.execution.execution import Execution
from rsm_probe.forward.layer_consumer import ImageBatch, LayerNames
from rsm_probe.matching.matching import Matching
from rsm_probe.pairs.matcher import PairMatcher, PendingProducts
from rsm_probe.probe.probe import Probe
from rsm_probe.probe.representation import Representation, require_finite

# Layer name -> representation, or the `TakenLayer` that a reducer put in its place.
Captured = Probe | Mapping[str, Any]
Probed = Captured | Mapping[str, Captured]
Work = TypeVar("Work")
_Batch = TypeVar("_Batch")


@dataclass(frozen=True, eq=False)
class TakenLayer(Generic[Work]):
    """One layer of a batch, after a consumer has taken it.

    Attributes:
        consumer: the consumer.
        model: name of the model.
        images: number of images.
        device: device of the tokens.
        bad: index of the first image with NaN or infinity, or None.
        work: the consumer's work on the layer, finished or not; None if `bad` is not None.
    """

    consumer: object
    model: str
    images: int
    device: torch.device
    bad: int | None
    work: Work | None


# (model, layer) -> its products, finished or not.
Products = Mapping[tuple[str, str], TakenLayer[PendingProducts]]


class BatchConsumer(ABC, Generic[Work]):
    """Consume batches of layers, as a `LayerConsumer` of the layer stream or by `update` in your own loop.

    A subclass defines the work on a layer (`_work_on`), which batches it accepts (`_accepts`) and how to add a batch
    (`_add`). A batch is added as a whole after all layers were checked, so a rejected batch leaves no trace.
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
        self._open[model, layer] = self._taken(model, layer, self._lasting(model, layer, representation))

    def end(self, names: LayerNames) -> None:
        """See `LayerConsumer`."""
        layers = [(model, layer, self._open[model, taken_as]) for (model, taken_as), layer in names.items()]
        self._open = {}
        self._close(self._batch, layers)

    def reducer(self, model: str = "model") -> Callable[[str, Representation], TakenLayer[Work]]:
        """Make a function that takes each layer of a `Probe` as soon as it has run, so that no whole batch is held.

        Use it as `Probe(..., reduce=consumer.reducer())`, and pass the probe to `update` as usual.

        Args:
            model: name of the model in `update`.

        Raises:
            RepresentationError: the name is not text.
        """
        require_text(model, "the name of a model", RepresentationError)
        return lambda layer, representation: self._taken(model, layer, self._lasting(model, layer, representation))

    def update(self, probed: Probed, ids: Sequence[str] = (), labels: Sequence[str] = ()) -> None:
        """Add one batch of your own loop.

        Args:
            probed: a `Probe` after a forward pass, or model name -> probe for several models that saw the same images.
                `probe.representations` may stand in place of a probe.
            ids: names of the images, for error messages and kept RSMs.
            labels: labels of the images.

        Raises:
            RepresentationError: NaN or infinity (the message names layer and image), or layers with different numbers
                of images.
            ComparisonError: a layer was taken by the reducer of a different consumer or model.
            LayerError: nothing was captured, or the forward pass was already added.
        """
        self._require_new(probed)
        layers = walk(probed, self)
        ids = require_texts(ids, "ids", RepresentationError)
        labels = require_texts(labels, "labels", RepresentationError)
        self._close(ImageBatch(ids, labels), layers)
        # Each forward pass counts once, whether the probe or its representations were given.
        self._last = [ref(value) for part in _by_model(probed).values() for value in _held(part).values()]

    def _require_new(self, probed: Probed) -> None:
        """Reject a forward pass that the last update added."""
        last = {id(value) for reference in self._last if (value := reference()) is not None}
        for model, part in _by_model(probed).items():
            if last & set(map(id, _held(part).values())):
                raise LayerError(
                    f"the forward pass in the probe of model {model!r} was already added; call the model on the next "
                    f"batch before updating"
                )

    def _close(self, batch: ImageBatch, layers: Sequence[tuple[str, str, Any]]) -> None:
        """Check the layers of a batch and add them.

        Layers that no reducer has taken yet are taken here, after the cheap checks.
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

    def _lasting(self, model: str, layer: str, representation: Representation) -> Representation:
        """Return a representation whose tokens do not change while the work on them lasts."""
        return representation

    @abstractmethod
    def _work_on(self, model: str, layer: str, representation: Representation) -> Work:
        """Start or do the work on a layer; its tokens are finite."""

    @abstractmethod
    def _accepts(self, layers: Sequence[tuple[str, str]], images: int) -> bool:
        """Whether a batch of these (model, layer) pairs counts; raise an error if it is not allowed."""

    @abstractmethod
    def _add(self, batch: ImageBatch, taken: Mapping[tuple[str, str], TakenLayer[Work]]) -> None:
        """Add a checked batch."""


def walk(probed: Probed, consumer: object = None) -> list[tuple[str, str, Any]]:
    """List (model, layer, representation) of everything that was captured.

    Args:
        probed: a probe or its representations, whose model is then called "model"; or model name -> one of these.
        consumer: the consumer whose reducers may have taken layers; these have a `TakenLayer` as representation.

    Raises:
        LayerError: nothing was captured, or `probed` holds neither probes nor mappings by name.
        RepresentationError: an entry is not a representation, or its tokens are not real numbers (N, S, C).
        ComparisonError: a layer was taken by the reducer of a different consumer or model.
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
        raise LayerError("no model given")
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
            f"{where} must be a Representation, found {type(value).__name__}; pass the Probe itself, with no reduce= "
            f"but the reducer of the object that you update"
        )
    tokens = real_tensor(value.tokens, f"{where}: tokens", RepresentationError)
    if tokens.ndim != 3 or 0 in tokens.shape[1:]:
        raise RepresentationError(
            f"{where}: tokens must have shape (images, locations, channels), found {tuple(tokens.shape)}"
        )
    return replace(value, tokens=tokens)


def _require_one_batch(layers: Sequence[tuple[str, str, Any]], batch: ImageBatch) -> int:
    """Return the number of images in a batch.

    Raises:
        RepresentationError: layers, ids or labels disagree on it.
    """
    counts = [part.images if isinstance(part, TakenLayer) else len(part.tokens) for _, _, part in layers]
    for what, names in (("ids", batch.ids), ("labels", batch.labels)):
        if len(names) not in (0, counts[0]):
            raise RepresentationError(f"{what} holds {len(names)} names for a batch of {counts[0]} images")
    for (model, layer, _), count in zip(layers, counts, strict=True):
        if count != counts[0]:
            raise RepresentationError(
                f"layer {layer!r} of model {model!r} holds {count} images, but the first layer holds "
                f"{counts[0]}; all models must see the same batch"
            )
    return counts[0]


def _held(part: Captured) -> Mapping[str, Any]:
    return part.representations if isinstance(part, Probe) else part


@contextmanager
def naming(model: str, layer: str) -> Iterator[None]:
    """Add model and layer to error messages of matching.

    Raises:
        MatchingError: a MatchingError was raised in the block.
        CostError: a CostError was raised in the block.
    """
    try:
        yield
    except (MatchingError, CostError) as error:
        raise type(error)(f"layer {layer!r} of model {model!r}: {error}") from error


class Centred(Protocol):
    """Subtracts the mean of a layer, such as `Means`."""

    def subtract(self, model: str, layer: str, tokens: Tensor) -> Tensor:
        """Subtract the mean of a layer from its tokens (N, S, C)."""


class ProductConsumer(BatchConsumer[PendingProducts]):
    """Matches the pairs of images of every layer of a batch; a subclass defines what becomes of the products.

    Args:
        execution: how many CPU threads match, and the memory budget for affinities that wait for them.
        means: means over all images to subtract first; None does not centre.
        on_pairs: called with a number of pairs each time pairs were matched.
        bounds: whether upper bounds are kept.
        alike: whether the products of a matching must not depend on the other matchings, to the last bit: sums over
            tokens that were copied for these may end in other digits than sums over the model's own tensors.
    """

    def __init__(
        self,
        execution: Execution,
        means: Centred | None = None,
        on_pairs: Callable[[int], None] = lambda count: None,
        *,
        bounds: bool = False,
        alike: bool = False,
    ) -> None:
        super().__init__()
        self.means, self.on_pairs, self._bounds, self._alike = means, on_pairs, bounds, alike
        self._backlog: Backlog[tuple[Any, Products]] = Backlog(lambda batch: self._finish_batch(*batch))
        self._opened = ExitStack()
        self._matcher = self._opened.enter_context(PairMatcher(execution, lambda count: self.on_pairs(count)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    def close(self) -> None:
        """Stop the worker threads and drop pairs that wait to be matched."""
        self._opened.close()

    @abstractmethod
    def methods_of(self, model: str, layer: str) -> Mapping[str, Matching]:
        """The matchings of a layer by label; `layer` is its name while the pass runs."""

    @abstractmethod
    def _finish_batch(self, batch: Any, taken: Products) -> None:
        """Use the products of a batch; `batch` is what was given to `_await`."""

    def _lasting(self, model: str, layer: str, representation: Representation) -> Representation:
        at_once = all(method.at_once for method in self.methods_of(model, layer).values())
        if self.means is not None or (at_once and not self._alike):
            return representation  # centring copies the tokens, and immediate matchings need no copy
        # The model may change its own tensors before the workers have matched them.
        return replace(representation, tokens=representation.tokens.clone(memory_format=torch.contiguous_format))

    def _work_on(self, model: str, layer: str, representation: Representation) -> PendingProducts:
        tokens = representation.tokens
        tokens = tokens if self.means is None else self.means.subtract(model, layer, tokens)
        with naming(model, layer):
            methods = self.methods_of(model, layer)
            return self._matcher.submit(tokens, None, methods, representation.grid, bounds=self._bounds)

    def _await(self, batch: Any, taken: Products) -> None:
        """Have a batch finished once its pairs are matched, at the latest with the next batch.

        A GPU computes the next batch while workers match this one. On the CPU both would share the cores: waiting costs
        nothing there, and an interruption loses at most one batch.
        """
        self._backlog.add((batch, taken), ahead=int(any(part.device.type != "cpu" for part in taken.values())))

    def rehearse(self, probed: Probed, methods_of: Callable[[str, str], Mapping[str, Matching]] | None = None) -> None:
        """Match one pair of images of every layer and discard the result, to raise errors of matching early.

        Args:
            probed: layers of a few images, as in `update`.
            methods_of: (model, layer) -> label -> matching; by default as in the batches.

        Raises:
            MatchingError: a matching cannot take a layer; the message names it.
            CostError: a single affinity exceeds the memory budget.
        """
        for model, layer, representation in walk(probed):
            if methods := (methods_of or self.methods_of)(model, layer):
                with naming(model, layer):
                    self._matcher.submit(representation.tokens[:2], None, methods, representation.grid).result()

    def finish(self) -> None:
        """Wait until the workers have matched all pairs."""
        self._backlog.finish()


class Backlog(Generic[_Batch]):
    """A queue of batches that are not yet finished, in their order.

    Args:
        finish: finishes one batch.
    """

    def __init__(self, finish: Callable[[_Batch], None]) -> None:
        self._finish_one = finish
        self._waiting: list[_Batch] = []

    def add(self, batch: _Batch, ahead: int = 0) -> None:
        """Append a batch, then finish the oldest batches until at most `ahead` wait."""
        self._waiting.append(batch)
        self.finish(ahead)

    def finish(self, ahead: int = 0) -> None:
        """Finish the oldest batches until at most `ahead` wait."""
        while len(self._waiting) > ahead:
            try:
                self._finish_one(self._waiting[0])
            except BaseException:
                # If later batches counted after a failed one, the sums would silently lack it.
                self._waiting.clear()
                raise
            self._waiting.pop(0)
