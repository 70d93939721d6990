"""The choice between CPU threads and the GPU, made once for a whole workload by its size.

Each method knows from which size on the device pays off (`Matching.on_device`); only `Workload` asks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rsm_probe.matching.matching import Matching


@dataclass(frozen=True)
class Workload:
    """The size of a whole workload, even if it is processed in small parts.

    Attributes:
        pairs: number of image pairs; within one set, unordered pairs of different images.
        locations: number of locations of the larger image.
    """

    pairs: int
    locations: int

    @classmethod
    def of(cls, x: Sequence[int], y: Sequence[int] | None = None) -> Workload:
        """Count all pairs of two sets of images of shapes (N, S, C) and (M, T, C); without y, the pairs within x."""
        if y is None:
            return cls(x[0] * (x[0] - 1) // 2, x[1])
        return cls(x[0] * y[0], max(x[1], y[1]))

    def on_device(self, method: Matching, device: torch.device, dtype: torch.dtype) -> bool:
        """Decide whether to solve on the device that holds the tokens; affinities then stay there."""
        return method.on_device(device, dtype, self.locations, self.pairs)
