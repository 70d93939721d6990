"""Wrappers around a model: compilation, data parallelism, evaluation mode, and the boundary of its passes."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from rsm_probe.checks import brief
from rsm_probe.errors import LayerError, ModelError
from rsm_probe.probe.torch_internals import COMPILED_FROM, EXPORT_GUARDS, is_compiled

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
    if has_no_forward(model):
        names = ", ".join(name for name, _ in model.named_children())
        raise LayerError(
            f"{type(model).__name__} has no forward of its own; probe one of its parts: {names or '(none)'}"
        )
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


def run_eagerly(model: nn.Module) -> AbstractContextManager[object]:
    """Runs compiled models and parts as plain Python inside, so that hooks fire; compiled code stays cached."""
    compiled = any(map(is_compiled, model.modules()))
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


class LastLayerSeenError(Exception):
    """Ends a forward pass after the last probed layer; its argument is the `Boundary` to stop at."""


class Boundary:
    """Replaces a model's `forward`: counts running calls, ends a pass early, and notices interruptions.

    Even hooks with `always_call` do not see KeyboardInterrupt.

    Args:
        module: the model.
        interrupted: called when a pass ends in an exception that is not an `Exception`.

    Attributes:
        depth: number of running calls of `forward` in the probe's thread; a model may call itself.
    """

    def __init__(self, module: nn.Module, interrupted: Callable[[], None]) -> None:
        self.depth = 0
        self._module = module
        self._interrupted = interrupted
        self._active = False

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Routes the model's calls in this thread through this object inside."""
        module = self._module
        self.depth, self._thread = 0, threading.get_ident()
        self._own: Any = vars(module).get("forward")
        self._forward = module.forward
        functools.update_wrapper(self, self._forward, updated=())
        module.forward = self
        self._active = True
        try:
            yield
        finally:
            self._active = False
            # If other code has replaced `forward` since, it continues to call this object.
            if vars(module).get("forward") is self:
                own = self._own
                while isinstance(own, Boundary) and not own._active:
                    own = own._own
                if own is None:
                    del module.forward
                else:
                    module.forward = own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model's own forward."""
        if not self._active or threading.get_ident() != self._thread:
            return self._forward(*args, **kwargs)
        self.depth += 1
        try:
            return self._forward(*args, **kwargs)
        except LastLayerSeenError as error:
            if error.args[0] is self and self.depth == 1:
                return None
            raise
        except Exception:
            raise
        except BaseException:
            self._interrupted()
            raise
        finally:
            self.depth -= 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy of the model is not probed, so it gets its own forward.
        return copy.deepcopy(self._forward, memo)
