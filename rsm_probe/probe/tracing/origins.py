"""Origins: the location codes of a tensor's values, and how operations change them.

Axes along which codes are constant, such as channels, are stored once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from rsm_probe.probe.torch_internals import name_of, tree_leaves, tree_map
from rsm_probe.probe.tracing.location_codes import NOWHERE, code_of_input


@dataclass(frozen=True)
class Lost:
    """The origin of values that depend on images through an operation that could not be traced."""

    operation: str


@dataclass(frozen=True)
class Elsewhere:
    """The origin of values that depend on untraced inputs of the model, by number, and on no image."""

    inputs: tuple[int, ...]

    @property
    def code(self) -> float:
        """The code of such values in a tensor that also holds values of images."""
        return code_of_input(self.inputs[0])


Origin = Tensor | Lost | Elsewhere | None


def nowhere(shape: Sequence[int], device: torch.device, code: float = NOWHERE) -> Tensor:
    """The origin of values without a location."""
    return torch.full((), code, dtype=torch.float64, device=device).expand(tuple(shape))


def among_images(origin: Origin, tensor: Tensor) -> Tensor | Lost | None:
    """The origin of a tensor that is combined with images; values of untraced inputs get their own code."""
    return nowhere(tensor.shape, tensor.device, origin.code) if isinstance(origin, Elsewhere) else origin


def as_codes(origin: Origin, tensor: Tensor, code: float = NOWHERE) -> Tensor:
    """The codes of a tensor that is combined with images; `code` stands for values that depend on no input.

    Raises:
        ValueError: the origin is lost.
    """
    origin = nowhere(tensor.shape, tensor.device, code) if origin is None else among_images(origin, tensor)
    if not isinstance(origin, Tensor):
        raise ValueError("the origin of an operand is lost")
    return origin


def held_once(origin: Tensor) -> Tensor:
    """One slice of every axis that is expanded (stride 0)."""
    for axis, (size, stride) in enumerate(zip(origin.shape, origin.stride(), strict=True)):
        if size > 1 and stride == 0:
            origin = origin.narrow(axis, 0, 1)
    return origin


def compact(origin: Tensor) -> Tensor:
    """The same codes, with constant axes stored once."""
    shape, origin = origin.shape, held_once(origin)
    for axis, size in enumerate(origin.shape):
        first = origin.narrow(axis, 0, min(1, size))
        # Two slices decide most axes; compare all only if these agree.
        if size > 1 and torch.equal(first, origin.narrow(axis, 1, 1)) and bool((origin == first).all()):
            origin = first
    return origin.expand(shape)


def first_location(origin: Tensor, axis: int) -> Tensor:
    """The first location along an axis, which is kept with size 1."""
    narrow = held_once(origin)
    if narrow.shape[axis] > 1:
        joined = torch.where(narrow <= NOWHERE, torch.inf, narrow).amin(axis, keepdim=True)
        narrow = torch.where(joined.isinf(), narrow.amin(axis, keepdim=True), joined)
    shape = list(origin.shape)
    shape[axis] = 1
    return narrow.expand(shape)


def move_origins(
    func: Any,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: dict[int, Origin],
    output: Tensor,
    learned: float = NOWHERE,
) -> Sequence[Origin]:
    """Applies an operation that moves data to origins; `learned` is the code of values that depend on no input."""

    def origin_of(leaf: Any) -> Any:
        # Integer operands are indices, unless the first operand holds integer images.
        if not isinstance(leaf, Tensor) or (leaf is not args[0] and not leaf.is_floating_point()):
            return leaf
        return as_codes(known[id(leaf)], leaf, learned)

    args, kwargs = tree_map(origin_of, (args, kwargs))
    if name == "constant_pad_nd" or name.startswith(("reflection_pad", "replication_pad")):
        # Mirrored or repeated borders add no locations.
        func, name = torch.ops.aten.constant_pad_nd.default, "constant_pad_nd"
        args, kwargs = (*args[:2], NOWHERE), {}
    if name in ("view", "_unsafe_view") and output.numel():
        return [_reshaped(args[0], output.shape)]
    if (narrow := _without_channels(name, args, output.shape)) is not None:
        return [compact(func(*narrow, **kwargs)).expand(output.shape)]
    if name_of(func).endswith("_"):  # other tensors share the origin that is written to
        args = (args[0].clone(), *args[1:])
    try:
        origins = func(*args, **kwargs)
    except RuntimeError:  # expanded memory does not allow this view
        origins = func(*(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args), **kwargs)
    return [compact(origin) for origin in tree_leaves(origins)]


def _reshaped(origin: Tensor, shape: Sequence[int]) -> Tensor:
    """The codes in another shape, with constant axes stored once: attention scores have billions of values."""
    narrow, sizes, old, new = origin, list(shape), 0, 0
    while old < origin.ndim and new < len(shape):
        # The shortest runs of axes of both shapes that hold equally many values.
        start, first = old, new
        before, after, old, new = origin.shape[old], shape[new], old + 1, new + 1
        while before != after:
            if before < after:
                before, old = before * origin.shape[old], old + 1
            else:
                after, new = after * shape[new], new + 1
        if all(origin.shape[axis] == 1 or origin.stride(axis) == 0 for axis in range(start, old)):
            for axis in range(start, old):
                narrow = narrow.narrow(axis, 0, 1)
            sizes[first:new] = [1] * (new - first)
    return compact(narrow.reshape(sizes)).expand(tuple(shape))


def _without_channels(name: str, args: tuple[Any, ...], shape: Sequence[int]) -> tuple[Any, ...] | None:
    """The operands with one channel instead of all, if codes are constant along it and it stays the last axis.

    This copies codes once rather than for every channel.
    """
    origins = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.dtype == torch.float64]
    ndim, rest = origins[0].ndim, args[1:]
    keeps_channels = (
        (name == "roll" and len(rest) > 1 and all(axis % ndim != ndim - 1 for axis in rest[1]))
        or (name == "cat" and (not rest or rest[0] % ndim != ndim - 1))
        or (name == "constant_pad_nd" and not any(rest[0][:2]))
        or (name == "index" and len(rest[0]) < ndim)
    )
    one_code = all(o.ndim == ndim and o.shape[-1] == shape[-1] > 1 and o.stride(-1) == 0 for o in origins)
    if not (keeps_channels and one_code):
        return None
    narrow = tree_map(lambda leaf: leaf[..., :1].contiguous() if any(leaf is o for o in origins) else leaf, args[0])
    return (narrow, *rest)


def finest(origins: Sequence[Tensor]) -> Tensor | None:
    """The operand that distinguishes the most locations, on which the others act.

    Returns:
        The operand, or None if operands with equally many locations disagree.

    Raises:
        ValueError: the locations of operands lie along different axes.
    """
    best = max(origins, key=lambda origin: prod(held_once(origin).shape))
    codes, agree = held_once(best), True
    for other in map(held_once, origins):
        if any(size > 1 and own == 1 for size, own in zip(other.shape, codes.shape, strict=True)):
            raise ValueError("locations of operands lie along different axes")
        agree = agree and (other.shape != codes.shape or _agree(other, codes))
    return best if agree else None


def _agree(one: Tensor, other: Tensor) -> bool:
    """Whether two operands have the same locations, or one is coarser and thus acts on the other."""
    if one is other or one.data_ptr() == other.data_ptr() or torch.equal(one, other):
        return True
    both = (one > NOWHERE) & (other > NOWHERE)
    here, there = one[both], other[both]
    return torch.equal(here, there) or len(here.unique()) != len(there.unique())


def same_codes(one: Origin, other: Origin) -> bool:
    """Whether two origins are equal."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one is other
    # Origins stay where the image was, so two can lie on different devices, which `torch.equal` refuses to compare.
    return one is other or (one.device == other.device and torch.equal(held_once(one), held_once(other)))


def of_reduction(origin: Tensor, dims: Any, shape: Sequence[int]) -> Origin:
    """The origin after a reduction, which keeps the first location along the reduced axes."""
    axes = range(origin.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    for axis in axes:
        origin = first_location(origin, axis)
    return origin.reshape(tuple(shape))
