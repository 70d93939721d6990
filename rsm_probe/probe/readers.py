"""How a layer's output is read as tokens: learned once from a traced pass, for every kind of input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rsm_probe.errors import RepresentationError
from rsm_probe.probe.representation import Grid, Layout, Representation, infer_layout, pick_tensor, to_representation
from rsm_probe.probe.torch_internals import unobserved
from rsm_probe.probe.tracing.inputs import OtherInput, find_images, leaves, other_inputs, signature
from rsm_probe.probe.tracing.origins import Elsewhere, Lost, Origin
from rsm_probe.probe.tracing.trace import Trace
from rsm_probe.probe.tracing.traced_layout import (
    JoinedLocationsError,
    TracedLayout,
    UnfollowedInputError,
    as_they_are,
    is_attention,
    likely_layout,
    not_followed,
    read_origin,
)

# Under a pattern, a reason that begins so is expected: a text tower sees no image.
INDEPENDENT = "its output does not depend on the images"
# How the output of one call of a layer is read; a text says why it cannot be.
_Reader = TracedLayout | tuple[Layout, list[Grid]] | str
_Readers = dict[tuple[str, int], _Reader]
# What tells the inputs of two passes apart; see `signature`.
_Kind = tuple[Any, ...]


@dataclass
class LearnedReaders:
    """How outputs are read: learned in traced passes, applied in all later passes over inputs of the same kind.

    Attributes:
        readers: kind of inputs -> (layer, call) -> reader.
        calls: kind of inputs -> how many calls of probed layers a pass has.
        parts: (kind, layer, call) -> which value within a tuple or dict holds the representation.
        locations: (kind, layer, call) -> codes of the locations that the tokens stood for when they were first picked
            by index tensors.
        notes: layer -> what a user should know of how it was read.
        prefixes: layer -> number of prefix tokens, of layers that return token sequences.
    """

    readers: dict[_Kind, _Readers] = field(default_factory=dict)
    calls: dict[_Kind, int] = field(default_factory=dict)
    parts: dict[tuple[_Kind, str, int], int | None] = field(default_factory=dict)
    locations: dict[tuple[_Kind, str, int], Tensor] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    prefixes: dict[str, int] = field(default_factory=dict)


class OutputReader:
    """Reads the outputs of one forward pass. Traces the pass where it is the first over inputs of its kind.

    A pass is traced again where locations are picked by index tensors, since these may differ from pass to pass.

    Args:
        learned: what earlier passes showed; this one adds to it.
        args: positional arguments of the model.
        kwargs: its keyword arguments.

    Attributes:
        batch: number of images; 0 where nothing says it.
        tracing: whether the pass is traced.
    """

    def __init__(self, learned: LearnedReaders, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        inputs = find_images((*args, *kwargs.values()))
        self.batch, self._problem = inputs.batch, inputs.problem
        self._learned = learned
        self._kind = signature(args, kwargs, inputs.grids)
        self._readers = learned.readers.get(self._kind, {})
        self._others: list[OtherInput] = []
        self._unknown_layers = False
        self.tracing = self._kind not in learned.readers
        if self.tracing:
            self._trace = Trace(self.batch)
            self._others = other_inputs(args, kwargs, inputs)
            if inputs.images is not None:
                self._trace.start(inputs.images, inputs.grids)
            for number, other in enumerate(self._others):
                self._trace.pass_by(other.tensor, number)
            self._trace.begin()

    @property
    def calls(self) -> int | None:
        """How many calls of probed layers the pass will have; None where no pass over such inputs has ended."""
        return None if self.tracing else self._learned.calls.get(self._kind)

    def end(self, calls: int | None) -> None:
        """Ends the pass.

        Args:
            calls: how many calls of probed layers it had; None of a pass that failed, from which nothing is learned.
        """
        if calls is not None:
            self._learned.calls[self._kind] = calls
        if self.tracing:
            self._trace.end()
            if calls is not None and not self._trace.by_index:
                self._learned.readers[self._kind] = self._readers
        self.tracing = False
        if self._unknown_layers:  # so that the next pass is traced
            self._learned.readers.pop(self._kind, None)

    def choose(self, label: str, call: int, key: str | None, output: Any) -> Tensor:
        """The part of an output that holds its representation.

        The one that `key` names; without it, the first tensor of at least three axes, of which one is the batch, that
        can be read as locations on a grid; else as `pick_tensor` takes it.
        """
        if key is not None or isinstance(output, Tensor):
            return pick_tensor(output, key, self.batch)
        parts = leaves(output)
        if self.tracing:
            with unobserved():
                self._learned.parts[self._kind, label, call] = self._first_on_a_grid(parts)
        index = self._learned.parts.get((self._kind, label, call))
        return pick_tensor(output, None, self.batch) if index is None else parts[index]

    def _first_on_a_grid(self, parts: list[Any]) -> int | None:
        for index, tensor in enumerate(parts):
            usable = isinstance(tensor, Tensor) and not tensor.is_nested
            if usable and tensor.ndim >= 3 and self.batch in tensor.shape[:2]:
                layout = self._readable(self._trace.of(tensor))
                if layout is not None and layout.grid is not None and not is_attention(layout):
                    return index
        return None

    def read(
        self,
        label: str,
        call: int,
        output: Tensor,
        dtype: torch.dtype,
        args: tuple[Any, ...],
        module: nn.Module,
        layout: Layout | None,
        copy: bool = True,
    ) -> Representation:
        """Reads a layer's output.

        Args:
            label: of the layer.
            call: how often the layer ran before in this pass.
            output: what it returned.
            dtype: of the tokens.
            args: what the layer was given.
            module: the layer.
            layout: how the user says that the output is to be read.
            copy: whether the tokens must outlive the output.

        Raises:
            RepresentationError: the output is not a set of concept vectors, or is ambiguous.
        """
        with unobserved():
            if self.tracing:
                try:
                    self._readers[label, call] = self._learn(label, call, output, args, module, layout)
                except RepresentationError as error:
                    named = f"{label}#{call}" if call and "#" not in label else label
                    self._readers[label, call] = str(error).replace("<layer>", named)
            reader = self._readers.get((label, call))
            if reader is None:
                self._unknown_layers = True
                reader = (
                    "it did not run in the first forward pass over such inputs; call the model again, and that pass is "
                    "followed"
                )
            if isinstance(reader, str):
                raise RepresentationError(reader)
            if isinstance(reader, tuple):
                return to_representation(output.detach().to(dtype, copy=copy), *reader, given=layout is not None)
            if reader.shape != tuple(output.shape):
                raise RepresentationError(
                    f"its output has shape {tuple(output.shape)}, and had {reader.shape} in the first forward pass "
                    f"over inputs of the same shape; open a new Probe"
                )
            if reader.note:
                self._learned.notes[label] = reader.note
            representation = reader.apply(output.detach(), dtype, copy)
            if output.ndim == 3 and reader.grid is not None:
                self._learned.prefixes[label] = representation.prefix.shape[1]
            return representation

    def _learn(
        self, label: str, call: int, output: Tensor, args: tuple[Any, ...], module: nn.Module, layout: Layout | None
    ) -> _Reader:
        trace = self._trace
        if self._problem:
            raise RepresentationError(self._problem)
        origin = trace.of(output)
        if layout is not None:
            return self._proven(label, call, origin, layout) or (layout, [])
        if isinstance(origin, Elsewhere):
            raise self._of_other_inputs(origin, output, module)
        if isinstance(origin, Tensor):
            try:
                traced = self._read_origin(origin)
            except JoinedLocationsError:
                if (given := self._as_given(output, args)) is None:
                    raise
                return given
            # Where locations along one axis were joined, its values look like channels of those along the other.
            finer = self._as_given(output, args) if len(traced.channel_axes) > 1 else None
            if finer is not None and set(finer.channel_axes) < set(traced.channel_axes):
                return finer
            return self._picked(label, call, traced) if trace.by_index else traced
        if isinstance(origin, Lost) and (given := self._as_given(output, args)) is not None:
            return given
        operation = origin.operation if isinstance(origin, Lost) else trace.started and trace.blind
        if operation:
            raise not_followed(tuple(output.shape), operation)
        if trace.started:
            raise RepresentationError(INDEPENDENT)
        if not self.batch:
            raise RepresentationError("nothing among the inputs of the model looks like images (N, C, H, W)")
        return infer_layout(output, self.batch, trace.grids, module), list(trace.grids)

    def _picked(self, label: str, call: int, traced: TracedLayout) -> TracedLayout:
        """The layout of a pass in which locations were picked by index: the next pass may pick others."""
        before = self._learned.locations.setdefault((self._kind, label, call), traced.stands_for)
        if not torch.equal(before, traced.stands_for):
            raise RepresentationError(
                f"its {len(before)} tokens stand for other locations in every forward pass (dropped at random, or "
                f"picked by what the images show); turn that off in the model, or {as_they_are(traced.shape)}"
            )
        if self.batch == 1 and traced.grid is None and len(before) > 1:
            note = "its tokens were picked by index, maybe others of each image; a batch of several images shows it"
            return replace(traced, note=note)
        return traced

    def _read_origin(self, origin: Tensor) -> TracedLayout:
        return read_origin(origin, self.batch, [str(other) for other in self._others])

    def _readable(self, origin: Origin) -> TracedLayout | None:
        """The layout that an origin shows; None where it shows no set of concept vectors."""
        try:
            return self._read_origin(origin) if isinstance(origin, Tensor) else None
        except RepresentationError:
            return None

    def _proven(self, label: str, call: int, origin: Origin, layout: Layout) -> TracedLayout | None:
        """The layout of a sequence for which the user gave one, where the pass shows the same axes, and a grid."""
        if not isinstance(origin, Tensor) or layout not in ("NTC", "TNC", "NCT"):
            return None
        try:
            traced = self._read_origin(origin)
            traced = self._picked(label, call, traced) if self._trace.by_index else traced
        except RepresentationError:
            return None
        is_given = traced.axes == tuple(layout.index(axis) for axis in "NTC")
        return traced if is_given and traced.grid is not None else None

    def _of_other_inputs(self, origin: Elsewhere, output: Tensor, module: nn.Module) -> RepresentationError:
        """Says what an output depends on that sees no image."""
        others = [self._others[number] for number in origin.inputs]
        names = ", ".join(str(other) for other in ([o for o in others if o.is_image] or others)[:3])
        try:
            layout: str = infer_layout(output, self.batch, self._trace.grids, module)
        except RepresentationError:
            layout = likely_layout(tuple(output.shape))
        if any(other.is_image for other in others):
            return UnfollowedInputError(tuple(output.shape), names, layout)
        return RepresentationError(
            f"{INDEPENDENT}, but on {names}; layouts={{'<layer>': {layout!r}}} takes its vectors as they are"
        )

    def _as_given(self, output: Tensor, args: tuple[Any, ...]) -> TracedLayout | None:
        """A layer that mixes locations, and returns the shape that it was given, keeps its input's axes."""
        origins = (self._trace.of(value) for value in args if isinstance(value, Tensor))
        same_shape = (origin for origin in origins if isinstance(origin, Tensor) and origin.shape == output.shape)
        return next((layout for origin in same_shape if (layout := self._readable(origin)) is not None), None)


def declared_prefix(model: nn.Module) -> int | None:
    """How many tokens a model says stand before its locations (timm, transformers); None where it says nothing."""
    for module in model.modules():
        if isinstance(count := getattr(module, "num_prefix_tokens", None), int):
            return count
    registers = getattr(getattr(model, "config", None), "num_register_tokens", None)
    return 1 + registers if isinstance(registers, int) else None
