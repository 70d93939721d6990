"""What forward passes show about a model's outputs: how each is read, found once for every shape of input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rsm_probe.errors import RepresentationError
from rsm_probe.probe.representation import Grid, Layout, Representation, infer_layout, pick_tensor, to_representation
from rsm_probe.probe.torch_internals import unobserved
from rsm_probe.probe.tracing.inputs import Inputs, OtherInput, find_images, leaves, other_inputs, signature
from rsm_probe.probe.tracing.origins import Elsewhere, Lost, Origin
from rsm_probe.probe.tracing.trace import Provenance
from rsm_probe.probe.tracing.traced_layout import (
    JoinedLocationsError,
    Reading,
    UnfollowedInputError,
    as_they_are,
    is_attention,
    likely_layout,
    not_followed,
    read_origin,
)

# Reasons that begin so surprise nobody under a pattern: a text tower sees no image.
INDEPENDENT = "its output does not depend on the images"
# A text says why an output cannot be read.
_Readers = dict[tuple[str, int], Reading | tuple[Layout, list[Grid]] | str]


class Evidence:
    """Follows the first forward pass over inputs of each kind, and remembers how outputs are read.

    A pass is followed again where locations are picked by index tensors, since these may differ from pass to pass.

    Attributes:
        notes: layer -> what a user should know of how it was read.
        prefixes: layer -> number of prefix tokens, of layers that answer with token sequences.
    """

    def __init__(self) -> None:
        self.notes: dict[str, str] = {}
        self.prefixes: dict[str, int] = {}
        self._provenance: Provenance | None = None
        self._inputs, self._others = Inputs(0), list[OtherInput]()
        self._signature: tuple[Any, ...] = ()
        self._readers: dict[tuple[Any, ...], _Readers] = {}
        self._found: _Readers = {}
        self._calls: dict[tuple[Any, ...], int] = {}
        self._other_layers = False
        self._stood_for: dict[tuple[tuple[Any, ...], str, int], Tensor] = {}
        self._parts: dict[tuple[tuple[Any, ...], str, int], int | None] = {}

    @property
    def batch(self) -> int:
        """Number of images in the running forward pass."""
        return self._inputs.batch

    @property
    def calls(self) -> int | None:
        """How many calls of layers the last pass over such inputs had; None before the first."""
        return self._calls.get(self._signature)

    @property
    def following(self) -> bool:
        """Whether the running pass is followed."""
        return self._provenance is not None

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pass over these inputs starts."""
        self.forget()
        self._inputs = find_images((*args, *kwargs.values()))
        self._signature = signature(args, kwargs, self._inputs.grids)
        if self._signature not in self._readers:
            self._found = {}
            self._provenance = Provenance(self.batch)
            self._others = other_inputs(args, kwargs, self._inputs)
            if self._inputs.images is not None:
                self._provenance.start(self._inputs.images, self._inputs.grids)
            for number, other in enumerate(self._others):
                self._provenance.pass_by(other.tensor, number)
            self._provenance.begin()

    def end(self, calls: int) -> None:
        """The pass, with so many calls of layers, is over: what it showed is kept."""
        self._calls[self._signature] = calls
        if self._provenance is not None:
            self._provenance.end()
            if not self._provenance.by_index:
                self._readers[self._signature] = self._found
            self._provenance = None
        self._follow_again_if_needed()

    def forget(self) -> None:
        """A pass that was followed failed: nothing that it showed is kept."""
        if self._provenance is not None:
            self._provenance.end()
            self._provenance = None
        self._follow_again_if_needed()

    def _follow_again_if_needed(self) -> None:
        if self._other_layers:
            self._readers.pop(self._signature, None)
        self._other_layers = False

    def choose(self, label: str, call: int, output: Any) -> Tensor:
        """The part of an output that holds its representation, where no key says which.

        The first tensor of at least three axes, of which one is the batch, that can be read as locations on a grid;
        else as `pick_tensor` takes it.
        """
        if isinstance(output, Tensor):
            return pick_tensor(output, None, self.batch)
        parts = leaves(output)
        if self._provenance is not None:
            with unobserved():
                self._parts[self._signature, label, call] = self._first_on_a_grid(parts)
        place = self._parts.get((self._signature, label, call))
        return pick_tensor(output, None, self.batch) if place is None else parts[place]

    def _first_on_a_grid(self, parts: list[Any]) -> int | None:
        assert self._provenance is not None
        for place, tensor in enumerate(parts):
            usable = isinstance(tensor, Tensor) and not tensor.is_nested
            if usable and tensor.ndim >= 3 and self.batch in tensor.shape[:2]:
                origin = self._provenance.of(tensor)
                try:
                    reading = read_origin(origin, self.batch) if isinstance(origin, Tensor) else None
                except RepresentationError:
                    continue
                if reading is not None and reading.grid is not None and not is_attention(reading):
                    return place
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
            RepresentationError: the output is no set of concept vectors, or nothing says which.
        """
        with unobserved():
            if self.following:
                try:
                    self._found[label, call] = self._reader(label, call, output, args, module, layout)
                except RepresentationError as error:
                    named = f"{label}#{call}" if call and "#" not in label else label
                    self._found[label, call] = str(error).replace("<layer>", named)
            readers = self._found if self.following else self._readers[self._signature]
            reader = readers.get((label, call))
            if reader is None:
                self._other_layers = True
                reader = (
                    "it did not run in the first forward pass over such inputs; call the model again, and that pass is "
                    "followed"
                )
            if isinstance(reader, str):
                raise RepresentationError(reader)
            if isinstance(reader, Reading):
                if reader.shape != tuple(output.shape):
                    raise RepresentationError(
                        f"its output has shape {tuple(output.shape)}, and had {reader.shape} in the first forward pass "
                        f"over inputs of the same shape; open a new Probe"
                    )
                if output.ndim == 3 and reader.grid is not None:
                    self.prefixes[label] = reader.prefix_count
                if reader.note:
                    self.notes[label] = reader.note
                return reader.apply(output.detach(), dtype, copy)
            return to_representation(output.detach().to(dtype, copy=copy), *reader, given=layout is not None)

    def _reader(
        self, label: str, call: int, output: Tensor, args: tuple[Any, ...], module: nn.Module, layout: Layout | None
    ) -> Reading | tuple[Layout, list[Grid]]:
        provenance = self._provenance
        assert provenance is not None
        if self._inputs.problem:
            raise RepresentationError(self._inputs.problem)
        origin = provenance.of(output)
        if layout is not None:
            return self._proven(label, call, origin, layout) or (layout, [])
        if isinstance(origin, Elsewhere):
            raise self._of_other_inputs(origin, output, module)
        if isinstance(origin, Tensor):
            try:
                reading = self._read_origin(origin)
            except JoinedLocationsError:
                if (given := self._as_given(output, args)) is None:
                    raise
                return given
            if len(reading.channel_axes) > 1:
                # Where locations along one axis were joined, its values look like channels of those along the other.
                finer = self._as_given(output, args)
                if finer is not None and set(finer.channel_axes) < set(reading.channel_axes):
                    return finer
            return self._picked(label, call, reading) if provenance.by_index else reading
        if isinstance(origin, Lost):
            if (given := self._as_given(output, args)) is not None:
                return given
            raise not_followed(tuple(output.shape), origin.operation)
        if provenance.started and provenance.blind:
            raise not_followed(tuple(output.shape), provenance.blind)
        if provenance.started:
            raise RepresentationError(INDEPENDENT)
        if not self.batch:
            raise RepresentationError("nothing among the inputs of the model looks like images (N, C, H, W)")
        return infer_layout(output, self.batch, provenance.grids, module), list(provenance.grids)

    def _picked(self, label: str, call: int, reading: Reading) -> Reading:
        """A reading of a pass in which locations were picked by index: others may be picked in the next one."""
        before = self._stood_for.setdefault((self._signature, label, call), reading.stands_for)
        if not torch.equal(before, reading.stands_for):
            raise RepresentationError(
                f"its {len(before)} tokens stand for other locations in every forward pass (dropped at random, or "
                f"picked by what the images show); turn that off in the model, or {as_they_are(reading.shape)}"
            )
        if self.batch == 1 and reading.grid is None and len(before) > 1:
            note = "its tokens were picked by index, maybe others of each image; a batch of several images shows it"
            return replace(reading, note=note)
        return reading

    def _read_origin(self, origin: Tensor) -> Reading:
        return read_origin(origin, self.batch, [str(other) for other in self._others])

    def _proven(self, label: str, call: int, origin: Origin, layout: Layout) -> Reading | None:
        """The reading of a sequence whose layout was said, where the pass shows the same axes, and a grid."""
        assert self._provenance is not None
        if not isinstance(origin, Tensor) or layout not in ("NTC", "TNC", "NCT"):
            return None
        try:
            reading = self._read_origin(origin)
            reading = self._picked(label, call, reading) if self._provenance.by_index else reading
        except RepresentationError:
            return None
        is_said = reading.axes == tuple(layout.index(axis) for axis in "NTC")
        return reading if is_said and reading.grid is not None else None

    def _of_other_inputs(self, origin: Elsewhere, output: Tensor, module: nn.Module) -> RepresentationError:
        """Says what an output depends on that sees no image."""
        assert self._provenance is not None
        others = [self._others[number] for number in origin.inputs]
        names = ", ".join(str(other) for other in ([o for o in others if o.is_image] or others)[:3])
        try:
            layout: str = infer_layout(output, self.batch, self._provenance.grids, module)
        except RepresentationError:
            layout = likely_layout(tuple(output.shape))
        if any(other.is_image for other in others):
            return UnfollowedInputError(tuple(output.shape), names, layout)
        return RepresentationError(
            f"{INDEPENDENT}, but on {names}; layouts={{'<layer>': {layout!r}}} takes its vectors as they are"
        )

    def _as_given(self, output: Tensor, args: tuple[Any, ...]) -> Reading | None:
        """A layer that mixes locations, and returns the shape that it was given, keeps its input's axes."""
        assert self._provenance is not None
        for value in args:
            origin = self._provenance.of(value) if isinstance(value, Tensor) else None
            if isinstance(origin, Tensor) and origin.shape == output.shape:
                try:
                    return self._read_origin(origin)
                except RepresentationError:
                    continue
        return None


def declared_prefix(model: nn.Module) -> int | None:
    """How many tokens a model says stand before its locations (timm, transformers); None where it says nothing."""
    for module in model.modules():
        if isinstance(count := getattr(module, "num_prefix_tokens", None), int):
            return count
    registers = getattr(getattr(model, "config", None), "num_register_tokens", None)
    return 1 + registers if isinstance(registers, int) else None
