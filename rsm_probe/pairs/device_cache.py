"""Tokens on a device: those of a capture are copied there once, as long as they fit."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from rsm_probe.execution.devices import token_bytes


class DeviceCache:
    """Tokens on devices that tiles will need again; the least recently used are dropped first.

    Args:
        limit: the bytes of tokens that a device may hold.
    """

    def __init__(self, limit: Callable[[torch.device], int] = token_bytes) -> None:
        self._limit = limit
        self._held: OrderedDict[tuple[Hashable, torch.device], Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._held.clear()

    def get(self, key: Hashable, read: Callable[[], Tensor], device: torch.device) -> Tensor:
        """Tokens on a device.

        Args:
            key: identifies the tokens.
            read: returns them, in main memory.
            device: the target; "cuda" is the current device of this thread.
        """
        if device.type == "cpu":
            return read()
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        with self._lock:
            tokens = self._held.get((key, device))
            if tokens is not None:
                self._held.move_to_end((key, device))
                return tokens
        tokens = read().to(device)
        with self._lock:
            self._held[key, device] = tokens
            mine = [name for name in self._held if name[1] == device]
            held = sum(self._held[name].nbytes for name in mine)
            for name in mine[:-1]:
                if held <= self._limit(device):
                    break
                held -= self._held.pop(name).nbytes
        return tokens
