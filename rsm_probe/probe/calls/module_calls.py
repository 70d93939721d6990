"""Records which modules in and around the probed layers are called, to suggest alternatives to silent layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from rsm_probe.errors import RepresentationError
from rsm_probe.probe.torch_internals import unobserved
from rsm_probe.probe.tracing.inputs import find_images
from rsm_probe.probe.wrappers import has_no_forward

# The most parts of a layer to list in a message.
_MOST_PARTS = 4


class ModuleCalls:
    """Watches the probed layers, the modules that contain them, and their parts.

    Args:
        modules: dotted name -> module.
        probed: names of the probed layers.
    """

    def __init__(self, modules: Mapping[str, nn.Module], probed: Iterable[str]) -> None:
        self._modules = modules
        self._watched = {
            name: None for layer in probed for name in (*_holders(layer), layer, *self._parts(layer)) if name
        }
        self._now: set[str] = set()
        self._ever: set[str] = set()
        self._shown: set[str] = set()

    def begin(self) -> None:
        """Forgets the current calls, because a forward pass begins or has ended."""
        self._now = set()

    def watch(self, hooks: ExitStack, is_followed: Callable[[nn.Module, nn.Module], bool]) -> None:
        """Sets the hooks.

        Args:
            hooks: removes the hooks when it closes.
            is_followed: whether a call counts, given the called module and the hooked one.
        """
        for name in self._watched:
            module = self._modules[name]
            hook = self._noticing(name, module, is_followed)
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _noticing(
        self, name: str, own: nn.Module, is_followed: Callable[[nn.Module, nn.Module], bool]
    ) -> Callable[..., None]:
        # Keyword arguments may be missing if another thread runs the model while the hook is added or removed.
        def notice(module: nn.Module, args: tuple[Any, ...], *kwargs: dict[str, Any]) -> None:
            if is_followed(module, own):
                self._now.add(name)
                if name not in self._ever:
                    self._ever.add(name)
                    if _holds_images((*args, *kwargs[0].values())):
                        self._shown.add(name)

        return notice

    def outside(self, layer: str) -> str:
        """Suggests how to capture a layer that ran outside the model's forward pass, as the end of a message."""
        part = next((name for name in (*_holders(layer), layer) if name in self._now), "")
        if part not in self._shown:
            return ""
        return f", or probe the part that was called: {_probe_of(part, layer)}"

    def instead(self, layer: str) -> str:
        """Suggests what to probe instead of a layer that never ran in a forward pass, as the end of a message."""
        parts = [part for part in self._parts(layer) if part in self._now][:_MOST_PARTS]
        if parts:
            return f"; the model calls its parts directly: probe {', '.join(map(repr, parts))}"
        holders = _holders(layer)
        if self._ever.intersection((layer, *self._parts(layer))):
            tower = next((name for name in (*holders, layer) if name in self._shown - self._now), None)
            if tower is not None:
                return (
                    f"; it ran before, when {tower!r} was called on images (as generate() does): probe that part, "
                    f"{_probe_of(tower, layer)}"
                )
        holder = next((name for name in reversed(holders) if name in self._now), None)
        if holder is not None:
            return f"; its weights may be used without calling it: probe {holder!r} instead"
        return "; the model does not use it for such inputs: leave it out"

    def _parts(self, layer: str) -> list[str]:
        """The outermost callable modules within a layer."""
        parts: list[str] = []
        silent = has_no_forward(self._modules[layer])
        for name, child in self._modules[layer].named_children():
            full = f"{layer}.{name}" if layer else name
            if full not in self._modules:  # a compiled part, which is listed under its plain name
                continue
            if has_no_forward(child):
                parts += self._parts(full)
            # A hook on this class disables its fused path and changes the last digits of its output.
            elif silent or not isinstance(child, nn.TransformerEncoderLayer):
                parts.append(full)
        return parts


def _holders(layer: str) -> list[str]:
    """The names of the modules that contain a layer, outermost first, without the model itself."""
    parts = layer.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _probe_of(part: str, layer: str) -> str:
    """The code that probes a layer within a part of the model."""
    return f"Probe(model.get_submodule({part!r}), {layer[len(part) + 1 :]!r})"


def _holds_images(values: tuple[Any, ...]) -> bool:
    with unobserved():  # keep this inspection out of the trace of the model
        try:
            return find_images(values).images is not None
        except RepresentationError:
            return False
