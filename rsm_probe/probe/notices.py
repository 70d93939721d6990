"""Warnings about what a user may not expect of a probe, each given once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

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
        self._changed_by_training: list[tuple[str, nn.Module]] | None = None
        self._said: set[str] = set()

    def training_mode(self) -> None:
        """A pass begins: says which modules are in training mode, of those that it changes."""
        if "training mode" in self._said:
            return
        if self._changed_by_training is None:
            self._changed_by_training = changed_by_training(self._model.named_modules())
        found = [name or type(module).__name__ for name, module in self._changed_by_training if module.training]
        if found:
            self._say(
                "training mode",
                f"{len(found)} modules are in training mode, in which they compute something else ({_some(found)}): "
                f"captured values depend on chance or on the rest of the batch, and running statistics change; call "
                f"model.eval() first",
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
        other = [layer for layer, found in prefixes.items() if declared is not None and found != declared]
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
        if what not in self._said:
            self._said.add(what)
            for message in messages:
                warnings.warn(message, stacklevel=2)


def _some(names: Iterable[str]) -> str:
    """The first names, for a message."""
    found = list(names)
    return ", ".join(found[:_MOST_NAMES]) + (", ..." if len(found) > _MOST_NAMES else "")
