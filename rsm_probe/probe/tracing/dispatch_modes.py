"""Dispatch modes that last for one forward pass and may end in any order."""

from __future__ import annotations

import threading
from contextlib import ExitStack

from rsm_probe.probe.torch_internals import TorchDispatchMode, exchange_what_modes_restore

# Modes that were entered and not left, of all threads, in the order of entry. PyTorch notes for the whole process
# whether a mode is active, and each mode restores what it found: of two threads that overlap, the later would restore
# that one is, for good, and nothing would be compiled any more.
_active: list[PassMode] = []
_entering = threading.Lock()


class _Modes(threading.local):
    """The active modes of this thread, outermost first."""

    def __init__(self) -> None:
        self.begun: list[PassMode] = []


class PassMode(TorchDispatchMode):
    """Observes this thread's operations between `begin` and `end`.

    PyTorch removes modes in reverse order of entry, but the probes of one model end in the order in which their hooks
    run. A mode that ends below another one stays on the stack, without effect, until that one ends.

    Attributes:
        ended: whether the mode passes operations on unobserved.
    """

    _thread = _Modes()

    def __init__(self) -> None:
        super().__init__()
        self.ended = False
        self._entered = ExitStack()

    def begin(self) -> None:
        """Starts observing."""
        self._thread.begun.append(self)
        with _entering:
            _active.append(self)
            self._entered.enter_context(self)

    def end(self) -> None:
        """Stops observing."""
        self.ended = True
        begun = self._thread.begun
        while begun and begun[-1].ended:
            begun.pop()._leave()

    def _leave(self) -> None:
        with _entering:
            if _active[0] is self and len(_active) > 1:
                exchange_what_modes_restore(self, _active[1])
            _active.remove(self)
            self._entered.close()
