"""Upper bounds on the value of any matching of two images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rsm_probe.matching.matching import Locations

# Matched pairs whose exact prices are carried to all others.
_SAMPLE = 2048
_SAMPLE_GAP = 1e-9
_BIDS_PER_ROW = 2000
# Directions in which summaries hold each location by itself: further ones hardly tighten the bound.
_DIRECTIONS = 8
_ITERATIONS = 10
# What rounding may hide of a sum of differences, relative to their magnitudes.
_ROUNDING = 2.0**-50
# Bytes of the affinities that exist at once.
_BLOCK_BYTES = 64 << 20


def sorted_norms_bound(x: Locations, i: int, y: Locations, j: int) -> float:
    """The product of the sorted norms: vectors of these lengths cannot be matched to more."""
    shared = min(x.count, y.count)
    left, right = x.norms[i][x.order[i]], y.norms[j][y.order[j]]
    # Squares are added up over channels, products over locations.
    rounding = 2 * (x.tokens.shape[2] + shared + 4) * np.finfo(np.float64).eps
    return float(left[:shared] @ right[:shared]) * (1 + rounding)


@dataclass(frozen=True, eq=False)
class Summaries:
    """Bounds of many pairs at the cost of one short inner product each, without their affinities.

    With as many locations on both sides (the smaller image is padded with zeros), the mean over locations is the same
    under every permutation: `<x, P y> = S <mean x, mean y> + <x - mean x, P (y - mean y)>`. Of the second term, a part
    along one direction is at most the product of the sorted projections, by the rearrangement inequality, and what is
    left the product of the sorted norms. All three are inner products of what is known of each image by itself.

    Attributes:
        directions: (C, K), orthonormal; any are valid, the first principal axes of the images make the bound close.
        locations: of the larger image, S.
    """

    directions: Tensor
    locations: int

    @classmethod
    def fit(cls, tokens: Tensor, locations: int) -> Summaries:
        """Directions from a sample of images, tokens (N, T, C)."""
        residuals = (tokens - tokens.mean(dim=1, keepdim=True)).flatten(0, 1).double()
        spread = residuals.T @ residuals
        start = torch.randn(len(spread), min(_DIRECTIONS, len(spread)), generator=torch.Generator().manual_seed(0))
        axes = torch.linalg.qr(start.to(spread))[0]
        for _ in range(_ITERATIONS):
            axes = torch.linalg.qr(spread @ axes)[0]
        return cls(axes, locations)

    @property
    def length(self) -> int:
        """Numbers in the summary of an image."""
        channels, directions = self.directions.shape
        return channels + (directions + 1) * self.locations

    def of(self, tokens: Tensor) -> Tensor:
        """Summaries (N, length), float64, of tokens (N, T, C); the product of two is at least that of any matching."""
        tokens = tokens.cpu() if tokens.device.type == "mps" else tokens  # where float64 is
        # Some images at a time: all of this is float64, several times over.
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
    """A bound by linear programming duality, block by block: prices of columns, and each row's best at these prices.

    Prices come from an exact auction among a sample of the matched pairs; each other column costs what makes no row of
    the sample prefer it. With up to 2048 locations the sample is everything, and the bound is tight.

    Args:
        rows_of: numbers of rows -> their affinities (k, T), float64.
        columns: T.
        permutation: (S,), the partner of every row, -1 where it has none; with a good matching the bound is close.

    Returns:
        A number that the value of no matching exceeds.
    """
    # Lazy: importing Numba takes seconds.
    from rsm_probe.matching.compiled.cpu_auction import dual_prices

    rows = len(permutation)
    size = max(rows, columns)
    step = max(1, _BLOCK_BYTES // (8 * size))

    def padded(wanted: np.ndarray) -> np.ndarray:
        """Affinities (k, size) of rows; those beyond S, and columns beyond T, are zero vectors'."""
        block = np.zeros((len(wanted), size))
        real = wanted < rows
        block[real, :columns] = rows_of(wanted[real])
        return block

    partners = np.concatenate([permutation, np.full(size - rows, -1)])
    # Rows without a partner take the columns that are left.
    partners[partners < 0] = np.setdiff1d(np.arange(size), partners)
    sample = np.sort(np.random.default_rng(0).permutation(size)[:_SAMPLE])
    sampled_columns = partners[sample]
    pieces = np.split(sample, range(step, len(sample), step))
    among = np.concatenate([padded(piece)[:, sampled_columns] for piece in pieces])
    profits = (among - dual_prices(among, _SAMPLE_GAP, _BIDS_PER_ROW)).max(axis=1)
    prices = np.full(size, -np.inf)
    for start, piece in zip(range(0, len(sample), step), pieces, strict=True):
        # Made a second time: all rows of the sample at once would not be small.
        prices = np.maximum(prices, (padded(piece) - profits[start : start + len(piece), None]).max(axis=0))
    parts = np.split(np.arange(size), range(step, size, step))
    terms = np.concatenate([prices, *((padded(part) - prices).max(axis=1) for part in parts)])
    # The sum is exact; each subtraction and the sum itself are rounded once.
    return math.fsum(terms) + _ROUNDING * float(np.abs(terms).sum())
