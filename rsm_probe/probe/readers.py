"""Learns in a traced pass how to read layer outputs as tokens, once per kind of input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rsm_probe.errors import RepresentationError
from rsm_probe.probe.facets.attention_calls import AttentionCall, Facets
from rsm_probe.probe.learned_readers import Checked, Fingerprints, Kind, LearnedReaders, Reader
from rsm_probe.probe.representation import Layout, Representation, infer_layout, pick_tensor, to_representation
from rsm_probe.probe.torch_internals import unobserved
from rsm_probe.probe.tracing.followed_input import FollowedInput, follow, images_of
from rsm_probe.probe.tracing.inputs import OtherInput, image_inputs, leaves, other_inputs, shown, signature
from rsm_probe.probe.tracing.operation_log import LoggedPass, OperationLog
from rsm_probe.probe.tracing.origins import Elsewhere, Lost, Origin
from rsm_probe.probe.tracing.trace import Trace
from rsm_probe.probe.tracing.traced_layout import (
    JoinedLocationsError,
    TracedLayout,
    as_they_are,
    is_attention,
    likely_layout,
    not_followed,
    of_other_input,
    read_origin,
)

# A reason with this beginning is expected for layers matched by a pattern: a text tower sees no image.
INDEPENDENT = "its output does not depend on the images"


class OutputReader:
    """Reads the outputs of one forward pass, and traces the first pass over inputs of each kind.

    Passes in which index tensors select locations are traced every time, since the selection may change.

    Args:
        learned: what earlier passes learned; this pass adds to it.
        args: positional arguments of the model.
        kwargs: its keyword arguments.
        named: the inputs with images that the user named.
        parameters: names of the model's positional parameters.

    Attributes:
        batch: number of images; 0 if unknown.
        tracing: whether the pass is traced.
    """

    def __init__(
        self,
        learned: LearnedReaders,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        named: Sequence[str] = (),
        parameters: Sequence[str] = (),
    ) -> None:
        every = image_inputs(args, kwargs, named, parameters)
        inputs = every[0]
        self.batch, self._problem, self._packing = inputs.batch, inputs.problem, inputs.grids
        self._learned = learned
        self._signature = signature(args, kwargs, inputs)
        if inputs.images is None:  # nothing shows what steers the model
            learned.read[self._signature.shapes] = frozenset(name for name, _ in self._signature.wholes)
        self._base = learned.kind(self._signature)
        kind: Kind = (*self._base, self._signature.scalars)
        self._kind = learned.alike.get(kind, kind)
        # PyTorch may compute in different operations in each of these modes.
        self._modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled())
        self._others: list[OtherInput] = []
        self._unknown_layers = False
        self._fingerprints: Fingerprints = {}
        self._logged: LoggedPass | None = None
        self.tracing = self._kind not in learned.readers
        images = [image for given in every for image in images_of(given)]
        self._has_images = inputs.images is not None
        checked = learned.checked.get((self._base, self._modes))
        if self.tracing and checked is not None and checked.agree and checked.kind in learned.readers:
            self.tracing, self._kind, self._fingerprints = False, checked.kind, checked.fingerprints
            self._logged = LoggedPass(images)
            self._logged.begin()
        self._readers = learned.readers.get(self._kind, {})
        self._facets = learned.facets.get(self._kind, {})
        if self.tracing:
            self._trace = Trace(self.batch)
            self._others = other_inputs(args, kwargs, inputs)
            if inputs.images is not None:
                self._trace.start(inputs.images, inputs.grids)
            self._shared: list[str] = []  # with memory of another input
            for number, other in enumerate(self._others):
                if self._trace.of(other.tensor) is not None:
                    self._shared.append(other.name)
                self._trace.pass_by(other.tensor, number)
            if self._signature.scalars and self._has_images:
                self._trace.log = OperationLog(images)
            self._trace.begin(watching=bool(self._signature.wholes))
            name = shown(inputs.name) if len(every) > 1 else ""
            self._followed = [FollowedInput(self._trace, self.batch, self._others, name, images_of(inputs))]
            self._followed += [follow(args, kwargs, given) for given in every[1:]]

    @property
    def calls(self) -> int | None:
        """The expected number of calls of probed layers; None until a pass over inputs of this kind has ended."""
        return None if self.tracing else self._learned.calls.get(self._kind)

    def end(self, calls: int | None) -> None:
        """Ends the pass.

        Args:
            calls: number of calls of probed layers; None for a failed pass, which teaches nothing.
        """
        if self.tracing:
            for followed in self._followed[::-1]:
                followed.trace.end()
            if calls is not None:
                self._learn_kind(calls)
        elif self._logged is not None:
            self._logged.end()
            if calls is not None and not self._unknown_layers:
                self._learned.remember((*self._base, self._signature.scalars), self._kind)
        elif calls is not None:
            self._learned.calls[self._kind] = calls
        self.tracing = False
        if self._unknown_layers:  # so that the next pass is traced
            if self._logged is None:
                self._learned.readers.pop(self._kind, None)
            else:
                self._learned.checked[self._base, self._modes].agree = False

    def _learn_kind(self, calls: int) -> None:
        """Learns from a traced pass what is read alike in later ones."""
        learned, trace, shapes = self._learned, self._trace, self._signature.shapes
        named = {name for name, _ in self._signature.wholes}
        if trace.read is not None:
            marked = {other.name: number for number, other in enumerate(self._others)}
            named = {name for name in named if name not in marked or name in self._shared or marked[name] in trace.read}
        learned.read[shapes] = learned.read.get(shapes, frozenset()) | named
        before, self._base = self._kind, learned.kind(self._signature)
        self._kind = (*self._base, self._signature.scalars)
        if before != self._kind:
            learned.parts |= {(self._kind, *key[1:]): part for key, part in learned.parts.items() if key[0] == before}
            learned.locations |= {
                (self._kind, *key[1:]): codes for key, codes in learned.locations.items() if key[0] == before
            }
        learned.calls[self._kind] = calls
        if any(followed.trace.by_index for followed in self._followed):
            return
        learned.readers[self._kind] = self._readers
        learned.facets[self._kind] = self._facets
        if not self._signature.scalars or not self._has_images:
            return
        checked = learned.checked.get((self._base, self._modes))
        if checked is None:
            learned.checked[self._base, self._modes] = Checked(self._kind, self._fingerprints)
        elif checked.kind != self._kind:
            agree = checked.fingerprints == self._fingerprints and learned.calls[checked.kind] == calls
            checked.agree = agree and checked.agree is not False

    def begin_attention(self, layer: str, call: int) -> AttentionCall:
        """Begins to take the facets of one call of an attention layer."""
        return AttentionCall(
            layer,
            None if self.tracing else self._facets.get((layer, call), {}),
            self._depends,
            self._hold,
            self._located,
        )

    def end_attention(self, layer: str, call: int, attention: AttentionCall) -> Facets:
        """Ends the call, and returns its facets."""
        with self._trace.quiet() if self.tracing else nullcontext():
            facets = attention.end()
        if self.tracing:
            self._facets[layer, call] = facets
        return facets

    def unknown(self, problem: str) -> RepresentationError:
        """The error for a layer that ran unlike in the traced pass; the next pass is traced again."""
        self._unknown_layers = True
        return RepresentationError(f"{problem}; call the model again, and the new pass is traced")

    def _depends(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on an input in a traced pass."""
        return any(followed.trace.of(tensor) is not None for followed in self._followed)

    def _located(self, tensor: Tensor) -> bool:
        return any(followed.locates(tensor) is not None for followed in self._followed)

    def _hold(self, tensor: Tensor) -> Tensor:
        """A copy that later operations leave as it is, read like its original."""
        with unobserved():
            copied = tensor.detach().clone()
        for followed in self._followed if self.tracing else ():
            followed.trace.hand_on(tensor, copied)
        return copied

    def choose(self, label: str, call: int, key: str | None, output: Any) -> Tensor:
        """Picks the part of an output that holds its representation.

        This is the part that `key` names. Without a key, it is the first tensor with at least three axes and a batch
        axis that can be read as locations on a grid, else the choice of `pick_tensor`.
        """
        if key is not None or isinstance(output, Tensor):
            return pick_tensor(output, key, self.batch)
        parts = leaves(output)
        if self.tracing:
            with unobserved(), self._trace.quiet():
                self._learned.parts[self._kind, label, call] = self._first_on_a_grid(parts)
        index = self._learned.parts.get((self._kind, label, call))
        return pick_tensor(output, None, self.batch) if index is None else parts[index]

    def _first_on_a_grid(self, parts: list[Any]) -> int | None:
        for index, tensor in enumerate(parts):
            usable = isinstance(tensor, Tensor) and not tensor.is_nested
            for followed in self._followed if usable and tensor.ndim >= 3 else ():
                with self._seen_from(followed):
                    fits = self.batch in tensor.shape[:2]
                    layout = self._readable(self._trace.of(tensor)) if fits else None
                if layout is not None and layout.grid is not None and not is_attention(layout):
                    return index
        return None

    @contextmanager
    def _seen_from(self, followed: FollowedInput) -> Iterator[None]:
        """Reads by the trace of one of several inputs inside."""
        before = self._trace, self.batch, self._others
        self._trace, self.batch, self._others = followed.trace, followed.batch, followed.others
        try:
            yield
        finally:
            self._trace, self.batch, self._others = before

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
            label: the layer's label.
            call: number of earlier calls of the layer in this pass.
            output: the layer's output.
            dtype: dtype of the tokens.
            args: the layer's positional arguments.
            module: the layer.
            layout: the layout that the user gave, or None.
            copy: whether the tokens must outlive the output.

        Raises:
            RepresentationError: the output is not a set of concept vectors, or is ambiguous.
        """
        if self.tracing:
            if self._trace.log is not None:
                self._fingerprints[label, call] = self._trace.log.fingerprint
        elif self._logged is not None and self._logged.log.fingerprint != self._fingerprints.get((label, call)):
            changed = ", ".join(name for name, _ in self._signature.scalars)
            raise self.unknown(
                f"an argument of another value ({changed}) changed what the model computes before it, unlike "
                f"in earlier passes"
            )
        with unobserved(), self._trace.quiet() if self.tracing else nullcontext():
            if self.tracing:
                try:
                    self._readers[label, call] = self._learn_of_inputs(label, call, output, args, module, layout)
                except RepresentationError as error:
                    named = f"{label}#{call}" if call and "#" not in label else label
                    self._readers[label, call] = str(error).replace("<layer>", named)
            reader = self._readers.get((label, call))
            if reader is None:
                raise self.unknown("it did not run in the first forward pass over such inputs")
            if isinstance(reader, str):
                raise RepresentationError(reader)
            if isinstance(reader, tuple):
                read = to_representation(output.detach().to(dtype, copy=copy), *reader[:2], given=layout is not None)
                return replace(read, input=reader[2]) if reader[2] else read
            if reader.shape != tuple(output.shape):
                raise RepresentationError(
                    f"its output has shape {tuple(output.shape)}, but had {reader.shape} in the first forward pass "
                    f"over inputs of the same shape; open a new Probe"
                )
            if reader.note:
                self._learned.notes[label] = reader.note
            representation = reader.apply(output.detach(), dtype, copy)
            if output.ndim == 3 and reader.grid is not None:
                self._learned.prefixes[label] = representation.prefix.shape[1]
            return representation

    def _learn_of_inputs(
        self, label: str, call: int, output: Tensor, args: tuple[Any, ...], module: nn.Module, layout: Layout | None
    ) -> Reader:
        """Learns to read an output by the trace of the input whose locations it has, the first of several."""
        if len(self._followed) == 1:
            return self._learn(label, call, output, args, module, layout)
        everywhere = {followed.name: followed.locates(output) for followed in self._followed}
        located = {name: where for name, where in everywhere.items() if where is not None}
        holding = [followed for followed in self._followed if followed.holds(output)]
        source = next((f for f in self._followed if f.name in located), (holding or self._followed)[0])
        if isinstance(self._trace.of(output), Lost):
            source = self._followed[0]
        names = (
            [name for name, where in located.items() if bool((where & located[source.name]).any())] if located else []
        )
        names = names or [followed.name for followed in holding]
        # A given layout reads the vectors as they are, whatever their input.
        with self._seen_from(self._followed[0] if layout is not None else source):
            reader = self._learn(label, call, output, args, module, layout)
        if isinstance(reader, TracedLayout):
            return replace(reader, input=", ".join(names))
        return reader if isinstance(reader, str) else (*reader[:2], ", ".join(names))

    def _learn(
        self, label: str, call: int, output: Tensor, args: tuple[Any, ...], module: nn.Module, layout: Layout | None
    ) -> Reader:
        trace = self._trace
        if self._problem:
            return self._packed(output, layout)
        origin = trace.of(output)
        if layout is not None:
            return self._proven(label, call, origin, layout) or (layout, [], "")
        if isinstance(origin, Elsewhere):
            raise self._of_other_inputs(origin, output, module)
        if isinstance(origin, Tensor):
            try:
                traced = self._read_origin(origin)
            except JoinedLocationsError:
                if (given := self._as_given(output, args)) is None:
                    raise
                return given
            # After locations along one axis were joined, its values look like channels of those along the other.
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
            raise RepresentationError("none of the model's inputs looks like images (N, C, H, W)")
        return infer_layout(output, self.batch, trace.grids, module), list(trace.grids), ""

    def _packed(self, output: Tensor, layout: Layout | None) -> Reader:
        """Reads an output of a model whose images are packed into one sequence, by the layout that the user gave."""
        if layout is None:
            raise RepresentationError(self._problem)
        if output.ndim != 2 or layout != "NTC":
            return layout, [], ""
        if self._packing is None or not bool((self._packing == self._packing[0]).all()):
            raise RepresentationError(
                f"its output has shape {tuple(output.shape)}, in which {self.batch} images of different sizes are "
                f"packed; give images of one size"
            )
        if len(output) % self.batch:
            raise RepresentationError(
                f"its output has shape {tuple(output.shape)}, which {self.batch} images do not share equally"
            )
        whole = slice(0, len(output) // self.batch), slice(0, 0)
        none = torch.empty(0)
        return TracedLayout(tuple(output.shape), self.batch, (0, 1), (1,), output.shape[1], *whole, None, none)

    def _picked(self, label: str, call: int, traced: TracedLayout) -> TracedLayout:
        """Checks that tokens selected by index stand for the same locations as in earlier passes."""
        before = self._learned.locations.setdefault((self._kind, label, call), traced.stands_for)
        if not torch.equal(before, traced.stands_for):
            raise RepresentationError(
                f"its {len(before)} tokens stand for different locations in each forward pass (dropped at random, or "
                f"selected by image content); turn that off in the model, or {as_they_are(traced.shape)}"
            )
        if self.batch == 1 and traced.grid is None and len(before) > 1:
            note = "its tokens were selected by index, possibly different ones per image; a larger batch would show it"
            return replace(traced, note=note)
        return traced

    def _read_origin(self, origin: Tensor) -> TracedLayout:
        names = {id(image): followed.name for followed in self._followed for image in followed.images}
        followed = {str(other): names[id(other.tensor)] for other in self._others if id(other.tensor) in names}
        return read_origin(origin, self.batch, [str(other) for other in self._others], followed)

    def _readable(self, origin: Origin) -> TracedLayout | None:
        """The layout that an origin shows, or None if it is not a set of concept vectors."""
        try:
            return self._read_origin(origin) if isinstance(origin, Tensor) else None
        except RepresentationError:
            return None

    def _proven(self, label: str, call: int, origin: Origin, layout: Layout) -> TracedLayout | None:
        """The traced layout of a sequence, if its axes agree with the user's layout and it has a grid."""
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
        """The error for an output that depends on other inputs than the images."""
        others = [self._others[number] for number in origin.inputs]
        names = ", ".join(str(other) for other in ([o for o in others if o.is_image] or others)[:3])
        try:
            layout: str = infer_layout(output, self.batch, self._trace.grids, module)
        except RepresentationError:
            layout = likely_layout(tuple(output.shape))
        if any(other.is_image for other in others):
            return of_other_input(tuple(output.shape), names, layout)
        return RepresentationError(
            f"{INDEPENDENT}, but on {names}; layouts={{'<layer>': {layout!r}}} reads its vectors as they are"
        )

    def _as_given(self, output: Tensor, args: tuple[Any, ...]) -> TracedLayout | None:
        """The layout of an input of the same shape: a layer that mixes locations keeps the axes of its input."""
        origins = (self._trace.of(value) for value in args if isinstance(value, Tensor))
        same_shape = (origin for origin in origins if isinstance(origin, Tensor) and origin.shape == output.shape)
        return next((layout for origin in same_shape if (layout := self._readable(origin)) is not None), None)


def declared_prefix(model: nn.Module) -> int | None:
    """The number of prefix tokens that a model declares (timm, transformers), or None."""
    for module in model.modules():
        if isinstance(count := getattr(module, "num_prefix_tokens", None), int):
            return count
    registers = getattr(getattr(model, "config", None), "num_register_tokens", None)
    return 1 + registers if isinstance(registers, int) else None
