"""Finds the attention layers of a model, of which facets can be named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from rsm_probe.probe.facets.attention_calls import holder_of
from rsm_probe.probe.facets.channel_trace import ChannelTrace
from rsm_probe.probe.tracing.trace import Trace


@contextmanager
def attention_layers(modules: Mapping[str, nn.Module], images: Tensor) -> Iterator[list[str]]:
    """Lists the layers that attend in a pass over images inside, in order; the list is complete at exit."""
    trace, layers = Trace(len(images)), list[str]()
    trace.start(images)
    # Only names are read, so a copy of each projection holds nothing.
    channels = ChannelTrace(lambda tensor: trace.of(tensor) is not None, lambda tensor: tensor.new_empty(0))

    def enter(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        channels.enter(name)

    def leave(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        channels.leave(name, output)

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(partial(enter, name)).remove)
            hooks.callback(module.register_forward_hook(partial(leave, name)).remove)
        for mode in (trace, channels):
            mode.begin()
            hooks.callback(mode.end)
        yield layers
    layers += dict.fromkeys(holder_of(attention, channels.sources) for attention in channels.attentions)
