"""Hooks that show when an attention layer with facets to capture begins, and when its submodules run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from rsm_probe.probe.facets.attention_calls import AttentionCall
from rsm_probe.probe.forward_pass import ForwardPass


class AttentionWatch:
    """Watches one layer and its submodules.

    Args:
        name: the name of the layer.
        module: the layer.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self._name = name
        self._module = module

    def open(
        self,
        hooks: ExitStack,
        is_followed: Callable[[nn.Module, nn.Module], bool],
        running: Callable[[], ForwardPass | None],
    ) -> None:
        """Sets the hooks.

        Args:
            hooks: removes the hooks when it closes.
            is_followed: whether a call counts, given the called module and the hooked one.
            running: the current pass.
        """
        layer = self._name

        def call() -> AttentionCall | None:
            forward = running()
            return None if forward is None else forward.in_attention(layer)

        def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
            if is_followed(module, self._module) and (forward := running()) is not None:
                forward.begin_attention(layer)

        def watch(name: str, own: nn.Module) -> None:
            def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
                if is_followed(module, own) and (attention := call()) is not None:
                    attention.log.enter(name)

            def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if is_followed(module, own) and (attention := call()) is not None:
                    attention.log.leave(name, output)

            hooks.callback(own.register_forward_pre_hook(enter).remove)
            hooks.callback(own.register_forward_hook(leave).remove)

        hooks.callback(self._module.register_forward_pre_hook(begin).remove)
        for name, part in self._module.named_modules():
            if name:
                watch(name, part)
