"""What forward passes show about a model's outputs: how each is read, found once for every shape of input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from rsm_probe.errors import RepresentationError
from rsm_probe.probe.origins import Lost, Origin
from rsm_probe.probe.provenance import Provenance
from rsm_probe.probe.reading import JoinedLocationsError, Reading, read_origin
from rsm_probe.probe.tokens import Grid, Layout, Representation, infer_layout, pick_tensor, to_representation

INDEPENDENT = "its output does not depend on the images"
_Readers = dict[tuple[str, int], Reading | tuple[Layout, list[Grid]]]
# Inputs of more whole numbers than this are told apart by their shape only.
_MOST_VALUES = 4096


class Evidence:
    """Follows the first forward pass over inputs of each kind, and remembers how outputs are read.

    A pass is followed again where locations are picked by index tensors, since these may differ from pass to pass.

    Attributes:
        batch: number of images in the running forward pass.
        notes: layer -> what a user should know of how it was read.
        prefixes: layer -> number of prefix tokens, of layers that answer with token sequences.
    """

    def __init__(self) -> None:
        self.batch = 0
        self.notes: dict[str, str] = {}
        self.prefixes: dict[str, int] = {}
        self._provenance: Provenance | None = None
        self._signature: tuple[Any, ...] = ()
        self._readers: dict[tuple[Any, ...], _Readers] = {}
        self._found: _Readers = {}
        self._parts: dict[tuple[tuple[Any, ...], str, int], int | None] = {}

    @property
    def following(self) -> bool:
        """Whether the running pass is followed."""
        return self._provenance is not None

    def begin(self, inputs: tuple[Any, ...]) -> None:
        """A forward pass over these inputs starts."""
        self.forget()
        self._signature = _signature(inputs)
        self.batch, images, grids = _images(inputs)
        if self._signature not in self._readers:
            self._found = {}
            self._provenance = Provenance(self.batch)
            if images is not None:
                self._provenance.start(images, grids)
            self._provenance.__enter__()

    def end(self) -> None:
        """The pass is over: what it showed is kept."""
        if self._provenance is not None:
            self._provenance.__exit__(None, None, None)
            if not self._provenance.by_index:
                self._readers[self._signature] = self._found
            self._provenance = None

    def forget(self) -> None:
        """A pass that was followed failed: nothing that it showed is kept."""
        if self._provenance is not None:
            self._provenance.__exit__(None, None, None)
            self._provenance = None

    def choose(self, label: str, call: int, output: Any) -> Tensor:
        """The part of an output that holds its representation, where no key says which.

        The first tensor of at least three axes, of which one is the batch, that can be read as locations on a grid;
        else as `pick_tensor` takes it.
        """
        if isinstance(output, Tensor):
            return pick_tensor(output, None, self.batch)
        parts = _leaves(output)
        if self._provenance is not None:
            with _disable_current_modes():
                self._parts[self._signature, label, call] = self._first_on_a_grid(parts)
        place = self._parts.get((self._signature, label, call))
        return pick_tensor(output, None, self.batch) if place is None else parts[place]

    def _first_on_a_grid(self, parts: list[Any]) -> int | None:
        assert self._provenance is not None
        for place, tensor in enumerate(parts):
            if isinstance(tensor, Tensor) and tensor.ndim >= 3 and self.batch in tensor.shape[:2]:
                origin = self._provenance.of(tensor)
                try:
                    if isinstance(origin, Tensor) and read_origin(origin, self.batch).grid is not None:
                        return place
                except RepresentationError:
                    continue
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
        with _disable_current_modes():
            if self.following:
                self._found[label, call] = self._reader(output, args, module, layout)
            readers = self._found if self.following else self._readers[self._signature]
            reader = readers.get((label, call))
            if reader is None:
                del self._readers[self._signature]
                raise RepresentationError(
                    "it did not run in the first forward pass over such inputs; call the model again, and that pass is "
                    "followed"
                )
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
        self, output: Tensor, args: tuple[Any, ...], module: nn.Module, layout: Layout | None
    ) -> Reading | tuple[Layout, list[Grid]]:
        provenance = self._provenance
        assert provenance is not None
        origin = provenance.of(output)
        if layout is not None:
            return layout, self._grids_of(origin)
        if isinstance(origin, Tensor):
            try:
                return read_origin(origin, self.batch)
            except JoinedLocationsError:
                if (reading := self._as_given(output, args)) is None:
                    raise
                return reading
        if isinstance(origin, Lost):
            if (reading := self._as_given(output, args)) is not None:
                return reading
            raise _not_followed(output, origin.operation)
        if provenance.started and provenance.blind:
            raise _not_followed(output, provenance.blind)
        if provenance.started:
            raise RepresentationError(INDEPENDENT)
        if not self.batch:
            raise RepresentationError("nothing among the inputs of the model looks like images (N, C, H, W)")
        return infer_layout(output, self.batch, provenance.grids, module), list(provenance.grids)

    def _grids_of(self, origin: Origin) -> list[Grid]:
        """Grids that may lie behind a sequence of which the layout was said."""
        assert self._provenance is not None
        if not isinstance(origin, Tensor):
            return list(self._provenance.grids)
        try:
            grid = read_origin(origin, self.batch).grid
        except RepresentationError:
            return []
        return [grid] if grid is not None else []

    def _as_given(self, output: Tensor, args: tuple[Any, ...]) -> Reading | None:
        """A layer that mixes locations, and returns the shape that it was given, keeps its input's axes."""
        assert self._provenance is not None
        for value in args:
            origin = self._provenance.of(value) if isinstance(value, Tensor) else None
            if isinstance(origin, Tensor) and origin.shape == output.shape:
                try:
                    return read_origin(origin, self.batch)
                except RepresentationError:
                    continue
        return None


def _not_followed(output: Tensor, operation: str) -> RepresentationError:
    return RepresentationError(
        f"its output has shape {tuple(output.shape)}, and the locations that its values belong to were lost in the "
        f"operation {operation!r}; say how to read it with layouts={{'<layer>': 'NTC'}} (or 'NCHW', 'NHWC', ...)"
    )


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _signature(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What decides how a forward pass goes: shapes, and the values of whole numbers, flags and texts."""
    found: list[Any] = []
    for leaf in _leaves(inputs):
        if isinstance(leaf, Tensor):
            found.append((tuple(leaf.shape), leaf.dtype))
            if not leaf.is_floating_point() and not leaf.is_complex() and leaf.numel() <= _MOST_VALUES:
                found.append(tuple(leaf.flatten().tolist()))
        elif isinstance(leaf, bool | int | float | str | None):
            found.append(leaf)
    return tuple(found)


def _images(inputs: tuple[Any, ...]) -> tuple[int, Tensor | list[Tensor] | None, Tensor | None]:
    """The number of images in a forward pass, what holds them, and the grids of patches.

    Images are the tensor of four or more axes that has three channels, else the first of four or more axes; else a list
    of images, as detectors take them; else patches (N, L, C) that come with whole numbers (N, 2) or (N, L, 2), their
    grids; else the number is the first axis of any tensor.
    """
    tensors = [leaf for leaf in _leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim]
    maps = [tensor for tensor in tensors if tensor.ndim >= 4]
    coloured = [tensor for tensor in maps if 3 in tensor.shape[1:]]
    if maps:
        images = (coloured or maps)[0]
        return int(images.shape[0]), images, None
    for value in inputs:
        images_of_a_list = [leaf for leaf in _leaves(value) if isinstance(leaf, Tensor) and leaf.ndim == 3]
        if isinstance(value, list | tuple) and images_of_a_list and all(len(t) in (1, 3) for t in images_of_a_list):
            return len(images_of_a_list), images_of_a_list, None
    for patches in (tensor for tensor in tensors if tensor.ndim == 3 and tensor.is_floating_point()):
        count, length, _ = patches.shape
        for grids in tensors:
            whole = not grids.is_floating_point() and not grids.is_complex() and grids.dtype != torch.bool
            if whole and tuple(grids.shape) in ((count, 2), (count, length, 2)):
                return count, patches, grids
    return int(tensors[0].shape[0]) if tensors else 0, None, None


def declared_prefix(model: nn.Module) -> int | None:
    """How many tokens a model says stand before its locations (timm, transformers); None where it says nothing."""
    for module in model.modules():
        if isinstance(count := getattr(module, "num_prefix_tokens", None), int):
            return count
    registers = getattr(getattr(model, "config", None), "num_register_tokens", None)
    return 1 + registers if isinstance(registers, int) else None
