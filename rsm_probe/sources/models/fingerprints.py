"""What a stored result knows a model by: every value of its state."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rsm_probe.errors import ModelError


def require_weights(module: nn.Module, name: str) -> None:
    """Refuses modules whose parameters or buffers have no values yet.

    Raises:
        ModelError: of lazy modules before their first call, or on the meta device; the message says what to do.
    """
    for key, value in chain(module.named_parameters(), module.named_buffers()):
        if is_lazy(value):
            raise ModelError(
                f"{name}: {key} belongs to a lazy module, whose shapes are not known before its first call; call "
                f"the model on images first, and load its weights then"
            )
        if value.is_meta:
            raise ModelError(
                f"{name}: {key} is on the meta device and holds no values; build the module on a real device, or call "
                f"module.to_empty(device='cpu') and load its weights"
            )


def add_value(digest: Any, name: str, value: Any) -> None:
    """Adds a named value of a state dict to a hash: tensors, and what quantised modules keep beside them.

    Raises:
        RuntimeError: a tensor whose values cannot be read, or another error of PyTorch.
    """
    if isinstance(value, Tensor):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(tensor_bytes(value))
    elif isinstance(value, Mapping):
        for key, part in value.items():
            add_value(digest, f"{name}.{key}", part)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            add_value(digest, f"{name}.{number}", part)
    else:
        digest.update(f"{name}{without_addresses(repr(value))}".encode())


def tensor_bytes(tensor: Tensor) -> bytes:
    """The values of a tensor of any layout, as bytes."""
    plain = tensor.detach()
    if plain.is_quantized:
        plain = plain.dequantize()
    elif plain.layout != torch.strided:
        plain = plain.to_dense()
    return plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def without_addresses(text: str) -> str:
    """Text in which objects are written without their place in memory, which differs from run to run."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
