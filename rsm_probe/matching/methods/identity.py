"""The identity matching: spatio-semantic similarity (paper, equation 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rsm_probe.execution.devices import full_precision
from rsm_probe.matching.certificate import identity_partners
from rsm_probe.matching.matching import Locations, Matching, Pairs, Solution

# Products per sum in the tokens' own precision; how many such sums are held at once; and the number of features up to
# which all is float64: it is cheap there, and there are too few sums for their rounding errors to average out.
_BLOCK = 1024
_PRODUCTS = 1 << 22
_EXACT = 1 << 16


@dataclass(frozen=True)
class Identity(Matching):
    """Pair location s with location s; surplus locations of the larger image stay unmatched."""

    name: ClassVar[str] = "identity"
    is_identity: ClassVar[bool] = True
    symmetric: ClassVar[bool] = True
    needs_affinity: ClassVar[bool] = False
    growth: ClassVar[float] = 1.0
    at_once: ClassVar[bool] = True

    def solve(self, pairs: Pairs) -> Solution:
        """Pair location s with location s, up to the smaller number of locations."""
        if pairs.affinity is not None:
            values, (rows, columns) = pairs.aligned_sums, pairs.affinity.shape[1:]
        else:
            x, y = pairs.images()
            numbers = zip(pairs.rows, pairs.columns, strict=True)
            values = np.array([aligned_products(x.on_cpu[[i]], y.on_cpu[[j]])[0, 0] for i, j in numbers])
            rows, columns = x.count, y.count
        partners = np.tile(identity_partners(rows, columns), (len(pairs), 1))
        return Solution.uncertified(values, partners, self.name)

    def products(self, x: Locations, y: Locations) -> np.ndarray:
        """Inner products of whole images, (N, M)."""
        return aligned_products(x.tokens, y.tokens)


def aligned_products(x: Tensor, y: Tensor) -> np.ndarray:
    """Inner products of images under the identity matching (paper, equation 3), summed in float64.

    Beyond 65 536 features per image, blocks of 1 024 products are summed in the precision of the tokens, and these sums
    in float64. Their independent errors amount to a few 1e-8 of the norms, in a third of the time.

    Args:
        x: tokens (N, S, C).
        y: tokens (M, T, C); locations beyond the smaller of S and T are ignored.

    Returns:
        Shape (N, M), float64.
    """
    shared = min(x.shape[1], y.shape[1])
    left = _features(x[:, :shared], x)
    right = left if y is x else _features(y[:, :shared], x)
    # MPS lacks float64, so the (small) result moves to the CPU.
    device = torch.device("cpu") if x.device.type == "mps" else x.device
    total = torch.zeros(len(x), len(y), dtype=torch.float64, device=device)
    step = _BLOCK * max(1, _PRODUCTS // (len(x) * len(y)))
    with full_precision(x.device):
        for start in range(0, left.shape[1], step):
            blocks, others = (_blocks(flat[:, start : start + step], left.shape[1], device) for flat in (left, right))
            for block, other in zip(blocks, others, strict=True):
                total += torch.bmm(block, other.transpose(1, 2)).to(device).sum(dim=0, dtype=torch.float64)
    return total.cpu().numpy()


def products_of_pairs(x: Tensor, y: Tensor) -> np.ndarray:
    """Inner products (B,) of corresponding images of x and y, both (B, S, C), on their device; x is overwritten."""
    # Sum channels in their own precision: a float64 sum of float32 values would first copy all of them.
    return x.mul_(y).sum(dim=2).sum(dim=1, dtype=torch.float64).cpu().numpy()


def squared_norms(x: Tensor) -> np.ndarray:
    """Squared norms |z_i|^2 of whole images, tokens (N, S, C) -> (N,), float64, as precise as `aligned_products`."""
    device = torch.device("cpu") if x.device.type == "mps" else x.device
    flat = _features(x, x)
    total = torch.zeros(len(x), dtype=torch.float64, device=device)
    step = _BLOCK * max(1, _PRODUCTS // (_BLOCK * len(x)))
    for start in range(0, flat.shape[1], step):
        for block in _blocks(flat[:, start : start + step], flat.shape[1], device):
            total += torch.linalg.vector_norm(block, dim=2).to(device, torch.float64).square().sum(dim=0)
    return total.cpu().numpy()


def _features(x: Tensor, like: Tensor) -> Tensor:
    """Flatten tokens (N, S, C) to (N, S * C) in the memory order of another tensor, to avoid copying that one."""
    return (x.transpose(1, 2) if like.stride(1) < like.stride(2) else x).flatten(1)


def _blocks(part: Tensor, features: int, device: torch.device) -> list[Tensor]:
    """Split a part (N, F) of images with `features` features into (blocks, N, 1024) and a rest (1, N, F % 1024)."""
    if features <= _EXACT:
        part = part.to(device, torch.float64)
    whole = part.shape[1] // _BLOCK
    blocks = [part[:, : whole * _BLOCK].unflatten(1, (whole, _BLOCK)).transpose(0, 1)] if whole else []
    return [*blocks, part[None, :, whole * _BLOCK :]] if part.shape[1] % _BLOCK else blocks
