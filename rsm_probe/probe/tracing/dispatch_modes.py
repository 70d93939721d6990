"""Dispatch modes that last from the start of a forward pass to its end, in whatever order several of them end."""

from __future__ import annotations

import threading
from contextlib import ExitStack

from rsm_probe.probe.torch_internals import TorchDispatchMode


class _Modes(threading.local):
    """The modes that began in this thread, outermost first."""

    def __init__(self) -> None:
        self.begun: list[PassMode] = []


class PassMode(TorchDispatchMode):
    """Sees this thread's operations between `begin` and `end`.

    PyTorch takes modes off in the reverse order of their beginning, but probes of one model end in the order in which
    their hooks run. A mode that ends below another one stays where it is, without effect, until that one ends.

    Attributes:
        ended: whether the mode is to pass operations on as they are.
    """

    _thread = _Modes()

    def __init__(self) -> None:
        super().__init__()
        self.ended = False
        self._entered = ExitStack()

    def begin(self) -> None:
        """Sees operations from now on."""
        self._thread.begun.append(self)
        self._entered.enter_context(self)

    def end(self) -> None:
        """Sees no more."""
        self.ended = True
        begun = self._thread.begun
        while begun and begun[-1].ended:
            begun.pop()._entered.close()
