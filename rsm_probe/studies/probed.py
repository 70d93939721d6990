"""What probes captured, model by model and layer by layer, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rsm_probe.errors import LayerError, RepresentationError
from rsm_probe.probe.hooks import Probe
from rsm_probe.probe.tokens import Representation
from rsm_probe.similarity.affinity import first_nonfinite

Layers = Probe | Mapping[str, Representation]
Probed = Layers | Mapping[str, Layers]


def walk(probed: Probed) -> list[tuple[str, str, Representation]]:
    """(model, layer, representation) of everything that was captured.

    Args:
        probed: a probe or its representations, whose model is then called "model"; or model name -> these.

    Raises:
        LayerError: nothing was captured.
    """
    if isinstance(probed, Probe) or any(isinstance(part, Representation) for part in probed.values()):
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


def require_finite(model: str, layer: str, tokens: Tensor, ids: Sequence[str] | None) -> None:
    """Raises if a representation holds NaN or infinity.

    Raises:
        RepresentationError: names layer, model and image.
    """
    bad = first_nonfinite(tokens)
    if bad is not None:
        image = f"image {ids[bad]!r}" if ids else f"image {bad} of this batch"
        raise RepresentationError(
            f"layer {layer!r} of model {model!r} holds NaN or infinity, first in {image}; check the weights, "
            f"the input, and whether half precision overflows"
        )
