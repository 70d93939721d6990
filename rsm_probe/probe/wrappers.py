"""Wrappers around a model: compilation, data parallelism, evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from rsm_probe.checks import brief
from rsm_probe.errors import LayerError, ModelError
from rsm_probe.probe.torch_internals import COMPILED_FROM, COMPILED_FUNCTION, EXPORT_GUARDS, is_compiled

# Set by accelerate on modules whose weights it loads for each call.
_OFFLOADED = "_hf_hook"
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, `DataParallel` and `DistributedDataParallel`.

    Raises:
        ModelError: not a module.
        LayerError: hooks cannot see the passes of the model (scripted, traced or exported, or split over several
            devices), or its parameters do not exist yet.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(_not_a_module(model))
    while isinstance(model, _PARALLEL) or isinstance(getattr(model, COMPILED_FROM, None), nn.Module):
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise LayerError(
                f"DataParallel splits every batch over {len(model.device_ids)} devices; probe and call the wrapped "
                f"model (`model.module`)"
            )
        model = model.module if isinstance(model, _PARALLEL) else getattr(model, COMPILED_FROM)
    for name, part in model.named_modules():
        where = f"its layer {name!r} is" if name else f"{type(part).__name__} is"
        if isinstance(part, torch.jit.ScriptModule):
            raise LayerError(f"{where} scripted or traced and runs no hooks; probe the model it was made from")
        # An exported program calls one module, which checks its inputs.
        if isinstance(part, fx.GraphModule) and not any(
            node.op == "call_module" and node.target != EXPORT_GUARDS for node in part.graph.nodes
        ):
            raise LayerError(
                f"{where} a graph of operations without modules (made by torch.export?) and runs no hooks; probe the "
                f"model it was made from"
            )
        if any(is_lazy(tensor) for tensor in _own_tensors(part)):
            where = f"its layer {name!r} ({type(part).__name__})" if name else type(part).__name__
            raise LayerError(f"{where} has no parameters before the model's first call; call the model on images first")
    return model


def require_values(model: nn.Module) -> None:
    """Rejects models whose parameters have no values.

    Raises:
        LayerError: a layer is on the meta device; the message names the first.
    """
    if any(hasattr(part, _OFFLOADED) for part in model.modules()):
        return
    for name, part in model.named_modules():
        if any(tensor.is_meta for tensor in _own_tensors(part)):
            raise LayerError(
                f"layer {name!r} ({type(part).__name__}) is on the meta device and has no values; build the model on "
                f"a real device, or fill it: model.to_empty(device='cpu') and model.load_state_dict(...)"
            )


def has_no_forward(module: nn.Module) -> bool:
    """Whether a module is a mere container that cannot be called."""
    return type(module).forward is nn.Module.forward and "forward" not in vars(module)


def _own_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    return chain(module.parameters(recurse=False), module.buffers(recurse=False))


def _not_a_module(model: object) -> str:
    hint = ""
    if isinstance(getattr(model, "module", None), nn.Module):
        hint = "; give its .module"
    elif isinstance(model, torch.export.ExportedProgram):
        hint = "; exported programs run no hooks: give the model it was made from"
    elif isinstance(model, str):
        hint = f"; give rsm_probe.load_model({model!r}).module"
    elif isinstance(model, type) and issubclass(model, nn.Module):
        hint = f"; give an instance, {model.__name__}(...)"
    given = brief(model) if isinstance(model, str) else type(model).__name__
    return f"a probe takes a torch.nn.Module, found {given}{hint}"


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Dotted name -> module in order of registration, with aliases; compiled parts have their plain names."""
    # A wrapper comes before the module inside, which replaces it here: only hooks of the inner module see its calls.
    return {
        ".".join(part for part in name.split(".") if part != COMPILED_FROM): module
        for name, module in model.named_modules(remove_duplicate=False)
    }


def run_eagerly(model: nn.Module, method: str = "forward") -> AbstractContextManager[object]:
    """Runs compiled models, parts and methods as plain Python inside, so that hooks fire; compiled code is kept."""
    compiled = any(is_compiled(part) or hasattr(part.forward, COMPILED_FUNCTION) for part in model.modules())
    compiled = compiled or hasattr(getattr(model, method, None), COMPILED_FUNCTION)
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Sets evaluation mode inside, and restores every training flag on exit.

    Raises:
        LayerError: the model runs no hooks; see `plain_model`.
    """
    plain_model(module)
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, flag in flags:
            part.training = flag
