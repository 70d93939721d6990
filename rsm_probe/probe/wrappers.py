"""What is put around a model: compilation and data parallelism, evaluation mode, an early end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from rsm_probe.errors import LayerError

_COMPILED = "_orig_mod"


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, `DataParallel` and `DistributedDataParallel`.

    Raises:
        LayerError: the model is scripted or traced, or runs on several devices at once: no hook sees such passes.
    """
    while True:
        if isinstance(model, nn.DataParallel):
            if len(model.device_ids) > 1:
                raise LayerError(
                    f"DataParallel splits every batch over {len(model.device_ids)} devices; probe and call the model "
                    f"that it was made from (`model.module`)"
                )
            model = model.module
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, _COMPILED, None), nn.Module):
            model = getattr(model, _COMPILED)
        else:
            break
    for name, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            where = f"its layer {name!r} is" if name else f"{type(part).__name__} is"
            raise LayerError(f"{where} scripted or traced and runs no hooks; probe the model it was made from")
    return model


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Dotted name -> module in the order of registration, aliases included; compiled parts have their plain names."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        parts = name.split(".")
        # The wrapper first, then the module inside, whose hooks see its calls.
        found[".".join(part for part in parts if part != _COMPILED)] = module
    return found


def run_eagerly(model: nn.Module) -> AbstractContextManager[object]:
    """Inside, compiled models and parts run as Python, where hooks are seen; what was compiled stays for later."""
    compiled = any(hasattr(part, _COMPILED) or part._compiled_call_impl is not None for part in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every training flag as it was outside."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, flag in flags:
            part.training = flag


class LastLayerSeenError(Exception):
    """Ends a forward pass of which nothing more is wanted."""


@contextmanager
def ending_early(module: nn.Module) -> Iterator[None]:
    """Inside, a forward pass that raises `LastLayerSeenError` returns None."""
    own = module.__dict__.get("forward")
    forward = module.forward

    def until_last_layer(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except LastLayerSeenError:
            return None

    module.forward = until_last_layer
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
