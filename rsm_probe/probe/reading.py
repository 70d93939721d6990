"""How a layer's output is read as concept vectors, from the origins of its values."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from rsm_probe.errors import RepresentationError
from rsm_probe.probe.origins import EXTENT, NOWHERE, decode, first_location, held_once
from rsm_probe.probe.tokens import Grid, Representation

_AS_THEY_ARE = "layouts={'<layer>': 'NTC'} (or 'NCHW', 'NHWC', ...) takes the vectors as they are"


class JoinedLocationsError(RepresentationError):
    """Every value of an output joins all locations of an image."""


@dataclass(frozen=True)
class Reading:
    """How outputs of one shape are read; found once, applied in every forward pass.

    Attributes:
        shape: of the outputs.
        axes: the output's axes in the order images and locations, then channels.
        channels: C.
        locations: (N, S), where in the flattened images and locations each token stands, row by row of the image.
        prefix: (N, P), the same for what stands before them in each image's sequence.
        grid: as in `Representation`.
        note: what a user should know of how the output was read, or "".
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    channels: int
    locations: Tensor
    prefix: Tensor
    grid: Grid | None
    note: str = ""

    def apply(self, output: Tensor) -> Representation:
        """Reads an output: a view of it where its order in memory allows."""
        ordered = output.permute(self.axes)
        return Representation(self._picked(ordered, self.locations), self._picked(ordered, self.prefix), self.grid)

    def _picked(self, ordered: Tensor, places: Tensor) -> Tensor:
        images, count = places.shape
        total = prod(self.shape) // self.channels
        length = total // images
        start = int(places[0, 0]) if count else 0
        # Tokens one after the other, at the same places of each image: no copy is needed.
        if total % images == 0 and start + count <= length:
            regular = torch.arange(images)[:, None] * length + start + torch.arange(count)
            if torch.equal(places, regular):
                return ordered.reshape(images, length, self.channels)[:, start : start + count]
        return ordered.reshape(-1, self.channels)[places.to(ordered.device)]


def read_origin(origin: Tensor, batch: int) -> Reading:
    """Finds which axes hold images, locations and channels, and the order of the locations.

    Args:
        origin: of a layer's output.
        batch: number of images in the forward pass.

    Raises:
        RepresentationError: the vectors stand for no location or for several at once, or every image has others.
    """
    shape = tuple(origin.shape)
    if len(shape) < 2:
        raise RepresentationError(f"its output has shape {shape}; a representation needs at least (N, C)")
    channel_axes = _channel_axes(origin)
    for axis in channel_axes:
        origin = first_location(origin, axis)
    image_axis = _image_axis(origin, batch)
    entry_axes = [axis for axis in range(len(shape)) if axis not in channel_axes]
    if image_axis is not None:
        entry_axes.sort(key=lambda axis: axis != image_axis)
    codes = origin.permute(*entry_axes, *channel_axes).reshape(-1).cpu()
    if not bool((codes > NOWHERE).any()):
        return _of_no_location(shape, entry_axes, channel_axes, batch)
    if len(channel_axes) > 1 and prod(shape[axis] for axis in entry_axes) == batch:
        raise JoinedLocationsError(
            f"its output has shape {shape}, and each value joins all locations of an image, so that nothing says which "
            f"axis holds the channels; {_AS_THEY_ARE}"
        )
    locations, grid = _locations(codes, shape, batch)
    empty = codes <= NOWHERE
    prefix, left_out = _prefix(empty, batch, image_axis is not None)
    note = f"{left_out} vectors an image stand for no location and are left out" if left_out else ""
    axes = (*entry_axes, *channel_axes)
    return Reading(shape, axes, prod(shape[axis] for axis in channel_axes), locations, prefix, grid, note)


def _channel_axes(origin: Tensor) -> list[int]:
    """The axes along which all values belong to one location; else one along which some do, as where patches merge."""
    narrow = held_once(origin)
    constant = [axis for axis, size in enumerate(origin.shape) if size > 1 and narrow.shape[axis] == 1]
    if constant:
        return constant
    for axes in ([], [origin.ndim - 1], [1]):
        joined = origin
        for axis in axes:
            joined = first_location(joined, axis)
        narrow = held_once(joined).flatten()
        inside = narrow[narrow > NOWHERE]
        if len(inside.unique()) == len(inside):
            return [*axes]
    return [origin.ndim - 1]


def _image_axis(origin: Tensor, batch: int) -> int | None:
    """The axis whose index is the number of the image, where there is one."""
    image = torch.where(origin > NOWHERE, decode(origin)[0], -1)
    for axis, size in enumerate(origin.shape):
        index = torch.arange(size, device=origin.device).view(*(-1 if a == axis else 1 for a in range(origin.ndim)))
        if size == batch and bool(((image < 0) | (image == index)).all()) and bool((image >= 0).any()):
            return axis
    return None


def _of_no_location(shape: tuple[int, ...], entries: list[int], channels: list[int], batch: int) -> Reading:
    """Class tokens and what is made of them: one vector an image."""
    axes = [axis for axis in range(len(shape)) if shape[axis] > 1 and axis > 0]
    if shape[0] == batch and len(axes) <= 1:
        order = (*(axis for axis in range(len(shape)) if axis not in axes), *axes)
        places = torch.arange(batch)[:, None]
        return Reading(shape, order, prod(shape[axis] for axis in axes), places, places[:, :0], None)
    raise RepresentationError(
        f"its output has shape {shape}, and its vectors stand for no location of the images (queries?); {_AS_THEY_ARE}"
    )


def _locations(codes: Tensor, shape: tuple[int, ...], batch: int) -> tuple[Tensor, Grid | None]:
    """Where each image's locations stand, in the order of the image, and their grid."""
    order = codes.argsort(stable=True)[int((codes <= NOWHERE).sum()) :]
    found = codes[order]
    image = decode(found)[0]
    if len(found) % batch or not torch.equal(image, torch.arange(batch).repeat_interleave(len(found) // batch)):
        raise RepresentationError(
            f"its output has shape {shape}, which holds another number of locations of each image"
        )
    where = ((found - 1) % EXTENT**3).view(batch, -1)
    if bool((where.diff(dim=1) == 0).any()):
        raise RepresentationError(
            f"its output has shape {shape}, in which several vectors stand for the same location (several scales or "
            f"branches side by side?); probe them where they are apart, or {_AS_THEY_ARE}"
        )
    if not bool((where == where[0]).all()):
        raise RepresentationError(
            f"its {where.shape[1]} tokens stand for other locations in every image (shuffled or dropped at random), so "
            f"that no grid holds them; turn that off in the model, or {_AS_THEY_ARE}"
        )
    sizes = tuple(len(places.unique()) for places in decode(where[0] + 1)[1:])
    grid = None if where.shape[1] == 1 or prod(sizes) != where.shape[1] else sizes if sizes[0] > 1 else sizes[1:]
    return order.view(batch, -1), grid


def _prefix(empty: Tensor, batch: int, by_image: bool) -> tuple[Tensor, int]:
    """What stands before the first location in each image's sequence, and how many other vectors have no location."""
    none = torch.zeros(batch, 0, dtype=torch.long)
    if not by_image:
        return none, int(empty.sum()) // batch
    rows = empty.view(batch, -1)
    before = int((~rows[0]).int().argmax())
    places = torch.arange(batch)[:, None] * rows.shape[1] + torch.arange(before)
    return places, int(rows[0].sum()) - before
