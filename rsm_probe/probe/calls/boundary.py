"""Which calls of a model are passes: those of its forward, or of another method that the user names."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rsm_probe.checks import require_text
from rsm_probe.errors import LayerError, did_you_mean
from rsm_probe.probe.wrappers import has_no_forward

FORWARD = "forward"


class LastLayerSeenError(Exception):
    """Ends a pass after the last probed layer; its argument is the `Boundary` to stop at."""


class Boundary:
    """Replaces a method of a model: counts its running calls, ends a pass early, and notices interruptions.

    Passes of `forward` begin and end in hooks of the model, so that hooks of other code run within them. Other methods
    run no hooks, and their passes begin and end here. Even hooks with `always_call` do not see KeyboardInterrupt.

    Args:
        module: the model.
        method: the name of the method.
        drop: called when a pass fails or is interrupted, which the hooks of the model do not see.
        begin: called with the arguments of the method before the outermost call; None for `forward`.
        end: called with them after the outermost call; None for `forward`.

    Attributes:
        depth: number of running calls of the method in the probe's thread; a model may call itself.
    """

    def __init__(
        self,
        module: nn.Module,
        method: str,
        drop: Callable[[], None],
        begin: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
        end: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
    ) -> None:
        self.depth = 0
        self._module = module
        self._method = method
        self._drop = drop
        self._begin = begin
        self._end = end
        self._active = False

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Routes the method's calls in this thread through this object inside."""
        module, name = self._module, self._method
        self.depth, self._thread = 0, threading.get_ident()
        self._own: Any = vars(module).get(name)
        self._call = getattr(module, name)
        functools.update_wrapper(self, self._call, updated=())
        setattr(module, name, self)
        self._active = True
        try:
            yield
        finally:
            self._active = False
            # If other code has replaced the method since, it continues to call this object.
            if vars(module).get(name) is self:
                own = self._own
                while isinstance(own, Boundary) and not own._active:
                    own = own._own
                if own is None:
                    delattr(module, name)
                else:
                    setattr(module, name, own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model's own method."""
        if not self._active or threading.get_ident() != self._thread:
            return self._call(*args, **kwargs)
        if self._begin is not None and not self.depth:
            self._begin(args, kwargs)
        self.depth += 1
        try:
            try:
                result = self._call(*args, **kwargs)
            except LastLayerSeenError as error:
                if error.args[0] is not self or self.depth > 1:
                    raise
                result = None
            if self._end is not None and self.depth == 1:
                self._end(args, kwargs)
            return result
        except BaseException as error:
            # The hooks of the model see other failures of its forward.
            if not isinstance(error, Exception) or (self._end is not None and self.depth == 1):
                self._drop()
            raise
        finally:
            self.depth -= 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy of the model is not probed, so it gets its own method.
        return copy.deepcopy(self._call, memo)


def require_method(model: nn.Module, method: Any) -> str:
    """Validates the name of the method whose calls are passes.

    Args:
        model: the model.
        method: the name that the user gave.

    Raises:
        LayerError: it is not text, the model has no such method, or its calls cannot be passes.
    """
    require_text(method, "method", LayerError)
    kind, children = type(model).__name__, dict(model.named_children())
    if method == FORWARD and has_no_forward(model):
        own = ", ".join(_methods(model))
        raise LayerError(
            f"{kind} has no forward of its own; probe one of its parts: {', '.join(children) or '(none)'}"
            + (f"; or name the method that is called, method='...': {own}" if own else "")
        )
    if method in ("__call__", ""):
        raise LayerError(f"method={method!r}: a call of the model itself is method='forward', which is the default")
    holder, _, name = method.rpartition(".")
    if holder and (part := _part(model, holder)) is not None and callable(getattr(part, name, None)):
        raise LayerError(
            f"method={method!r} belongs to a part: Probe(model.get_submodule({holder!r}), method={name!r})"
        )
    function = getattr(model, method, None)
    if isinstance(function, nn.Module):
        raise LayerError(
            f"method={method!r} is a part of {kind} ({type(function).__name__}), not a method; probe the part: "
            f"Probe(model.get_submodule({method!r}), ...)"
        )
    if not callable(function) or method.startswith("__"):
        near = did_you_mean(method, _methods(model))
        raise LayerError(f"{kind} has no method {method!r}{near}")
    plain = inspect.unwrap(function)
    if any(is_lazy(plain) for is_lazy in _LAZY):
        raise LayerError(
            f"method={method!r} of {kind} is a generator or coroutine, which runs after its call has returned; name "
            f"the method that it calls for each step"
        )
    return method


# A call of such a function returns before its body runs.
_LAZY = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)


def _methods(model: nn.Module) -> list[str]:
    """The public methods that a model adds to those of every module."""
    return [
        name
        for kind in type(model).__mro__
        if kind is not object and not kind.__module__.startswith("torch.")
        for name, value in vars(kind).items()
        if inspect.isroutine(value) and not name.startswith("_") and not hasattr(nn.Module, name)
    ]


def _part(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules()).get(name)


def called_method(model: nn.Module) -> str | None:
    """The outermost running public method of a model, or None if only its parts run."""
    frame, outermost = inspect.currentframe(), None
    while frame is not None:
        name = frame.f_code.co_name
        if not name.startswith("_") and frame.f_locals.get("self") is model and hasattr(type(model), name):
            outermost = name
        frame = frame.f_back
    return outermost
