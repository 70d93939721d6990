"""What probes captured, model by model and layer by layer, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsm_probe.errors import LayerError
from rsm_probe.probe.hooks import Probe

# Representations, or what a probe's `reduce` made of them.
Layers = Probe | Mapping[str, Any]
Probed = Layers | Mapping[str, Layers]


def walk(probed: Probed) -> list[tuple[str, str, Any]]:
    """(model, layer, representation) of everything that was captured; or what a probe's `reduce` made of each.

    Args:
        probed: a probe or what it holds, whose model is then called "model"; or model name -> these.

    Raises:
        LayerError: nothing was captured.
    """
    if isinstance(probed, Probe) or not all(isinstance(part, Probe | Mapping) for part in probed.values()):
        parts: Mapping[str, Any] = {"model": probed}
    else:
        parts = probed
    found = []
    for model, part in parts.items():
        representations = part.representations if isinstance(part, Probe) else part
        if not representations:
            raise LayerError(
                f"model {model!r} captured nothing; call the model inside the 'with' block before updating"
            )
        found += [(model, layer, kept) for layer, kept in representations.items()]
    if not found:
        raise LayerError("there is nothing to take up: no model was given")
    return found
