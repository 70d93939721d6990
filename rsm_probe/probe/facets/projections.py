"""Numbers the projections of an attention layer's call, so that a later pass can take the same ones."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.functional import linear

from rsm_probe.probe.torch_internals import is_composite, name_of
from rsm_probe.probe.tracing.dispatch_modes import PassMode
from rsm_probe.probe.tracing.operations import GRIDS, PRODUCTS

# Projects and attends at once: (query, key, value, channels, heads, weight, bias, ...).
FUSED_ATTENTION = "_native_multi_head_attention"


class Event(NamedTuple):
    """When the output of a projection appears within a call of an attention layer.

    Attributes:
        module: the submodule whose output it is, or "" for the result of an operation.
        number: number of earlier calls of the submodule, or of products up to it.
        step: for an operation, its number after the product.
        operation: its name.
    """

    module: str
    number: int
    step: int = 0
    operation: str = ""


class EventCounter:
    """Counts operations and calls of submodules.

    Attributes:
        event: the last operation.
    """

    def __init__(self) -> None:
        self.event = Event("", 0)
        self._calls: Counter[str] = Counter()

    def operation(self, name: str) -> None:
        """Counts an operation."""
        last = self.event
        fresh = is_projection(name) or name == FUSED_ATTENTION
        self.event = Event("", last.number + fresh, 0 if fresh else last.step + 1, name)

    def module(self, name: str) -> Event:
        """Counts a call of a submodule, and returns it."""
        self._calls[name] += 1
        return Event(name, self._calls[name])


@functools.cache
def is_projection(name: str) -> bool:
    """Whether an operation may be a product with weights."""
    return name in PRODUCTS or name == "convolution" or name.startswith("quantized::linear")


@functools.cache
def is_leaf(func: Any, name: str) -> bool:
    """Whether a trace takes an operation as it is, rather than split it."""
    return name.startswith(GRIDS) or not is_composite(func)


class ProjectionLog(PassMode):
    """Takes the outputs of known projections.

    Args:
        wanted: the projections to take.
        hold: copies a tensor that must outlive later operations.

    Attributes:
        held: their outputs.
    """

    supports_higher_order_operators = True

    def __init__(self, wanted: Collection[Event], hold: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.held: dict[Event, Tensor] = {}
        self._wanted = frozenset(wanted)
        self._hold = hold
        self._counter = EventCounter()

    def begin(self) -> None:
        """Starts observing, where operations show a projection."""
        if any(not event.module for event in self._wanted):
            super().begin()

    def enter(self, module: str) -> None:
        """Notes that a submodule begins to run."""

    def leave(self, module: str, output: Any) -> None:
        """Notes that a submodule has run."""
        if (event := self._counter.module(module)) in self._wanted:
            self.held[event] = self._hold(output)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, name_of(func)
        if self.ended:
            return func(*args, **kwargs)
        if not is_leaf(func, name):  # as in a trace
            with self:
                return func.decompose(*args, **kwargs)
        self._counter.operation(name)
        event = self._counter.event
        if name == FUSED_ATTENTION and event in self._wanted:
            self.held[event] = self._hold(linear(args[0], args[5], args[6]))
        result = func(*args, **kwargs)
        if event in self._wanted and event not in self.held:
            self.held[event] = self._hold(result)
        return result
