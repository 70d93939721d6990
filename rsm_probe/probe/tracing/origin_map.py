"""Stores the origins of all tensors of a forward pass by the memory that they occupy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rsm_probe.probe.torch_internals import storage_of
from rsm_probe.probe.tracing.origins import Elsewhere, Lost, Origin, as_codes, compact, nowhere

# The key for all views of a storage that was partly overwritten.
_EVERY_VIEW = ()


class OriginMap:
    """Origins by storage and view, shared by all aliases of a tensor."""

    def __init__(self) -> None:
        self._storages: dict[int, dict[tuple[Any, ...], Tensor | Lost | Elsewhere]] = {}
        self._attended: set[int] = set()

    def of(self, tensor: Tensor) -> Origin:
        """The origin of a tensor, in its shape; None if it depends on no traced input."""
        if not followable(tensor):
            return None
        views = self._storages.get(storage_of(tensor), {})
        if (origin := views.get(_view(tensor))) is not None:
            return origin
        codes = views.get(_EVERY_VIEW)
        return compact(_part(codes, tensor)) if isinstance(codes, Tensor) else codes

    def forget(self, tensor: Tensor) -> None:
        """Forgets the origins in a tensor's memory, because the tensor is new."""
        if followable(tensor):
            self._storages.pop(storage_of(tensor), None)
            self._attended.discard(storage_of(tensor))

    def put(self, tensor: Tensor, origin: Origin) -> None:
        """Records the origin of a tensor or view."""
        if followable(tensor) and origin is not None:
            self._storages.setdefault(storage_of(tensor), {})[_view(tensor)] = origin

    def is_attended(self, tensor: Tensor) -> bool:
        """Whether the locations of a tensor have exchanged information through attention."""
        return followable(tensor) and storage_of(tensor) in self._attended

    def note_attended(self, tensor: Tensor) -> None:
        """Records that the locations of a tensor have exchanged information through attention."""
        if followable(tensor):
            self._attended.add(storage_of(tensor))

    def write(self, tensor: Tensor, origin: Origin) -> None:
        """Records that a tensor, or a part of one, was overwritten."""
        if not followable(tensor):
            return
        key = storage_of(tensor)
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        if tensor.numel() == size:
            self._storages[key] = {}
            self.put(tensor, origin)
            if origin is not None:  # later code may use only other views of this memory
                self._storages[key][_EVERY_VIEW] = self._flat(self._storages[key], size, tensor.device)
            return
        before = self._storages.get(key, {})
        codes = self._flat(before, size, tensor.device)
        inputs = [known.inputs for known in (codes, origin) if isinstance(known, Elsewhere)]
        if isinstance(origin, Lost) and not isinstance(codes, Lost):
            codes = origin
        elif inputs and not isinstance(origin, Tensor) and (isinstance(codes, Elsewhere) or not before):
            codes = Elsewhere(tuple(sorted(set[int]().union(*inputs))))
        elif not isinstance(codes, Lost):
            if isinstance(codes, Elsewhere):
                codes = nowhere((size,), tensor.device, codes.code).clone()
            _part(codes, tensor).copy_(as_codes(origin, tensor))
        self._storages[key] = {_EVERY_VIEW: codes}

    @staticmethod
    def _flat(
        views: dict[tuple[Any, ...], Tensor | Lost | Elsewhere], size: int, device: torch.device
    ) -> Tensor | Lost | Elsewhere:
        """The codes of every element of a storage, or what else is known of all its views."""
        if not views:
            return nowhere((size,), device).clone()
        for key, origin in views.items():
            if key == _EVERY_VIEW or not isinstance(origin, Tensor):
                return origin
            _, shape, strides = key
            if origin.numel() == size:
                flat = torch.empty(size, dtype=torch.float64, device=device)
                flat.as_strided(shape, strides).copy_(origin)
                return flat
        return Lost("a write to a part")


def _part(codes: Tensor, tensor: Tensor) -> Tensor:
    """The part of a storage's codes (size,) that a tensor covers."""
    return codes.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def followable(tensor: Tensor) -> bool:
    """Whether a tensor has plain strided memory, neither nested nor sparse."""
    return not tensor.is_nested and tensor.layout == torch.strided


def _view(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
