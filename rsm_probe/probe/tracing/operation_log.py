"""A fingerprint of the operations that a pass applies to values of its images.

Two passes with equal fingerprints move locations in the same way, whatever the values of their other arguments. It
costs much less than a trace, so it checks passes with arguments of new values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rsm_probe.probe.torch_internals import is_composite, is_elementwise, name_of, storage_of, tree_leaves
from rsm_probe.probe.tracing.dispatch_modes import PassMode
from rsm_probe.probe.tracing.operations import GRIDS
from rsm_probe.probe.tracing.origin_map import followable


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

    def note(self, func: Any, name: str, args: Any, outputs: Sequence[Tensor]) -> None:
        """Notes an operation, after it has run.

        Args:
            func: the operation.
            name: its name.
            args: its positional and keyword arguments.
            outputs: its results.
        """
        leaves = tree_leaves(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and followable(leaf)]
        sources = [(self._written.get(storage_of(tensor)), tensor.shape) for tensor in tensors]
        sources = [source for source in sources if source[0] is not None]
        numbers = () if is_elementwise(func) else tuple(leaf for leaf in leaves if isinstance(leaf, int | str))
        if sources:
            shapes = [output.shape for output in outputs if followable(output)]
            self.fingerprint = hash((self.fingerprint, name, *sources, *numbers, *shapes))
        for output in outputs:
            if not followable(output):
                continue
            if sources:
                self._written[storage_of(output)] = self.fingerprint
            else:
                self._written.pop(storage_of(output), None)


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
        name = name_of(func)
        if not name.startswith(GRIDS) and is_composite(func):  # as in a trace
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        self.log.note(func, name, (args, kwargs), [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])
        return result
