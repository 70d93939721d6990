"""The dtype that a model demands of its images: that of its first layer, where the model does not cast by itself."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from rsm_probe.sources.models.reading import Reading

# Layers that refuse inputs whose dtype differs from that of their weights.
_STRICT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _FirstLayer(BaseException):
    """Ends a forward pass at the first layer that shows what it demands; no model catches it by accident."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__(dtype)
        self.dtype = dtype


def in_dtype_of(module: nn.Module, reading: Reading, batch: Tensor) -> Tensor:
    """Cast a batch of images to the dtype that a model in half or double precision demands.

    Models whose first layer takes the batch as it is, because it has that dtype or because the model casts its inputs,
    get it unchanged.

    Args:
        module: the model, on the device of the batch.
        reading: how the model is called.
        batch: the images, (N, C, H, W) or with more axes.

    Returns:
        The batch, or a copy in another dtype.
    """
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    if not batch.is_floating_point() or dtypes <= {batch.dtype}:
        return batch
    dtype = _demanded(module, reading, batch[:1])
    return batch if dtype is None else batch.to(dtype)


def _demanded(module: nn.Module, reading: Reading, images: Tensor) -> torch.dtype | None:
    """Run a model up to its first convolution or linear layer."""

    def look(layer: Any, inputs: tuple[Any, ...]) -> None:
        given, own = inputs[0] if inputs else None, layer.weight.dtype
        if isinstance(given, Tensor) and given.is_floating_point() and own.is_floating_point:
            differs = given.dtype == images.dtype != own and not torch.is_autocast_enabled(given.device.type)
            raise _FirstLayer(own if differs else None)

    with ExitStack() as stack:
        for layer in module.modules():
            if isinstance(layer, _STRICT):
                stack.callback(layer.register_forward_pre_hook(look).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        try:
            reading.call(module, images.clone())
        except _FirstLayer as first:
            return first.dtype
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return None  # the pass proper says what is wrong
    return None
