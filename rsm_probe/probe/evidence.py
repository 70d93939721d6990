"""What forward passes show about a model's outputs: how each is read, found once for every shape of input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from rsm_probe.errors import RepresentationError
from rsm_probe.probe.origins import LOST, Origin
from rsm_probe.probe.provenance import Provenance
from rsm_probe.probe.reading import JoinedLocationsError, Reading, read_origin
from rsm_probe.probe.tokens import Grid, Layout, Representation, infer_layout, to_representation

INDEPENDENT = "its output does not depend on the images"
_Signature = tuple[tuple[int, ...], ...]


class Evidence:
    """Follows the first forward pass over inputs of each shape, and remembers how outputs are read.

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
        self._signature: _Signature = ()
        self._readers: dict[_Signature, dict[tuple[str, int], Reading | tuple[Layout, list[Grid]]]] = {}

    @property
    def following(self) -> bool:
        """Whether the running pass is followed."""
        return self._provenance is not None

    def begin(self, inputs: tuple[Any, ...]) -> None:
        """A forward pass over these inputs starts."""
        self.end()
        tensors = [tensor for value in inputs for tensor in _tensors(value)]
        self._signature = tuple(tuple(tensor.shape) for tensor in tensors)
        self.batch, images, grids = _images(inputs)
        if self._signature not in self._readers:
            self._readers[self._signature] = {}
            self._provenance = Provenance(self.batch)
            if images is not None:
                self._provenance.start(images, grids)
            self._provenance.__enter__()

    def end(self) -> None:
        """The pass is over, or failed."""
        if self._provenance is not None:
            self._provenance.__exit__(None, None, None)
            if self._provenance.by_index:
                self._readers.pop(self._signature, None)
            self._provenance = None

    def forget(self) -> None:
        """The running pass failed: nothing that it showed is kept."""
        if self.following:
            self.end()
            self._readers.pop(self._signature, None)

    def read(
        self,
        label: str,
        call: int,
        output: Tensor,
        dtype: torch.dtype,
        args: tuple[Any, ...],
        module: nn.Module,
        layout: Layout | None,
    ) -> Representation:
        """Reads a layer's output.

        Args:
            label: of the layer.
            call: how often the layer ran before in this pass.
            output: what it returned.
            dtype: of the copy that is kept.
            args: what the layer was given.
            module: the layer.
            layout: how the user says that the output is to be read.

        Raises:
            RepresentationError: the output is no set of concept vectors, or nothing says which.
        """
        readers = self._readers.get(self._signature, {})
        with _disable_current_modes():
            if self.following:
                readers[label, call] = self._reader(output, args, module, layout)
            reader = readers.get((label, call))
            if reader is None:
                raise RepresentationError("it runs more often than in the first forward pass over inputs of this shape")
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
                return reader.apply(output.detach(), dtype)
            return to_representation(output.detach().to(dtype, copy=True), *reader, given=layout is not None)

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
        if origin is LOST and (reading := self._as_given(output, args)) is not None:
            return reading
        if origin is None and provenance.started:
            raise RepresentationError(INDEPENDENT)
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


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _images(inputs: tuple[Any, ...]) -> tuple[int, Tensor | None, Tensor | None]:
    """The number of images in a forward pass, the tensor that holds them where one does, and the grids of patches.

    That is the first floating tensor of four or more axes; else a list of images, as detectors take them; else patches
    (N, L, C) that come with whole numbers (N, 2) or (N, L, 2), their grids; else the first axis of any tensor.
    """
    values = [v for value in inputs for v in (value.values() if isinstance(value, Mapping) else (value,))]
    tensors = [value for value in values if isinstance(value, Tensor) and value.ndim]
    for tensor in tensors:
        if tensor.ndim >= 4:
            return int(tensor.shape[0]), tensor if tensor.is_floating_point() else None, None
    for value in values:
        if isinstance(value, list | tuple) and value and all(isinstance(item, Tensor) for item in value):
            return len(value), None, None
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
