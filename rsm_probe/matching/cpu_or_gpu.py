"""Whether CPU threads or the GPU solve the pairs of a piece of work: decided once, by its size, for all of its parts.

Every method says from which size on a device is worth it (`Matching.on_device`); only a `Workload` asks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rsm_probe.matching.matching import Matching


@dataclass(frozen=True)
class Workload:
    """The size of a piece of work, however small the parts it is done in.

    Attributes:
        pairs: of images; of one set, every unordered pair of different images counts once.
        locations: of the larger image.
    """

    pairs: int
    locations: int

    @classmethod
    def of(cls, x: Sequence[int], y: Sequence[int] | None = None) -> Workload:
        """All pairs of two sets of images, by their shapes (N, S, C) and (M, T, C); without y, all within x."""
        if y is None:
            return cls(x[0] * (x[0] - 1) // 2, x[1])
        return cls(x[0] * y[0], max(x[1], y[1]))

    def on_device(self, method: Matching, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the device that holds tokens of a dtype solves the pairs; affinities then stay there."""
        return method.on_device(device, dtype, self.locations, self.pairs)
