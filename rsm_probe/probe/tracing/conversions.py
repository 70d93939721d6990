"""Notices tensors that become lists or arrays, which PyTorch shows to no mode on the CPU."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

_CONVERTING = {"tolist", "numpy"}


class _Watchers(threading.local):
    """What to call in this thread."""

    def __init__(self) -> None:
        self.running: list[Callable[[Tensor], None]] = []


_WATCHERS = _Watchers()


def watch(converted: Callable[[Tensor], None]) -> bool:
    """Calls a function with every tensor of this thread that becomes a list or an array, until `unwatch`.

    Returns:
        False if a profiler runs in this thread, which Python allows only once.
    """
    if sys.getprofile() not in (None, _profile):
        return False
    _WATCHERS.running.append(converted)
    sys.setprofile(_profile)
    return True


def unwatch(converted: Callable[[Tensor], None]) -> None:
    """Ends what `watch` began."""
    if converted in _WATCHERS.running:
        _WATCHERS.running.remove(converted)
    if not _WATCHERS.running and sys.getprofile() is _profile:
        sys.setprofile(None)


def _profile(frame: Any, event: str, function: Any) -> None:
    if event == "c_call" and function.__name__ in _CONVERTING:
        tensor = getattr(function, "__self__", None)
        if isinstance(tensor, Tensor):
            for converted in _WATCHERS.running:
                converted(tensor)
