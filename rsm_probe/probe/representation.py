"""Reads a layer output as concept vectors `(N, S, C)` with prefix tokens and grid, from shapes and earlier grids.

No rule depends on the name of a model. The layout of a map follows from the grids that convolutions and poolings
produced earlier in the same forward pass. The tokens of a sequence beyond such a grid are class and register tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from rsm_probe.errors import RepresentationError
from rsm_probe.probe.facets.facet_names import did_you_mean_a_facet
from rsm_probe.probe.torch_internals import BATCH_NORMS, CONVOLUTIONS, POOLINGS
from rsm_probe.probe.tracing.inputs import leaves

Grid = tuple[int, ...]
Layout = Literal["NCHW", "NHWC", "NCTHW", "NTHWC", "NTC", "TNC", "NCT", "NC"]

# More extra tokens than this mean a wrong grid rather than class, distillation or register tokens.
_MAX_PREFIX = 8
# Modules with channels on the second axis.
_CHANNELS_FIRST = (CONVOLUTIONS, BATCH_NORMS, nn.GroupNorm, *POOLINGS)
# Modules with channels on the last axis; subclasses may differ.
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm)


@dataclass(frozen=True)
class Representation:
    """The output of one layer for a batch of images.

    Attributes:
        tokens: concept vectors, shape (N images, S locations, C channels).
        prefix: class, distillation and register tokens, shape (N, P, C); P may be 0.
        grid: (H, W) with H * W = S, or (T, H, W) with T * H * W = S for videos; (1, 1) for a globally pooled map; None
            if the locations form no grid: vectors (N, C), sequences of one token, scattered tokens.
        input: the input of the model whose locations these are, such as "args[0]" or "pixel_values"; several, separated
            by commas, if the layer mixes them at equal locations; "" if one input holds images.
    """

    tokens: Tensor
    prefix: Tensor
    grid: Grid | None
    input: str = ""

    def __repr__(self) -> str:
        kind = f"{str(self.tokens.dtype).removeprefix('torch.')} on {self.tokens.device}"
        shapes = f"tokens {tuple(self.tokens.shape)}, prefix {tuple(self.prefix.shape)}"
        return f"Representation({shapes}, grid {self.grid}, {kind})"


def pick_tensor(output: Any, key: str | None, batch: int) -> Tensor:
    """Picks the tensor of a layer's output that holds its representation.

    `key` selects a part of a tuple, list, dict or dataclass: an index, a key or a field, with dots for nesting. Without
    a key, the first floating-point tensor with at least three axes whose first axis is the batch is taken, else the
    first floating-point tensor.

    Raises:
        RepresentationError: there is no such part, or no floating-point tensor.
    """
    if key is not None:
        for part in key.split("."):
            output = _part(output, part)
    tensors = [leaf for leaf in leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not tensors:
        raise RepresentationError(_no_tensor(output))
    return next((t for t in tensors if not t.is_nested and t.ndim >= 3 and t.shape[0] == batch), tensors[0])


def has_part(output: Any, key: str | None) -> bool:
    """Whether an output has the part that a key begins with."""
    return key is not None and key.partition(".")[0] in _parts(output)


def _part(output: Any, part: str) -> Any:
    parts = _parts(output)
    if part not in parts:
        near = did_you_mean_a_facet(part)
        listed = ", ".join(map(str, parts)) or "none"
        raise RepresentationError(f"its output has no part {part!r}; parts are: {listed}{near}")
    return parts[part]


def _parts(output: Any) -> Mapping[str, Any]:
    if isinstance(output, tuple | list):
        return {str(index): value for index, value in enumerate(output)}
    if isinstance(output, Mapping):
        return output
    return {name: getattr(output, name) for name in _fields(output)}


def _fields(output: Any) -> list[str]:
    return [name for name in getattr(output, "__dict__", {}) if not name.startswith("_")]


def _no_tensor(output: Any) -> str:
    """Explains why an output cannot be read, and what to do."""
    if isinstance(output, Tensor):
        return f"its output has dtype {output.dtype}, which is not floating point; probe a layer before or after it"
    if isinstance(output, Iterable) and not isinstance(output, str | bytes | Mapping | list | tuple):
        return f"its output is a {type(output).__name__}, which cannot be searched; return a tensor, list or mapping"
    problem = f"its output ({type(output).__name__}) contains no floating-point tensor"
    fields = [] if isinstance(output, Mapping | list | tuple) else _fields(output)
    parts = [name for name in fields if any(isinstance(leaf, Tensor) for leaf in leaves(getattr(output, name)))]
    if parts:
        return f"{problem}; choose a part with '<layer>[{parts[0]}]' (parts are: {', '.join(parts)})"
    return f"{problem}; probe a layer before or after it"


def infer_layout(output: Tensor, batch: int, grids: Sequence[Grid], module: nn.Module) -> Layout:
    """Infers the layout of an output from its shape.

    Args:
        output: the layer's output.
        batch: number of images in this forward pass.
        grids: (H, W) of every earlier convolution and pooling, in order.
        module: the layer; its class decides when shapes are ambiguous.

    Raises:
        RepresentationError: the layout stays ambiguous.
    """
    shape = tuple(output.shape)
    if output.ndim < 2:
        raise RepresentationError(f"its output has shape {shape}; a representation needs at least (N, C)")
    if output.ndim == 3 and shape[1] == batch and _is_sequence_first(shape[0], batch, module):
        return "TNC"
    if shape[0] != batch:
        raise RepresentationError(
            f"its output has shape {shape}, but the batch has {batch} images: they were split into windows, regions or "
            f"queries; probe the enclosing block instead, or, if the sequence axis comes first, set "
            f"layouts={{'<layer>': 'TNC'}}"
        )
    if output.ndim == 2:
        return "NC"
    if output.ndim == 3:
        return "NCT" if shape[2] == 1 or isinstance(module, _CHANNELS_FIRST) else "NTC"
    if output.ndim == 4:
        return _infer_map_layout(shape, set(_with_halvings(grids)), module)
    raise RepresentationError(f"its output has shape {shape}; maps of more than two spatial axes are not supported")


def _is_sequence_first(first: int, batch: int, module: nn.Module) -> bool:
    """Whether an output (first, batch, C) is sequence-first, rather than windows whose length equals the batch.

    The number of windows is a multiple of the batch. If the sequence length is a multiple too, only attention declared
    as sequence-first decides.
    """
    attention = (part for part in module.modules() if isinstance(part, nn.MultiheadAttention))
    return any(not part.batch_first for part in attention) or first % batch != 0 or batch == 1 != first


def _infer_map_layout(shape: tuple[int, ...], grids: set[Grid], module: nn.Module) -> Layout:
    _, second, third, fourth = shape
    first, last = (third, fourth) in grids or (third, fourth) == (1, 1), (second, third) in grids
    if first != last:
        return "NCHW" if first else "NHWC"
    if first and type(module) in _CHANNELS_LAST:
        return "NHWC"
    convolutional = any(isinstance(m, _CHANNELS_FIRST) for m in module.modules())
    if first or convolutional:  # both layouts match a grid, or neither does: the layer's modules decide
        leaf = next(module.children(), None) is None
        return "NCHW" if convolutional or leaf else "NHWC"
    raise RepresentationError(
        f"its output has shape {shape}, and neither the last two axes nor the middle two are a grid that a convolution "
        f"produced earlier; set layouts={{'<layer>': 'NCHW'}} or 'NHWC'"
    )


def _with_halvings(grids: Sequence[Grid]) -> list[Grid]:
    """Adds the halved sizes that patch merging or strided slicing makes of the grids."""
    sizes = list(dict.fromkeys(grids))
    for grid in sizes[:]:
        while max(grid) > 1:
            grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
            sizes.append(grid)
    return sizes


def to_representation(output: Tensor, layout: Layout, grids: Sequence[Grid], *, given: bool = False) -> Representation:
    """Reads an output as a representation whose tokens are a view of it.

    Args:
        output: a layer's output.
        layout: the meaning of its axes.
        grids: (H, W) of the maps seen before.
        given: whether the user gave the layout; a sequence then gets neither grid nor prefix.

    Raises:
        RepresentationError: the layout does not fit the shape, or a token sequence fits no grid.
    """
    if layout not in get_args(Layout):
        raise RepresentationError(f"unknown layout {layout!r}; layouts are: {', '.join(get_args(Layout))}")
    if output.ndim != len(layout):
        raise RepresentationError(f"its output has shape {tuple(output.shape)}, which does not fit layout {layout!r}")
    if layout in ("NCHW", "NCTHW"):
        return _without_prefix(output.flatten(2).transpose(1, 2), tuple(output.shape[2:]))
    if layout in ("NHWC", "NTHWC"):
        return _without_prefix(output.flatten(1, -2), tuple(output.shape[1:-1]))
    if layout == "NC":
        return _without_prefix(output.unsqueeze(1), None)
    tokens = {"NTC": output, "TNC": output.transpose(0, 1), "NCT": output.transpose(1, 2)}[layout]
    if given or tokens.shape[1] == 1:
        return _without_prefix(tokens, None)
    grid = _grid_of_sequence(tokens.shape[1], grids, layout)
    prefix = tokens.shape[1] - grid[0] * grid[1]
    return Representation(tokens[:, prefix:], tokens[:, :prefix], grid)


def _without_prefix(tokens: Tensor, grid: Grid | None) -> Representation:
    return Representation(tokens, tokens[:, :0], grid)


def _grid_of_sequence(length: int, grids: Sequence[Grid], layout: Layout) -> Grid:
    """The grid of a token sequence: among those seen, the one that leaves the fewest prefix tokens."""
    fitting = [g for g in _with_halvings(grids[::-1]) if 0 <= length - g[0] * g[1] <= _MAX_PREFIX and max(g) > 1]
    if not fitting:
        seen = ", ".join(f"{h}x{w}" for h, w in dict.fromkeys(grids)) or "none"
        raise RepresentationError(
            f"its output has {length} tokens, which match no grid seen in this forward pass (seen: {seen}) plus at "
            f"most {_MAX_PREFIX} prefix tokens; layouts={{'<layer>': {layout!r}}} reads them as they are"
            + ("" if layout == "NCT" else " (or 'NCT', if its channels are on the second axis)")
        )
    return min(fitting, key=lambda g: length - g[0] * g[1])


def require_finite(model: str, layer: str, bad: int | None, ids: Sequence[str] | None) -> None:
    """Rejects a representation that contains NaN or infinity.

    Args:
        model: name of the model.
        layer: name of the layer.
        bad: index of the first non-finite image, or None; see `first_nonfinite`.
        ids: names of the images.

    Raises:
        RepresentationError: `bad` is not None. The message names layer, model and image.
    """
    if bad is not None:
        image = f"image {ids[bad]!r}" if ids else f"image {bad} of this batch"
        raise RepresentationError(
            f"layer {layer!r} of model {model!r} holds NaN or infinity, first in {image}; check the weights, "
            f"the input, and whether half precision overflows"
        )
