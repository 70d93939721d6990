"""What probes captured, model by model and layer by layer, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from rsm_probe.errors import LayerError, RepresentationError
from rsm_probe.probe.hooks import Probe
from rsm_probe.probe.tokens import Representation
from rsm_probe.similarity.affinity import first_nonfinite

Probed = Probe | Mapping[str, Representation] | Mapping[str, Probe] | Mapping[str, Mapping[str, Representation]]


def walk(probed: Probed) -> list[tuple[str, str, Tensor]]:
    """(model, layer, tokens) of everything that was captured; a single probe's model is called "model"."""
    if isinstance(probed, Probe) or (probed and isinstance(next(iter(probed.values())), Representation)):
        probed = {"model": probed}  # type: ignore[dict-item]
    found = []
    for model, part in probed.items():
        representations = part.representations if isinstance(part, Probe) else part
        if not representations:  # type: ignore[truthy-bool]
            raise LayerError(f"model {model!r} captured nothing; call the model inside the 'with' block before updating")
        found += [(model, layer, kept.tokens) for layer, kept in representations.items()]  # type: ignore[union-attr]
    if not found:
        raise LayerError("there is nothing to take up: no model was given")
    return found


def require_finite(model: str, layer: str, tokens: Tensor, ids: Sequence[str] | None) -> None:
    bad = first_nonfinite(tokens)
    if bad is not None:
        image = f"image {ids[bad]!r}" if ids else f"image {bad} of this batch"
        raise RepresentationError(
            f"layer {layer!r} of model {model!r} holds NaN or infinity, first in {image}; check the weights, the input, and "
            f"whether half precision overflows"
        )
