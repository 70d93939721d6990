"""Upper bounds on the value of any matching of two images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rsm_probe.matching.matching import Locations

# Matched pairs that enter the exact auction; its prices are then extended to all other columns.
_SAMPLE = 2048
_SAMPLE_GAP = 1e-9
_BIDS_PER_ROW = 2000
# Principal directions along which summaries keep sorted projections; more hardly tighten the bound.
_DIRECTIONS = 8
_ITERATIONS = 10
# Rounding error of a sum of differences, relative to the summed magnitudes.
_ROUNDING = 2.0**-50
# Bytes of affinities held at once.
_BLOCK_BYTES = 64 << 20


def sorted_norms_bound(x: Locations, i: int, y: Locations, j: int) -> float:
    """The inner product of the sorted norms, which bounds the value of every matching (rearrangement inequality)."""
    shared = min(x.count, y.count)
    left, right = x.norms[i][x.order[i]], y.norms[j][y.order[j]]
    # Squares are summed over channels, products over locations.
    rounding = 2 * (x.tokens.shape[2] + shared + 4) * np.finfo(np.float64).eps
    return float(left[:shared] @ right[:shared]) * (1 + rounding)


@dataclass(frozen=True, eq=False)
class Summaries:
    """Upper bounds on the values of many pairs, each at the cost of one short inner product and without affinities.

    The smaller image is padded with zeros, so both sides have S locations and every permutation keeps the mean over
    locations: `<x, P y> = S <mean x, mean y> + <x - mean x, P (y - mean y)>`. The second term is split into projections
    on a few directions and a remainder. By the rearrangement inequality, each projection contributes at most the inner
    product of the sorted projections, and the remainder at most that of the sorted norms. All three parts are inner
    products of per-image summaries.

    Attributes:
        directions: (C, K), orthonormal. Any directions are valid; the leading principal axes give the tightest bound.
        locations: number of locations of the larger image, S.
    """

    directions: Tensor
    locations: int

    @classmethod
    def fit(cls, tokens: Tensor, locations: int) -> Summaries:
        """Fit the directions to a sample of images, tokens (N, T, C)."""
        residuals = (tokens - tokens.mean(dim=1, keepdim=True)).flatten(0, 1).double()
        spread = residuals.T @ residuals
        start = torch.randn(len(spread), min(_DIRECTIONS, len(spread)), generator=torch.Generator().manual_seed(0))
        axes = torch.linalg.qr(start.to(spread))[0]
        for _ in range(_ITERATIONS):
            axes = torch.linalg.qr(spread @ axes)[0]
        return cls(axes, locations)

    @property
    def length(self) -> int:
        """Number of values in the summary of one image."""
        channels, directions = self.directions.shape
        return channels + (directions + 1) * self.locations

    def of(self, tokens: Tensor) -> Tensor:
        """Summarise tokens (N, T, C): (N, length), float64. Inner products of summaries bound every matching."""
        tokens = tokens.cpu() if tokens.device.type == "mps" else tokens  # MPS lacks float64
        # In parts, because this needs several float64 copies of the tokens.
        parts = tokens.split(max(1, _BLOCK_BYTES // (8 * max(1, tokens[:1].numel()))))
        return torch.cat([self._of(part) for part in parts])

    def _of(self, tokens: Tensor) -> Tensor:
        directions = self.directions.to(tokens.device)
        padded = torch.nn.functional.pad(tokens.double(), (0, 0, 0, self.locations - tokens.shape[1]))
        mean = padded.mean(dim=1, keepdim=True)
        residuals = padded - mean
        along = residuals @ directions
        rest = torch.linalg.vector_norm(residuals - along @ directions.T, dim=2, keepdim=True)
        ordered = torch.cat([along, rest], dim=2).sort(dim=1).values
        return torch.cat([mean[:, 0] * self.locations**0.5, ordered.flatten(1)], dim=1)


def dual_bound(rows_of: Callable[[np.ndarray], np.ndarray], columns: int, permutation: np.ndarray) -> float:
    """Bound the value of every matching by linear programming duality, in blocks of rows.

    The dual value is the sum of the column prices and of each row's best affinity at these prices. An exact auction on
    a sample of the matched pairs gives the prices of their columns. Every other column is priced so that no sampled row
    prefers it. Up to 2048 locations the sample is complete, and the bound is tight.

    Args:
        rows_of: maps row indices (k,) to their affinities (k, T), float64.
        columns: number of columns T.
        permutation: the partner of each row, (S,), -1 for unmatched rows. A good matching gives a tight bound.

    Returns:
        A number that no matching exceeds.
    """
    # Lazy: importing Numba takes seconds.
    from rsm_probe.matching.compiled.cpu_auction import dual_prices

    rows = len(permutation)
    size = max(rows, columns)
    step = max(1, _BLOCK_BYTES // (8 * size))

    def padded(wanted: np.ndarray) -> np.ndarray:
        """Affinities of the wanted rows, (k, size); rows beyond S and columns beyond T are zero."""
        block = np.zeros((len(wanted), size))
        real = wanted < rows
        block[real, :columns] = rows_of(wanted[real])
        return block

    partners = np.concatenate([permutation, np.full(size - rows, -1)])
    # Unmatched rows take the columns that are left.
    partners[partners < 0] = np.setdiff1d(np.arange(size), partners)
    sample = np.sort(np.random.default_rng(0).permutation(size)[:_SAMPLE])
    sampled_columns = partners[sample]
    pieces = np.split(sample, range(step, len(sample), step))
    among = np.concatenate([padded(piece)[:, sampled_columns] for piece in pieces])
    profits = (among - dual_prices(among, _SAMPLE_GAP, _BIDS_PER_ROW)).max(axis=1)
    prices = np.full(size, -np.inf)
    for start, piece in zip(range(0, len(sample), step), pieces, strict=True):
        # Computed a second time, because all sampled rows at once would take too much memory.
        prices = np.maximum(prices, (padded(piece) - profits[start : start + len(piece), None]).max(axis=0))
    parts = np.split(np.arange(size), range(step, size, step))
    terms = np.concatenate([prices, *((padded(part) - prices).max(axis=1) for part in parts)])
    # fsum is exact: only each subtraction and the final result are rounded.
    return math.fsum(terms) + _ROUNDING * float(np.abs(terms).sum())
