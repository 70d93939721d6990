"""The captured layers of the last pass: a dict that says why it lacks a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsm_probe.errors import LayerError, did_you_mean

NO_PASS = "no forward pass has run inside its 'with' block"


class MissingLayerError(LayerError, KeyError):
    """A layer is not among the captured representations."""

    # A KeyError shows its message in quotes.
    __str__ = Exception.__str__


class Representations(dict[str, Any]):
    """Layer name -> representation.

    Args:
        reason: why it is empty, or "".
        captured: the captured layers.
        skipped: layers that could not be captured, with the reason.
    """

    def __init__(
        self, reason: str, captured: Mapping[str, Any] | None = None, skipped: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(captured or {})
        self._reason = reason
        self._skipped = skipped or {}

    def __missing__(self, layer: object) -> Any:
        """Raises the error for a layer that is not held."""
        if not self:
            raise MissingLayerError(
                f"the probe has not captured layer {layer!r}: {self._reason}; call the model inside the 'with' block "
                f"first"
            )
        if (problem := self._skipped.get(str(layer))) is not None:
            raise MissingLayerError(f"layer {layer!r} could not be captured: {problem}")
        near = did_you_mean(str(layer), self)
        raise MissingLayerError(f"layer {layer!r} is not among the {len(self)} captured layers{near}")
