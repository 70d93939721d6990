"""Inspects the inputs of a forward pass: the number of images, the tensor that holds them, and the kind of pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsm_probe.errors import RepresentationError

# Larger integer tensors are compared by shape only, unless they are grids.
_MOST_VALUES = 4096
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
        grids: for patches, their rows and columns (N, L, 2), or the height and width of each image's grid (N, 2).
        problem: why no output of the pass can be read, or "".
    """

    batch: int
    images: Tensor | list[Tensor] | None = None
    grids: Tensor | None = None
    problem: str = ""


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
                    f"{tuple(patches.shape)}, in an order that only the model knows; such models are not supported"
                )
                return Inputs(len(grids), problem=problem)
    return Inputs(int(tensors[0].shape[0]) if tensors else 0)


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
