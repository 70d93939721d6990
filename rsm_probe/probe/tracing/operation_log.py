"""A fingerprint of the operations that a pass applies to values of its images.

Two passes with equal fingerprints move locations in the same way, whatever the values of their other arguments. It
costs much less than a trace, so it checks passes with arguments of new values.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rsm_probe.probe.torch_internals import is_composite, is_elementwise, name_of, storage_of
from rsm_probe.probe.tracing.dispatch_modes import PassMode
from rsm_probe.probe.tracing.operations import GRIDS
from rsm_probe.probe.tracing.origin_map import followable


class Operands:
    """What an operation takes or returns: tensors, numbers, and lists of them at most.

    Attributes:
        tensors: all tensors, in order.
        numbers: all integers and texts, in order.
    """

    __slots__ = ("numbers", "tensors")

    def __init__(self, value: Any) -> None:
        self.tensors: list[Tensor] = []
        self.numbers: list[int | str] = []
        self._sort(value)

    def _sort(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self.tensors.append(value)
        elif isinstance(value, int | str):
            self.numbers.append(value)
        elif isinstance(value, list | tuple):
            for item in value:
                self._sort(item)
        elif isinstance(value, dict):
            for item in value.values():
                self._sort(item)


class OperationLog:
    """Notes each operation on values of the images: its name, shapes, integer arguments, and where operands come from.

    Args:
        images: the images of the pass.

    Attributes:
        fingerprint: of all operations so far.
    """

    def __init__(self, images: Sequence[Tensor]) -> None:
        self.fingerprint = 0
        self._written = {storage_of(image): -1 - number for number, image in enumerate(images) if followable(image)}

    def note(self, func: Any, name: str, operands: Operands, outputs: Sequence[Tensor]) -> None:
        """Notes an operation, after it has run.

        Args:
            func: the operation.
            name: its name.
            operands: its positional and keyword arguments.
            outputs: its results.
        """
        written = self._written
        sources = []
        for tensor in operands.tensors:
            if followable(tensor) and (source := written.get(storage_of(tensor))) is not None:
                sources.append((source, tensor.shape))
        if sources:
            shapes = [output.shape for output in outputs if followable(output)]
            effect = () if is_elementwise(func) else operands.numbers
            self.fingerprint = hash((self.fingerprint, name, *sources, *effect, *shapes))
        for output in outputs:
            if followable(output):
                if sources:
                    written[storage_of(output)] = self.fingerprint
                else:
                    written.pop(storage_of(output), None)


@functools.cache
def _known(func: Any) -> tuple[str, bool]:
    """The name of an operation, and whether a trace splits it."""
    name = name_of(func)
    return name, not name.startswith(GRIDS) and is_composite(func)


class LoggedPass(PassMode):
    """Keeps the log of a pass that is not traced."""

    supports_higher_order_operators = True

    def __init__(self, images: Sequence[Tensor]) -> None:
        super().__init__()
        self.log = OperationLog(images)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.ended:
            return func(*args, **kwargs)
        name, is_split = _known(func)
        if is_split:  # as in a trace
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        self.log.note(func, name, Operands((args, kwargs)), Operands(result).tensors)
        return result
