"""Equal locations answer to each other: spatio-semantic similarity (paper, equation 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rsm_probe.execution.devices import full_precision
from rsm_probe.matching.certificate import identity_partners
from rsm_probe.matching.matching import Locations, Matching, Pairs, Solution

# Features whose products are summed before they are added up in float64; how many of these sums are held at a time; and
# up to how many features of an image everything is float64, which is then cheap, and there is little to average over.
_BLOCK = 1024
_PRODUCTS = 1 << 22
_EXACT = 1 << 16


@dataclass(frozen=True)
class Identity(Matching):
    """Location s of one image answers to location s of the other; surplus locations of the larger image to none."""

    name: ClassVar[str] = "identity"
    is_identity: ClassVar[bool] = True
    symmetric: ClassVar[bool] = True
    needs_affinity: ClassVar[bool] = False
    growth: ClassVar[float] = 1.0
    at_once: ClassVar[bool] = True

    def solve(self, pairs: Pairs) -> Solution:
        """Pair location s with location s, as long as both images have it."""
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
        """Inner products of whole images, shape (N, M)."""
        return aligned_products(x.tokens, y.tokens)


def aligned_products(x: Tensor, y: Tensor) -> np.ndarray:
    """Inner products of images whose equal locations answer to each other (paper, equation 3), summed in float64.

    Of images of more than 65 536 features, products of 1 024 at a time are summed in the tokens' own precision, and
    these sums in float64: their errors, which are independent, leave a few 1e-8 of the norms, in a third of the time.

    Args:
        x: tokens (N, S, C).
        y: tokens (M, T, C); locations beyond the smaller of S and T answer to none.

    Returns:
        Shape (N, M), float64.
    """
    shared = min(x.shape[1], y.shape[1])
    left = _features(x[:, :shared], x)
    right = left if y is x else _features(y[:, :shared], x)
    # Apple's devices have no float64; there the (small) product moves to the CPU.
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
    """Inner products (B,) of B images of x, (B, S, C), with as many of y, where they are; x is overwritten."""
    # Over channels in their own precision: a sum of float32 numbers in float64 would first copy them all.
    return x.mul_(y).sum(dim=2).sum(dim=1, dtype=torch.float64).cpu().numpy()


def squared_norms(x: Tensor) -> np.ndarray:
    """|z_i|^2 of whole images, tokens (N, S, C) -> (N,), float64, as precise as `aligned_products`."""
    device = torch.device("cpu") if x.device.type == "mps" else x.device
    flat = _features(x, x)
    total = torch.zeros(len(x), dtype=torch.float64, device=device)
    step = _BLOCK * max(1, _PRODUCTS // (_BLOCK * len(x)))
    for start in range(0, flat.shape[1], step):
        for block in _blocks(flat[:, start : start + step], flat.shape[1], device):
            total += torch.linalg.vector_norm(block, dim=2).to(device, torch.float64).square().sum(dim=0)
    return total.cpu().numpy()


def _features(x: Tensor, like: Tensor) -> Tensor:
    """Tokens (N, S, C) as (N, S * C), in the order in which another tensor lies in memory, without a copy of it."""
    return (x.transpose(1, 2) if like.stride(1) < like.stride(2) else x).flatten(1)


def _blocks(part: Tensor, features: int, device: torch.device) -> list[Tensor]:
    """A part (N, F) of images of so many features, as (blocks, N, 1024), and the rest as (1, N, F % 1024)."""
    if features <= _EXACT:
        part = part.to(device, torch.float64)
    whole = part.shape[1] // _BLOCK
    blocks = [part[:, : whole * _BLOCK].unflatten(1, (whole, _BLOCK)).transpose(0, 1)] if whole else []
    return [*blocks, part[None, :, whole * _BLOCK :]] if part.shape[1] % _BLOCK else blocks
