"""Lists the layers of a model that a probe can capture."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rsm_probe.errors import LayerError, RsmProbeError
from rsm_probe.probe.facets.attention_layers import attention_layers
from rsm_probe.probe.layers import block_names
from rsm_probe.probe.probe import Probe
from rsm_probe.probe.representation import Grid, Layout, Representation


@dataclass(frozen=True)
class LayerInfo:
    """One call of one layer.

    Attributes:
        name: the name that a probe takes.
        kind: class of the module.
        shape: shape of its output without the batch axis; None if the output is not a tensor.
        locations: number of locations, S.
        channels: number of channels, C.
        grid: (H, W) or None.
        prefix: number of class and register tokens.
        is_block: whether "blocks" selects it.
        has_facets: whether it is an attention layer, of which `name[query]`, `name[key]` and `name[value]` can be
            probed.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    locations: int
    channels: int
    grid: Grid | None
    prefix: int
    is_block: bool
    has_facets: bool = False


class _Sizes(NamedTuple):
    """Locations, channels, grid and number of prefix tokens of a representation."""

    locations: int
    channels: int
    grid: Grid | None
    prefix: int

    @classmethod
    def of(cls, representation: Representation) -> _Sizes:
        _, locations, channels = representation.tokens.shape
        return cls(locations, channels, representation.grid, representation.prefix.shape[1])


def describe_layers(
    model: nn.Module,
    example: Tensor,
    method: str = "forward",
    *,
    layouts: Mapping[str, Layout] | None = None,
    inputs: str | int | Sequence[str | int] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> tuple[list[LayerInfo], dict[str, str]]:
    """Runs a model once and lists its layers in forward order.

    Args:
        model: the model.
        example: input for one forward pass, (N, C, H, W).
        method: the method whose call is the pass, as in `Probe`.
        layouts: how to read outputs, as in `Probe`.
        inputs: the inputs that hold images, as in `Probe`.
        forward: makes the call from the model and the example; None to pass the example alone.

    Returns:
        The layers; and name -> reason of those that cannot be captured.

    Raises:
        ModelError: `model` is not a module.
        LayerError: the model has no layers, runs no hooks, or fails on the example.
    """
    # Of the tokens, only their sizes are read: those of all layers of a large model would fill the memory.
    probe = Probe(
        model,
        "all",
        method=method,
        layouts=layouts,
        inputs=inputs,
        reduce=lambda name, representation: _Sizes.of(representation),
    )
    try:
        blocks = set(block_names(model))
    except LayerError:
        blocks = set()
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            shapes[name] = tuple(output.shape[1:])

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_hook(partial(record, name)).remove)
        attending = hooks.enter_context(attention_layers(dict(model.named_modules()), example))
        with torch.no_grad(), warnings.catch_warnings(), probe:
            # The result itself lists what could not be captured.
            warnings.simplefilter("ignore", UserWarning)
            try:
                if forward is not None:
                    forward(model, example)
                else:
                    (model if method == "forward" else getattr(model, method))(example)
            except RsmProbeError:
                raise
            except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
                raise LayerError(
                    f"{type(model).__name__} does not run on an image of shape {tuple(example.shape[1:])}: {error}; if "
                    f"it takes more than images, use a part of it, such as its image tower (part=, --part), or make "
                    f"the call by a function of model and images (forward=, --forward file.py:function); if it takes "
                    f"clips, name the number of frames (--clips 16)"
                ) from error
            if not probe.passes:
                raise LayerError(f"forward= did not call {type(model).__name__} itself, nor its method {method!r}")
    infos = [
        LayerInfo(
            label,
            type(model.get_submodule(name := label.split("#")[0])).__name__,
            shapes.get(name),
            sizes.locations,
            sizes.channels,
            sizes.grid,
            sizes.prefix,
            name in blocks,
            name in attending,
        )
        for label, sizes in probe.representations.items()
    ]
    return infos, probe.skipped
