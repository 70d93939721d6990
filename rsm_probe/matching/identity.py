"""Equal locations answer to each other: spatio-semantic similarity (paper, equation 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rsm_probe.matching.protocol import Locations, Matching, Pairs, Solution

# Features converted to float64 at a time, so that a large layer is not held twice in double precision.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Identity(Matching):
    """Location s of one image answers to location s of the other; surplus locations of the larger image to none."""

    name: ClassVar[str] = "identity"
    exact: ClassVar[bool] = False
    symmetric: ClassVar[bool] = True
    needs_affinity: ClassVar[bool] = False
    growth: ClassVar[float] = 1.0
    at_once: ClassVar[bool] = True

    def solve(self, pairs: Pairs) -> Solution:
        """The partner of location s is location s, as long as there is one."""
        if pairs.affinity is not None:
            diagonals = np.diagonal(pairs.affinity, axis1=1, axis2=2)
            values = diagonals.sum(axis=1, dtype=np.float64)
            rows, columns = pairs.affinity.shape[1:]
        else:
            x, y = pairs.images()
            chosen = zip(pairs.rows, pairs.columns, strict=True)
            values = np.array([aligned_products(x.on_cpu[[i]], y.on_cpu[[j]])[0, 0] for i, j in chosen])
            rows, columns = x.count, y.count
        order = np.where(np.arange(rows) < columns, np.arange(rows), -1)
        return Solution(values, np.tile(order, (len(pairs), 1)), np.full(len(pairs), np.nan), [self.name] * len(pairs))

    def products(self, x: Locations, y: Locations) -> np.ndarray:
        """Inner products of whole images, shape (N, M)."""
        return aligned_products(x.tokens, y.tokens)


def aligned_products(x: Tensor, y: Tensor) -> np.ndarray:
    """Inner products of images whose equal locations answer to each other (paper, equation 3), summed in float64.

    Args:
        x: tokens (N, S, C).
        y: tokens (M, T, C); locations beyond the smaller of S and T answer to none.

    Returns:
        Shape (N, M), float64.
    """
    shared = min(x.shape[1], y.shape[1])
    step = max(1, _CHUNK // max(1, (x.shape[0] + y.shape[0]) * x.shape[2]))
    # Apple's devices have no float64; there the (small) product moves to the CPU.
    device = torch.device("cpu") if x.device.type == "mps" else x.device
    total = torch.zeros(x.shape[0], y.shape[0], dtype=torch.float64, device=device)
    for start in range(0, shared, step):
        part = slice(start, min(start + step, shared))
        left = x[:, part].to(device, torch.float64).flatten(1)
        total += left @ (left if y is x else y[:, part].to(device, torch.float64).flatten(1)).T
    return total.cpu().numpy()
