"""Warnings about a probe, each given once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property

from torch import nn

from rsm_probe.probe.calls.training_mode import changed_by_training
from rsm_probe.probe.readers import INDEPENDENT, declared_prefix

# The most layers or modules to list in a message.
_MOST_NAMES = 5


class Notices:
    """The warnings of one probe.

    Args:
        model: the probed model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._given: set[str] = set()

    @cached_property
    def _changed_by_training(self) -> list[tuple[str, nn.Module]]:
        return changed_by_training(self._model.named_modules())

    def training_mode(self) -> None:
        """Warns, when a pass begins, about modules in training mode that compute differently there."""
        if "training mode" in self._given:
            return
        training = [name or type(module).__name__ for name, module in self._changed_by_training if module.training]
        if training:
            self._say(
                "training mode",
                f"{_count(training, 'module')} {_form(training, 'computes', 'compute')} differently because "
                f"{_form(training, 'it is', 'they are')} in training mode ({_some(training)}): "
                f"captured values depend on randomness or on the rest of the batch, and running statistics change; "
                f"call model.eval() first",
            )

    def outside(self, layer: str, method: str, seen: Callable[[], tuple[str | None, str]]) -> None:
        """Warns that a layer ran outside a forward pass of the model.

        Args:
            layer: its name.
            method: the method whose calls are passes.
            seen: the method of the model that runs, or None, and what to probe instead, as the end of the message.
        """
        if "outside" in self._given:
            return
        running, part = seen()
        named = "" if running in (None, method) else f", or name the method that was called: method={running!r}"
        passes = "the forward pass" if method == "forward" else f"calls of the method {method!r}"
        call = "the model itself" if method == "forward" else f"{method!r} itself"
        self._say(
            "outside",
            f"layers ran outside {passes} of {type(self._model).__name__} (the first: {layer!r}): such calls "
            f"are not captured, and earlier representations are dropped; call {call}{named}{part}",
        )

    def layers(self, skipped: Mapping[str, str], notes: Mapping[str, str], prefixes: Mapping[str, int]) -> None:
        """Warns about the layers of a traced pass that has ended.

        Args:
            skipped: layers matched by a pattern that could not be captured, with the reason.
            notes: layers of which some vectors were left out or selected by index.
            prefixes: number of prefix tokens of layers that return token sequences.
        """
        # Text towers are expected to be skipped.
        skipped = {layer: reason for layer, reason in skipped.items() if not reason.startswith(INDEPENDENT)}
        declared = declared_prefix(self._model)
        other = [layer for layer, count in prefixes.items() if declared is not None and count != declared]
        messages = [
            f"{_count(layers, 'layer')} {what} ({_some(layers)})" + (f": {reason}" if reason else "")
            for what, layers, reason in (
                ("matched by a pattern could not be captured", skipped, _first(skipped)),
                (f"{_have(notes)} vectors that were left out or selected by index", notes, _first(notes)),
                (
                    f"{_have(other)} a number of prefix tokens that differs from the {declared} the model declares",
                    other,
                    "",
                ),
            )
            if layers
        ]
        self._say("layers", *messages)

    def _say(self, what: str, *messages: str) -> None:
        if messages and what not in self._given:
            self._given.add(what)
            for message in messages:
                warnings.warn(message, stacklevel=2)


def _count(items: Collection[str], what: str) -> str:
    return f"{len(items)} {what}{'' if len(items) == 1 else 's'}"


def _have(items: Collection[str]) -> str:
    return _form(items, "has", "have")


def _form(items: Collection[str], one: str, several: str) -> str:
    return one if len(items) == 1 else several


def _first(reasons: Mapping[str, str]) -> str:
    """The reason of the first layer, for a message."""
    layer, reason = next(iter(reasons.items()), ("", ""))
    return reason if len(reasons) < 2 else f"for {layer}, {reason}"


def _some(names: Iterable[str]) -> str:
    """The first few names, for a message."""
    listed = list(names)
    return ", ".join(listed[:_MOST_NAMES]) + (", ..." if len(listed) > _MOST_NAMES else "")
