"""The inputs of a forward pass: how many images, which tensor holds them, and which kind of pass they start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsm_probe.errors import RepresentationError

# Whole numbers of more values than this are told apart by their shape only, unless they are grids.
_MOST_VALUES = 4096
# Lists and mappings nested deeper than this contain themselves, or are not the output of a layer.
_DEEPEST = 50


class NestingError(RepresentationError):
    """Values cannot be found in lists and mappings that never end."""


@dataclass(frozen=True)
class Inputs:
    """The arguments that a model is called with, as far as a probe needs to know them.

    Attributes:
        batch: number of images; 0 where nothing says it.
        images: what holds them: maps, patches, or a list of maps.
        grids: of patches, their rows and columns (N, L, 2), or the height and width of each image's grid (N, 2).
        problem: why no output of the pass can be read, or "".
    """

    batch: int
    images: Tensor | list[Tensor] | None = None
    grids: Tensor | None = None
    problem: str = ""


@dataclass(frozen=True)
class OtherInput:
    """A tensor among a model's inputs, beside the images.

    Attributes:
        name: where it is: `args[1]` of positional, `'depth'` of named arguments, `args[0]['depth']` inside of one.
        tensor: what it is.
        is_image: whether it looks like images, maps, masks or videos, and not like texts, vectors or numbers.
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
    found: list[OtherInput] = []
    named = [(f"args[{place}]", value) for place, value in enumerate(args)]
    for argument, value in (*named, *((repr(name), value) for name, value in kwargs.items())):
        for name, tensor, in_list in _named_tensors(argument, value):
            if id(tensor) not in followed:
                looks = tensor.ndim >= 4 or (tensor.ndim == 3 and (tensor.shape[1:] == sides or in_list))
                found.append(OtherInput(name, tensor, looks))
    return found


def _named_tensors(name: str, value: Any, in_list: bool = False) -> Iterator[tuple[str, Tensor, bool]]:
    """Tensors, the names of their places, and whether they are items of a list."""
    if isinstance(value, Tensor):
        if not value.is_nested:  # which has no shape
            yield name, value, in_list
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named_tensors(f"{name}[{key!r}]", item)
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _named_tensors(f"{name}[{place}]", item, True)


def find_images(values: tuple[Any, ...]) -> Inputs:
    """Finds the images among the arguments of a model.

    Images are the tensor of four or more axes that has three channels, else the first of four or more axes; else a list
    of images, as detectors take them; else patches (N, L, C) that come with whole numbers (N, 2) or (N, L, 2), their
    grids; else the number is the first axis of any tensor.
    """
    tensors = [leaf for leaf in leaves(values) if isinstance(leaf, Tensor) and not leaf.is_nested and leaf.ndim]
    maps = [tensor for tensor in tensors if tensor.ndim >= 4]
    coloured = [tensor for tensor in maps if 3 in tensor.shape[1:]]
    if maps:
        images = (coloured or maps)[0]
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
                return Inputs(len(grids), problem=_packed(patches, grids))
    return Inputs(int(tensors[0].shape[0]) if tensors else 0)


def _packed(patches: Tensor, grids: Tensor) -> str:
    return (
        f"the patches of {len(grids)} images or videos are packed into one sequence {tuple(patches.shape)}, in an "
        f"order that only the model knows; such models are not supported"
    )


def signature(args: tuple[Any, ...], kwargs: Mapping[str, Any], grids: Tensor | None) -> tuple[Any, ...]:
    """What decides how a forward pass goes: shapes, names, and the values of whole numbers, flags and texts."""
    found: list[Any] = []

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                found.append(key)
                add(item)
        elif isinstance(value, list | tuple):
            found.append(len(value))
            for item in value:
                add(item)
        elif isinstance(value, Tensor):
            if value.is_nested:
                return
            found.append((tuple(value.shape), value.dtype))
            whole = not value.is_floating_point() and not value.is_complex() and not value.is_quantized
            plain = value.layout == torch.strided and not value.is_meta
            if whole and plain and (value.numel() <= _MOST_VALUES or value is grids):
                found.append(value.cpu().numpy().tobytes())
        elif isinstance(value, bool | int | float | str | None):
            found.append(value)

    add((args, kwargs))
    return tuple(found)


def leaves(value: Any, holders: tuple[int, ...] = ()) -> list[Any]:
    """The values inside lists, tuples and mappings, in order.

    Raises:
        NestingError: a list or mapping that holds itself, or one nested beyond reason.
    """
    if not isinstance(value, Mapping | list | tuple):
        return [value]
    if id(value) in holders or len(holders) == _DEEPEST:
        raise NestingError(f"a {type(value).__name__} holds itself, or is nested deeper than {_DEEPEST} levels")
    items = value.values() if isinstance(value, Mapping) else value
    return [leaf for item in items for leaf in leaves(item, (*holders, id(value)))]
