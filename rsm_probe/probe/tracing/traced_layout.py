"""Reads a layer's output as concept vectors, from the origins of its values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from rsm_probe.errors import RepresentationError
from rsm_probe.probe.representation import Grid, Representation
from rsm_probe.probe.tracing.location_codes import EXTENT, NOWHERE, decode, input_of_code
from rsm_probe.probe.tracing.origins import first_location, held_once


class JoinedLocationsError(RepresentationError):
    """Every value of an output combines all locations of an image."""


def of_other_input(shape: tuple[int, ...], others: str, layout: str) -> RepresentationError:
    """The error for an output that belongs to an input of the model other than the traced images."""
    return RepresentationError(
        f"its output has shape {shape} and belongs to {others}, whose locations are not traced; "
        f"layouts={{'<layer>': {layout!r}}} reads it as it is (or give the layout that fits its axes), and inputs= "
        f"names the inputs that hold images"
    )


def likely_layout(shape: tuple[int, ...]) -> str:
    """The most likely layout of an output with this shape."""
    return {2: "NC", 4: "NCHW", 5: "NCTHW"}.get(len(shape), "NTC")


def as_they_are(shape: tuple[int, ...]) -> str:
    """Suggests how to read the vectors of an output without locations, as a part of a message."""
    return f"{_given_layout(shape)} reads the vectors as they are"


def _given_layout(shape: tuple[int, ...]) -> str:
    others = {2: "", 3: " (or 'TNC', 'NCT')", 4: " (or 'NHWC')", 5: " (or 'NTHWC')"}.get(len(shape), "")
    return f"layouts={{'<layer>': {likely_layout(shape)!r}}}{others}"


# Token indices: the same contiguous slice of each image's sequence, which gives a view, or any indices (N, S) into the
# tokens of all images.
_Indices = slice | Tensor


@dataclass(frozen=True)
class TracedLayout:
    """How to read outputs of one shape; determined once, applied in every forward pass.

    Attributes:
        shape: shape of the outputs.
        batch: number of images, N.
        axes: the output's axes, reordered to images and locations, then channels.
        channel_axes: the channel axes of size greater than 1.
        channels: number of channels, C.
        locations: indices of the tokens, in row-major image order.
        prefix: indices of the class, distillation and register tokens before them.
        grid: as in `Representation`.
        stands_for: codes (S,) of the locations within an image.
        note: what a user should know about the reading, or "".
        input: as in `Representation`.
    """

    shape: tuple[int, ...]
    batch: int
    axes: tuple[int, ...]
    channel_axes: tuple[int, ...]
    channels: int
    locations: _Indices
    prefix: _Indices
    grid: Grid | None
    stands_for: Tensor
    note: str = ""
    input: str = ""

    def apply(self, output: Tensor, dtype: torch.dtype, copy: bool = True) -> Representation:
        """Reads an output as a copy or, if possible, as a view; copies nothing twice."""
        if isinstance(self.locations, slice) and isinstance(self.prefix, slice):
            # Copy in memory order first; the steps below then only make views.
            output = output.to(dtype, copy=copy)
        ordered = output.permute(self.axes)
        tokens, prefix = (self._select(ordered, indices) for indices in (self.locations, self.prefix))
        return Representation(tokens.to(dtype), prefix.to(dtype), self.grid, self.input)

    def _select(self, ordered: Tensor, indices: _Indices) -> Tensor:
        if isinstance(indices, slice):
            return ordered.reshape(self.batch, -1, self.channels)[:, indices]
        return ordered.reshape(-1, self.channels)[indices.to(ordered.device)]


def not_followed(shape: tuple[int, ...], operation: str) -> RepresentationError:
    """The error for an output whose locations were lost in an operation."""
    return RepresentationError(
        f"its output has shape {shape}, and the locations of its values were lost in the operation {operation!r}; set "
        f"its layout with {_given_layout(shape)}"
    )


def is_attention(layout: TracedLayout) -> bool:
    """Whether an output holds attention weights: locations on its last axis, queries and heads on others."""
    entries = [axis for axis in layout.axes if axis not in layout.channel_axes and layout.shape[axis] > 1]
    return [axis for axis in entries if axis > 0] == [len(layout.shape) - 1]


def read_origin(
    origin: Tensor, batch: int, inputs: Sequence[str] = (), followed: Mapping[str, str] | None = None
) -> TracedLayout:
    """Finds which axes hold images, locations and channels, and the order of the locations.

    Args:
        origin: the origin of a layer's output.
        batch: number of images in the forward pass.
        inputs: descriptions of the other inputs of the model.
        followed: description -> name of those of them that have a trace of their own.

    Raises:
        RepresentationError: the vectors have no locations, share locations, or have different ones in each image.
    """
    shape = tuple(origin.shape)
    if len(shape) < 2:
        raise RepresentationError(f"its output has shape {shape}; a representation needs at least (N, C)")
    channel_axes = _channel_axes(origin)
    for axis in channel_axes:
        origin = first_location(origin, axis)
    image_axis = _image_axis(origin, batch, channel_axes)
    entry_axes = [axis for axis in range(len(shape)) if axis not in channel_axes]
    if image_axis is not None:
        entry_axes.sort(key=lambda axis: axis != image_axis)
    codes = origin.permute(*entry_axes, *channel_axes).reshape(-1).cpu()
    if not bool((codes > NOWHERE).any()):
        return _of_no_location(codes, shape, batch, inputs)
    if len(channel_axes) > 1 and prod(shape[axis] for axis in entry_axes) == batch:
        raise JoinedLocationsError(
            f"its output has shape {shape}, and each value combines all locations of an image, so that its channel "
            f"axis is ambiguous; {as_they_are(shape)}"
        )
    locations, grid, stands_for = _locations(codes, shape, batch)
    if locations.shape[1] == 1 and len(shape) in (4, 5) and len(codes) == batch:
        grid = (1,) * (len(shape) - 2)  # a globally pooled map
    prefix, left_out = _prefix(codes, batch, image_axis is not None)
    note = _note(left_out, batch, inputs, followed or {})
    axes = (*entry_axes, *channel_axes)
    channels = prod(shape[axis] for axis in channel_axes)
    length = len(codes) // batch if len(codes) % batch == 0 else 0
    slices = _as_slice(locations, length), _as_slice(prefix, length)
    indices = slices if all(isinstance(part, slice) for part in slices) else (locations, prefix)
    several = tuple(axis for axis in channel_axes if shape[axis] > 1)
    return TracedLayout(shape, batch, axes, several, channels, *indices, grid, stands_for, note)


def _as_slice(indices: Tensor, length: int) -> _Indices:
    """Turns indices (N, S) into one slice per image of `length` vectors, if they are equal and contiguous."""
    images, count = indices.shape
    start = int(indices[0, 0]) if count else 0
    regular = torch.arange(images)[:, None] * length + start + torch.arange(count)
    return slice(start, start + count) if start + count <= length and torch.equal(indices, regular) else indices


def _channel_axes(origin: Tensor) -> list[int]:
    """The axes along which codes are constant; else one along which locations merge, as in merged patches."""
    narrow = held_once(origin)
    constant = [axis for axis, size in enumerate(origin.shape) if size > 1 and narrow.shape[axis] == 1]
    if constant:
        return constant
    last = origin.ndim - 1
    for axes in ([], [last], [1]):
        codes = held_once(first_location(origin, axes[0]) if axes else origin)
        inside = codes[codes > NOWHERE]
        if len(inside.unique()) == len(inside):
            return axes
    return [last]


def _image_axis(origin: Tensor, batch: int, channel_axes: list[int]) -> int | None:
    """The axis whose index is the image number, or None; the channels of `origin` must be joined."""
    image = torch.where(origin > NOWHERE, decode(origin)[0], -1)
    for axis, size in enumerate(origin.shape):
        index = torch.arange(size, device=origin.device).view(*(-1 if a == axis else 1 for a in range(origin.ndim)))
        is_candidate = size == batch and axis not in channel_axes
        if is_candidate and bool(((image < 0) | (image == index)).all()) and bool((image >= 0).any()):
            return axis
    return None


def _of_no_location(codes: Tensor, shape: tuple[int, ...], batch: int, inputs: Sequence[str]) -> TracedLayout:
    """The layout of class tokens and of values computed from them: one vector per image."""
    axes = [axis for axis in range(len(shape)) if shape[axis] > 1 and axis > 0]
    if shape[0] == batch and len(axes) <= 1:
        order = (*(axis for axis in range(len(shape)) if axis not in axes), *axes)
        count, none = prod(shape[axis] for axis in axes), torch.empty(0)
        return TracedLayout(shape, batch, order, tuple(axes), count, slice(0, 1), slice(0, 0), None, none)
    numbers = {input_of_code(code) for code in codes.unique().tolist()}
    if others := [name for number, name in enumerate(inputs) if number in numbers]:
        raise of_other_input(shape, ", ".join(others), likely_layout(shape))
    raise RepresentationError(
        f"its output has shape {shape}, and its vectors have no image location (queries?); {as_they_are(shape)}"
    )


def _locations(codes: Tensor, shape: tuple[int, ...], batch: int) -> tuple[Tensor, Grid | None, Tensor]:
    """The indices of each image's locations in row-major order, their grid, and their codes."""
    order = codes.argsort(stable=True)[int((codes <= NOWHERE).sum()) :]
    located = codes[order]
    image = decode(located)[0]
    if len(located) % batch or not torch.equal(image, torch.arange(batch).repeat_interleave(len(located) // batch)):
        raise RepresentationError(
            f"its output has shape {shape}, with a different number of locations in each image "
            f"(images of different sizes?)"
        )
    where = ((located - 1) % EXTENT**3).view(batch, -1)
    if bool((where.diff(dim=1) == 0).any()):
        raise RepresentationError(
            f"its output has shape {shape}, in which several vectors share a location (several scales or branches side "
            f"by side?); probe them before they are joined, or {as_they_are(shape)}"
        )
    if not bool((where == where[0]).all()):
        raise RepresentationError(
            f"its {where.shape[1]} tokens stand for different locations in each image (images of different sizes, or "
            f"tokens shuffled, dropped at random or selected by content), so they share no grid; give images of one "
            f"size, turn that off in the model, or {as_they_are(shape)}"
        )
    sizes = tuple(len(coordinates.unique()) for coordinates in decode(where[0] + 1)[1:])
    grid = None if where.shape[1] == 1 or prod(sizes) != where.shape[1] else sizes if sizes[0] > 1 else sizes[1:]
    return order.view(batch, -1), grid, where[0]


def _prefix(codes: Tensor, batch: int, by_image: bool) -> tuple[Tensor, Tensor]:
    """The indices of class and register tokens, and the codes of all other vectors without a location."""
    if not by_image:
        return torch.zeros(batch, 0, dtype=torch.long), codes[codes <= NOWHERE]
    rows = codes.view(batch, -1)
    before = torch.arange(rows.shape[1]) < (rows[0] > NOWHERE).int().argmax()
    prefix = before & (rows[0] == NOWHERE)  # queries and values of other inputs have other codes
    indices = torch.arange(batch)[:, None] * rows.shape[1] + prefix.nonzero().flatten()
    return indices, rows[:, ~prefix & (rows[0] <= NOWHERE)].flatten()


def _note(left_out: Tensor, batch: int, inputs: Sequence[str], followed: Mapping[str, str]) -> str:
    """Describes the left-out vectors and the reason, from their codes."""
    counts: Counter[str] = Counter()
    for code, count in zip(*(part.tolist() for part in left_out.unique(return_counts=True)), strict=True):
        number = input_of_code(code)
        named = "" if number is None or number >= len(inputs) else inputs[number]
        traced = f"whose vectors inputs={followed[named]!r} selects" if named in followed else "which is not traced"
        counts[f"belong to {named}, {traced}," if named else "have no location"] += count
    return "; ".join(f"{count // batch} vectors per image {why} and are left out" for why, count in counts.items())
