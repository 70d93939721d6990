"""Hash the values of a state dict, by which stored results identify their models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rsm_probe.errors import ModelError
from rsm_probe.sources.images.pixels import tensor_bytes


def require_weights(module: nn.Module, name: str) -> None:
    """Refuse modules whose parameters or buffers have no values yet.

    Raises:
        ModelError: the module is lazy and was never called, or is on the meta device; the message says what to do.
    """
    for key, value in chain(module.named_parameters(), module.named_buffers()):
        if is_lazy(value):
            raise ModelError(
                f"{name}: {key} belongs to a lazy module, whose shapes are unknown before its first call; call the "
                f"model on images first, then load its weights"
            )
        if value.is_meta:
            raise ModelError(
                f"{name}: {key} is on the meta device and has no values; build the module on a real device, or call "
                f"module.to_empty(device='cpu') and load its weights"
            )


def add_value(digest: Any, name: str, value: Any) -> None:
    """Add a named value of a state dict to a hash: a tensor, or the other values that quantised modules store.

    Raises:
        RuntimeError: the values of a tensor cannot be read; PyTorch may raise other errors, too.
    """
    if isinstance(value, Tensor):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(tensor_bytes(value))
    elif isinstance(value, Mapping | list | tuple):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            add_value(digest, f"{name}.{key}", part)
    else:
        digest.update(f"{name}{without_addresses(repr(value))}".encode())


def without_addresses(text: str) -> str:
    """Remove memory addresses, which differ between runs, from the text of an object."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
