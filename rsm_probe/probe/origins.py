"""Origins: which location of which image each value of a tensor belongs to, written as one number.

A code holds (image, frame, row, column). Frames, rows and columns are fractions of their axis, so that maps of any
resolution share one code. Axes along which codes are the same, such as channels, are held once in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

# Frames, rows and columns are counted in 4096ths of their axis. Codes below 2^53 are exact in float64, which, unlike
# integers, passes through every operation that moves data. They start at 1, so that what is filled with
# zeros is nowhere.
EXTENT = 4096
NOWHERE = 0.0


@dataclass(frozen=True)
class Lost:
    """The origin of what depends on the images in a way that was not followed; and the operation where it was lost."""

    operation: str


Origin = Tensor | Lost | None


def channel_axis(shape: Sequence[int]) -> int | None:
    """The axis of an input of the model that holds colours or features, as far as its shape tells.

    Of maps (N, C, H, W) or (N, H, W, C) and videos (N, C, T, H, W) or (N, T, C, H, W), the one of size 3, 1 or 4,
    unless without it the map would have a likelier form; of other maps, the one that differs from two equal ones.
    """
    candidates = {4: (1, 3), 5: (1, 2)}.get(len(shape), ())
    for colours in (3, 1, 4):
        fitting = [axis for axis in candidates if shape[axis] == colours]
        if len(shape) == 4:
            fitting = [axis for axis in fitting if _may_be_colours(axis, shape)][:1]
        if fitting:
            return fitting[0] if len(fitting) == 1 else None
    if len(shape) == 4 and (shape[1] == shape[2]) != (shape[2] == shape[3]):
        return 3 if shape[1] == shape[2] else 1
    return None


def _may_be_colours(axis: int, shape: Sequence[int]) -> bool:
    """Whether an axis of a map of four axes that has the size of colours is no side of a small map of features."""
    _, first, second, third = shape
    first_form, last_form = _elongation(second, third), _elongation(first, second)
    if axis == 3:
        return last_form <= first_form
    if first == 4:  # images with four channels are rarer than maps of features that are four wide
        return first_form <= last_form
    return not first == second < third


def _elongation(height: int, width: int) -> float:
    return max(height, width) / max(1, min(height, width))


def codes_of_grid(batch: int, spatial: Sequence[int], device: torch.device) -> Tensor:
    """Codes (N, *spatial) of whole images: two axes are rows and columns, a third before them frames."""
    code = torch.arange(batch, dtype=torch.float64, device=device).view(-1, *(1 for _ in spatial))
    code = code * EXTENT ** (3 - len(spatial))
    for axis, size in enumerate(spatial, start=1):
        place = (torch.arange(size, device=device) * EXTENT // size).double()
        code = code * EXTENT + place.view(*(-1 if a == axis else 1 for a in range(len(spatial) + 1)))
    return code + 1


def codes_of_patches(patches: Tensor, grids: Tensor) -> Tensor:
    """Codes (N, L) of patches (N, L, C), by their rows and columns (N, L, 2) or the sizes of grids (N, 2)."""
    count = patches.shape[1]
    if grids.ndim == 3:
        rows, columns = grids.double().unbind(-1)
        heights, widths = rows.amax(1, keepdim=True) + 1, columns.amax(1, keepdim=True) + 1
        inside = torch.ones_like(rows, dtype=torch.bool)
    else:
        place = torch.arange(count, dtype=torch.float64, device=patches.device).expand(len(patches), -1)
        heights, widths = grids.to(place).unbind(-1)
        heights, widths = heights[:, None], widths[:, None]
        rows, columns = place // widths, place % widths
        inside = place < heights * widths
    image = torch.arange(len(patches), dtype=torch.float64, device=patches.device)[:, None]
    code = image * EXTENT**3 + (rows * EXTENT // heights) * EXTENT + columns * EXTENT // widths + 1
    return torch.where(inside, code, NOWHERE)


def decode(codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image, frame, row and column of codes, each in whole numbers; meaningless where a code is `NOWHERE`."""
    whole = codes.long() - 1
    return whole // EXTENT**3, whole // EXTENT**2 % EXTENT, whole // EXTENT % EXTENT, whole % EXTENT


def is_image_order(codes: Tensor) -> bool:
    """Whether (N, *spatial) codes are those of images, row by row, apart from padding and what was cut off."""
    inside = codes > NOWHERE
    parts = decode(codes)
    places = [parts[0], *parts[4 - (codes.ndim - 1) :]]
    for axis, place in enumerate(places):
        others = [a for a in range(codes.ndim) if a != axis]
        lowest = torch.where(inside, place, EXTENT**4).amin(others)
        highest = torch.where(inside, place, -1).amax(others)
        present = highest >= 0
        if not torch.equal(lowest[present], highest[present]) or (lowest[present].diff() < 0).any():
            return False
        if axis == 0 and not torch.equal(lowest, torch.arange(len(lowest), device=lowest.device)):
            return False
    return True


def frames_of(codes: Tensor) -> Tensor | None:
    """What codes (N, H, W) of later frames exceed those of the first frame by; None of first frames.

    Raises:
        ValueError: several frames lie side by side.
    """
    frames = decode(codes)[1][codes > NOWHERE].unique()
    if len(frames) > 1:
        raise ValueError("several frames side by side")
    return frames.double() * EXTENT**2 if len(frames) and int(frames) else None


def mixes_one_axis(codes: Tensor, axis: int) -> bool:
    """Whether what is summed over an axis of a matrix or map are locations, each once, while channels lie elsewhere.

    Channels lie elsewhere where every vector along the axis occurs several times; patches that become vectors differ.
    """
    vectors = held_once(codes).movedim(axis, -1)
    if vectors.shape[-1] == 1:
        return False
    repeated = codes.numel() // vectors.numel() > 1
    vectors = vectors.flatten(0, -2)
    counts = vectors.unique(dim=0, return_counts=True)[1]
    if not repeated and int(counts.min()) < 2:
        return False
    ordered = vectors.sort(dim=1).values
    return bool((ordered.diff(dim=1) > 0).all())


def nowhere(shape: Sequence[int], device: torch.device) -> Tensor:
    """The origin of what stands for no location."""
    return torch.full((), NOWHERE, dtype=torch.float64, device=device).expand(tuple(shape))


def held_once(origin: Tensor) -> Tensor:
    """One slice of every axis along which memory repeats."""
    for axis, (size, stride) in enumerate(zip(origin.shape, origin.stride(), strict=True)):
        if size > 1 and stride == 0:
            origin = origin.narrow(axis, 0, 1)
    return origin


def compact(origin: Tensor) -> Tensor:
    """The same codes, with axes along which they are constant held once."""
    shape, origin = origin.shape, held_once(origin)
    for axis, size in enumerate(origin.shape):
        first = origin.narrow(axis, 0, min(1, size))
        # Two slices settle most axes; all are compared only where these agree.
        if size > 1 and torch.equal(first, origin.narrow(axis, 1, 1)) and bool((origin == first).all()):
            origin = first
    return origin.expand(shape)


def spread(origin: Origin, shape: Sequence[int]) -> Any:
    """An origin broadcast to a shape."""
    return origin.expand(tuple(shape)) if isinstance(origin, Tensor) else origin


def first_location(origin: Tensor, axis: int) -> Tensor:
    """The first location along an axis, which stays with size 1."""
    narrow = held_once(origin)
    if narrow.shape[axis] > 1:
        joined = torch.where(narrow <= NOWHERE, torch.inf, narrow).amin(axis, keepdim=True)
        narrow = torch.where(joined.isinf(), NOWHERE, joined)
    shape = list(origin.shape)
    shape[axis] = 1
    return narrow.expand(shape)


def moved(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], known: dict[int, Origin], output: Tensor
) -> Sequence[Origin]:
    """What an operation that moves data makes of the origins."""

    def origin_of(leaf: Any) -> Any:
        # Whole numbers say where to; except where images are made of them, they are moved by no operation here.
        if not isinstance(leaf, Tensor) or (leaf is not args[0] and not leaf.is_floating_point()):
            return leaf
        origin = known[id(leaf)]
        if isinstance(origin, Lost):
            raise ValueError("a part of what is moved was lost")
        return nowhere(leaf.shape, leaf.device) if origin is None else origin

    args, kwargs = tree_map(origin_of, (args, kwargs))
    if name == "constant_pad_nd" or name.startswith(("reflection_pad", "replication_pad")):
        # Mirrored borders are no other locations.
        func, name = torch.ops.aten.constant_pad_nd.default, "constant_pad_nd"
        args, kwargs = (*args[:2], NOWHERE), {}
    if (narrow := _without_channels(name, args, output.shape)) is not None:
        return [compact(func(*narrow, **kwargs)).expand(output.shape)]
    if func._schema.name.endswith("_"):  # the origin that is written to serves others
        args = (args[0].clone(), *args[1:])
    try:
        found = func(*args, **kwargs)
    except RuntimeError:  # a view that does not exist of repeated memory
        found = func(*(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args), **kwargs)
    return [compact(origin) for origin in (found if isinstance(found, list | tuple) else [found])]


def _without_channels(name: str, args: tuple[Any, ...], shape: Sequence[int]) -> tuple[Any, ...] | None:
    """The operands with one channel in place of all, where their codes do not differ and they stay the last axis.

    What would be copied for every channel is copied once.
    """
    origins = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.dtype == torch.float64]
    last = origins[0].ndim - 1
    if not all(o.ndim == last + 1 and o.shape[-1] == shape[-1] > 1 and o.stride(-1) == 0 for o in origins):
        return None
    rest = args[1:]
    if name in ("view", "_unsafe_view"):
        rest = ((*shape[:-1], 1),)
    elif name == "roll":
        if len(rest) < 2 or any(axis % (last + 1) == last for axis in rest[1]):
            return None
    elif name == "cat":
        if len(rest) and rest[0] % (last + 1) == last:
            return None
    elif name == "constant_pad_nd":
        if any(rest[0][:2]):
            return None
    elif name != "index" or len(rest[0]) > last:
        return None
    return (
        tree_map(lambda leaf: leaf[..., :1].contiguous() if any(leaf is o for o in origins) else leaf, (args[0],))
        + rest
    )


def without_border(codes: Tensor, spatial: Sequence[int]) -> Tensor:
    """Codes (B, ...) without what was put around a map (mirrored, repeated) so that a convolution lays out its size."""
    for axis, size in enumerate(spatial, start=1):
        surplus = codes.shape[axis] - size * max(1, codes.shape[axis] // size)
        codes = codes.narrow(axis, surplus // 2, codes.shape[axis] - surplus)
    return codes


def finest(origins: Sequence[Tensor]) -> Tensor:
    """The operand that tells the most locations apart: the one that the others act upon."""
    best = max(origins, key=lambda origin: prod(held_once(origin).shape))
    codes = held_once(best)
    for other in map(held_once, origins):
        if any(size > 1 and own == 1 for size, own in zip(other.shape, codes.shape, strict=True)):
            raise ValueError("operands whose locations lie along different axes")
        if other.shape == codes.shape and not _agree(other, codes):
            raise ValueError("operands of different locations")
    return best


def _agree(one: Tensor, other: Tensor) -> bool:
    """Whether two operands name the same locations; a coarse one, which names fewer, acts upon the other."""
    if one is other or one.data_ptr() == other.data_ptr() or torch.equal(one, other):
        return True
    both = (one > NOWHERE) & (other > NOWHERE)
    here, there = one[both], other[both]
    return torch.equal(here, there) or len(here.unique()) != len(there.unique())


def same_codes(one: Origin, other: Origin) -> bool:
    """Whether two origins say the same."""
    if one is other:
        return True
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    narrow = held_once(one), held_once(other)
    return narrow[0].shape == narrow[1].shape and torch.equal(*narrow)
