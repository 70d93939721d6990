"""Inspects the inputs of a forward pass: the number of images, the tensor that holds them, and the kind of pass."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rsm_probe.errors import RepresentationError
from rsm_probe.probe.tracing.location_codes import channel_axis

# Larger integer tensors are compared by shape only, unless they are grids.
_MOST_VALUES = 4096
# A second input with more channels holds features, and one with a shorter side points or boxes.
_MOST_COLOURS, _SHORTEST_SIDE = 4, 4
# Lists and mappings nested more deeply contain themselves, or are not the output of a layer.
_DEEPEST = 50


class NestingError(RepresentationError):
    """Lists or mappings contain themselves, or are nested too deeply."""


@dataclass(frozen=True)
class Inputs:
    """The images among a model's arguments.

    Attributes:
        batch: number of images; 0 if unknown.
        images: maps, patches, or a list of maps.
        grids: for patches, their rows and columns (N, L, 2), or the height and width of each image's grid (N, 2); for
            packed patches, with the number of frames (N, 3).
        problem: why no output of the pass can be read, or "".
        name: the argument that holds them, as `OtherInput` names it, or "" if unknown.
    """

    batch: int
    images: Tensor | list[Tensor] | None = None
    grids: Tensor | None = None
    problem: str = ""
    name: str = ""


@dataclass(frozen=True)
class OtherInput:
    """A tensor among a model's inputs other than the images.

    Attributes:
        name: `args[1]` for a positional argument, `'depth'` for a named one, `args[0]['depth']` for one inside another.
        tensor: the tensor.
        is_image: whether it looks like images, maps, masks or videos, rather than texts, vectors or numbers.
    """

    name: str
    tensor: Tensor
    is_image: bool

    def __str__(self) -> str:
        return f"the input {self.name} of shape {tuple(self.tensor.shape)}"


def other_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: Inputs) -> list[OtherInput]:
    """The tensors among a model's arguments that are not its images."""
    if inputs.images is None:
        return []
    images = inputs.images if isinstance(inputs.images, list) else [inputs.images]
    followed = {id(tensor) for tensor in (*images, inputs.grids)}
    sides = tuple(images[0].shape[-2:])
    others: list[OtherInput] = []
    for name, leaf, in_list in _named_arguments(args, kwargs):
        if isinstance(leaf, Tensor) and not leaf.is_nested and id(leaf) not in followed:  # a nested one has no shape
            looks = leaf.ndim >= 4 or (leaf.ndim == 3 and (leaf.shape[1:] == sides or in_list))
            others.append(OtherInput(name, leaf, looks))
    return others


def _named_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    named = [*((f"args[{index}]", value) for index, value in enumerate(args)), *((repr(k), kwargs[k]) for k in kwargs)]
    return (leaf for name, value in named for leaf in _named_leaves(name, value))


def _named_leaves(
    name: str, value: Any, in_list: bool = False, holders: tuple[int, ...] = ()
) -> Iterator[tuple[str, Any, bool]]:
    """As `leaves`, each with its name and whether it is an item of a list. Empty lists are leaves themselves."""
    holds = isinstance(value, Mapping | list | tuple)
    # Not `if not value`: a TensorDict has no truth value, and its length is a batch size.
    items = list(value.items() if isinstance(value, Mapping) else enumerate(value)) if holds else []
    if not items:
        yield name, value, in_list
        return
    if id(value) in holders or len(holders) == _DEEPEST:
        raise NestingError(f"a {type(value).__name__} contains itself, or is nested more than {_DEEPEST} levels deep")
    for key, item in items:
        yield from _named_leaves(f"{name}[{key!r}]", item, isinstance(value, list | tuple), (*holders, id(value)))


def leaves(value: Any) -> list[Any]:
    """The values inside lists, tuples and mappings, in order; an empty one is itself a value.

    Raises:
        NestingError: a list or mapping contains itself, or is nested too deeply.
    """
    return [leaf for _, leaf, _ in _named_leaves("", value)]


def find_images(values: tuple[Any, ...]) -> Inputs:
    """Finds the images among the arguments of a model.

    In order of preference, these are: a tensor of four or more axes with three channels; any tensor of four or more
    axes; a list of images, as detectors take them; patches (N, L, C) with integer grids (N, 2) or (N, L, 2). Otherwise
    only the number of images is known, from the first axis of the first tensor.
    """
    tensors = [leaf for leaf in leaves(values) if isinstance(leaf, Tensor) and not leaf.is_nested and leaf.ndim]
    maps = [tensor for tensor in tensors if tensor.ndim >= 4]
    if maps:
        images = max(maps, key=lambda tensor: 3 in tensor.shape[1:])  # the first of those with three channels, if any
        return Inputs(int(images.shape[0]), images)
    for value in values:
        of_a_list = [leaf for leaf in leaves(value) if isinstance(leaf, Tensor) and leaf.ndim == 3]
        if isinstance(value, list | tuple) and of_a_list and all(len(image) in (1, 3) for image in of_a_list):
            return Inputs(len(of_a_list), of_a_list)
    whole = [t for t in tensors if not t.is_floating_point() and not t.is_complex() and t.dtype != torch.bool]
    for patches in (tensor for tensor in tensors if tensor.is_floating_point()):
        for grids in whole:
            if patches.ndim == 3 and tuple(grids.shape) in ((len(patches), 2), (*patches.shape[:2], 2)):
                return Inputs(len(patches), patches, grids)
            of_images = patches.ndim == grids.ndim == 2 and grids.shape[1] in (2, 3)
            if of_images and int(grids.prod(dim=1).sum()) == len(patches):
                problem = (
                    f"the patches of {len(grids)} images or videos are packed into one sequence "
                    f"{tuple(patches.shape)}, in an order that only the model knows; for images of one size, "
                    f"layouts={{'<layer>': 'NTC'}} reads the vectors of each image in that order"
                )
                return Inputs(len(grids), grids=grids, problem=problem)
    return Inputs(int(tensors[0].shape[0]) if tensors else 0)


def shown(name: str) -> str:
    """An argument's name as users write it: `pixel_values` for `'pixel_values'`."""
    return name[1:-1] if re.fullmatch(r"'\w+'", name) else name


def image_inputs(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], named: Sequence[str], parameters: Sequence[str]
) -> list[Inputs]:
    """All inputs that hold images: those that the user named, else each that looks like images.

    Args:
        args: positional arguments of the model.
        kwargs: its keyword arguments.
        named: names or positions of arguments that the user gave; if empty, the first is what `find_images` finds.
        parameters: names of the model's positional parameters.

    Raises:
        RepresentationError: a name matches no argument, or the argument does not contain images.
    """
    values = {**{f"args[{k}]": value for k, value in enumerate(args)}, **{repr(k): kwargs[k] for k in kwargs}}
    first = find_images((*args, *kwargs.values()))
    if named:
        inputs = [_named_input(name, values, parameters) for name in named]
        return [given for given in inputs if given is not None] or [Inputs(first.batch)]
    if first.images is None:
        return [first]
    images = first.images
    followed = {id(image) for image in (images if isinstance(images, list) else [images])}
    named_leaves = list(_named_arguments(args, kwargs))
    holder = next((name for name, leaf, _ in named_leaves if id(leaf) in followed), "")
    first = replace(first, name=holder.rpartition("[")[0] if isinstance(images, list) else holder)
    sides = tuple(images[0].shape[-2:]) if isinstance(images, list) else tuple(images.shape[-2:])
    others = [
        Inputs(len(leaf), leaf, name=name)
        for name, leaf, in_list in named_leaves
        if isinstance(leaf, Tensor) and id(leaf) not in followed and _looks_like_images(leaf, sides)
        if leaf.ndim > 3 or not in_list
    ]
    lists = []
    for name, value in values.items():
        if name != first.name and isinstance(value, list | tuple):
            within = find_images((value,))
            if isinstance(within.images, list):
                lists.append(replace(within, name=name))
    return [first, *others, *lists]


def _looks_like_images(tensor: Tensor, sides: tuple[int, ...]) -> bool:
    """Whether a second input is one of images: its values are colours, depths or flows on a grid."""
    if tensor.is_nested or not (tensor.is_floating_point() or tensor.dtype == torch.uint8):
        return False
    if tensor.ndim == 3:
        return tuple(tensor.shape[1:]) == sides and min(sides) >= _SHORTEST_SIDE
    axis = channel_axis(tensor.shape) if tensor.ndim in (4, 5) else None
    if axis is None:
        return False
    grid = [size for k, size in enumerate(tensor.shape) if k not in (0, axis)][-2:]
    return tensor.shape[axis] <= _MOST_COLOURS and min(grid) >= _SHORTEST_SIDE


def _named_input(name: str, values: Mapping[str, Any], parameters: Sequence[str]) -> Inputs | None:
    """The input with a name or position that the user gave; None if this pass has none (later steps of `generate`)."""
    wanted = {name, repr(name), f"args[{name}]"}
    if name in parameters:
        wanted.add(f"args[{parameters.index(name)}]")
    tree = {leaf_name: leaf for key, value in values.items() for leaf_name, leaf, _ in _named_leaves(key, value)}
    key = next((key for key in (*values, *tree) if key in wanted), None)
    if key is None and name in parameters:
        return None
    if key is None:
        there = ", ".join(shown(key) for key, leaf in tree.items() if isinstance(leaf, Tensor))
        raise RepresentationError(f"inputs: the pass has no argument {name!r}; arguments with tensors are: {there}")
    value = values.get(key, tree.get(key))
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.ndim == 3 or (value.ndim in (4, 5) and channel_axis(value.shape) is not None):
            return Inputs(len(value), value, name=key)
        raise RepresentationError(
            f"inputs: the argument {name!r} of shape {tuple(value.shape)} shows no images; images are (N, C, H, W), "
            f"(N, H, W, C), (N, H, W) or (N, C, T, H, W); leave it out, and give layouts= for its layers"
        )
    within = find_images((value,))
    if within.images is None:
        raise RepresentationError(f"inputs: the argument {name!r} does not contain images; leave it out")
    return replace(within, name=key)


@dataclass(frozen=True)
class Signature:
    """The kind of a pass: what its arguments say about how a model computes.

    Attributes:
        shapes: names, types and shapes of the arguments, and the values of flags and grids.
        wholes: values of the other integer tensors, by name.
        scalars: values of numbers and texts, by name.
    """

    shapes: tuple[Any, ...]
    wholes: tuple[tuple[str, bytes], ...]
    scalars: tuple[tuple[str, int | float | str], ...]


def signature(args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: Inputs) -> Signature:
    """Identifies the kind of a forward pass.

    Args:
        args: positional arguments of the model.
        kwargs: its keyword arguments.
        inputs: its images, whose values do not count.
    """
    images = inputs.images if isinstance(inputs.images, list) else [inputs.images]
    shapes: list[Any] = []
    wholes: list[tuple[str, bytes]] = []
    scalars: list[tuple[str, int | float | str]] = []
    for name, leaf, in_list in _named_arguments(args, kwargs):
        if isinstance(leaf, Tensor):
            shapes.append((name, in_list, *(("nested",) if leaf.is_nested else (tuple(leaf.shape), leaf.dtype))))
            if (values := _values(leaf, leaf is inputs.grids)) and not any(leaf is image for image in images):
                (shapes if leaf is inputs.grids else wholes).append((name, values))
        elif isinstance(leaf, int | float | str) and not isinstance(leaf, bool):
            shapes.append((name, in_list, type(leaf)))
            scalars.append((name, leaf))
        else:
            shapes.append((name, in_list, leaf if isinstance(leaf, bool | None) else type(leaf).__name__))
    return Signature(tuple(shapes), tuple(wholes), tuple(scalars))


def _values(tensor: Tensor, is_grid: bool) -> bytes:
    """The values of a grid or of a small integer tensor; empty for others."""
    if tensor.is_nested or tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized:
        return b""
    plain = tensor.layout == torch.strided and not tensor.is_meta
    return tensor.cpu().numpy().tobytes() if plain and (is_grid or tensor.numel() <= _MOST_VALUES) else b""
