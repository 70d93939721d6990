"""Warnings about what a user may not expect of a probe, each given once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import cached_property

from torch import nn

from rsm_probe.probe.readers import INDEPENDENT, declared_prefix
from rsm_probe.probe.training_mode import changed_by_training

# A message names no more layers or modules than this.
_MOST_NAMES = 5


class Notices:
    """The warnings of one probe.

    Args:
        model: the model that is probed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._given: set[str] = set()

    @cached_property
    def _changed_by_training(self) -> list[tuple[str, nn.Module]]:
        return changed_by_training(self._model.named_modules())

    def training_mode(self) -> None:
        """A pass begins: says which modules are in training mode, of those that it changes."""
        if "training mode" in self._given:
            return
        training = [name or type(module).__name__ for name, module in self._changed_by_training if module.training]
        if training:
            self._say(
                "training mode",
                f"{len(training)} modules are in training mode, in which they compute something else "
                f"({_some(training)}): captured values depend on chance or on the rest of the batch, and running "
                f"statistics change; call model.eval() first",
            )

    def outside(self, layer: str, part: str) -> None:
        """A layer ran outside of a forward pass of the model.

        Args:
            layer: its name.
            part: what else to probe, as the end of the message.
        """
        self._say(
            "outside",
            f"layers ran outside of the forward of {type(self._model).__name__} (first {layer!r}): such calls are not "
            f"captured, and what was held before is dropped; call the model itself{part}",
        )

    def layers(self, skipped: Mapping[str, str], notes: Mapping[str, str], prefixes: Mapping[str, int]) -> None:
        """A pass that was followed is over.

        Args:
            skipped: layers of a pattern that could not be captured, with the reason.
            notes: layers of whose output a part was left out.
            prefixes: number of prefix tokens of layers that give token sequences.
        """
        # Text towers are expected to be skipped.
        skipped = {layer: reason for layer, reason in skipped.items() if not reason.startswith(INDEPENDENT)}
        declared = declared_prefix(self._model)
        other = [layer for layer, count in prefixes.items() if declared is not None and count != declared]
        messages = [
            f"{len(layers)} {what} ({_some(layers)})"
            for what, layers in (
                ("layers that a pattern matched could not be captured; `Probe.skipped` says why", skipped),
                (
                    "layers hold vectors that are left out, or that were picked by index; `Probe.notes` says more",
                    notes,
                ),
                (f"layers hold another number of prefix tokens than the {declared} that the model declares", other),
            )
            if layers
        ]
        if messages:
            self._say("layers", *messages)

    def _say(self, what: str, *messages: str) -> None:
        if what not in self._given:
            self._given.add(what)
            for message in messages:
                warnings.warn(message, stacklevel=2)


def _some(names: Iterable[str]) -> str:
    """The first names, for a message."""
    listed = list(names)
    return ", ".join(listed[:_MOST_NAMES]) + (", ..." if len(listed) > _MOST_NAMES else "")
