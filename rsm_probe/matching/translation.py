"""The best circular shift of the grid (Williams et al., "Generalized shape metrics", 2021), by Fourier transform."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rsm_probe.errors import MatchingError
from rsm_probe.matching.protocol import Locations, Matching, Pairs, Solution

# Bytes of the spectra of a block of images; those of two blocks exist at once.
_BLOCK_BYTES = 128 << 20


@dataclass(frozen=True)
class Translation(Matching):
    """One image is shifted along both axes of its grid, what leaves on one side returns on the other.

    Attributes:
        grid: (H, W) of the locations, row by row. None for the grid that a probe found, or else for a square.
    """

    grid: tuple[int, int] | None = None

    name: ClassVar[str] = "translation"
    exact: ClassVar[bool] = False
    symmetric: ClassVar[bool] = True
    needs_affinity: ClassVar[bool] = False
    growth: ClassVar[float] = 1.0
    at_once: ClassVar[bool] = True

    def solve(self, pairs: Pairs) -> Solution:
        """Finds the best shift of every pair.

        Raises:
            MatchingError: no grid, or two different ones.
        """
        x, y = pairs.images()
        height, width = self._grid(x, y)
        rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
        values, found = [], []
        for i, j in zip(pairs.rows, pairs.columns, strict=True):
            table = self._correlations(x.tokens[[i]], y.tokens[[j]], (height, width))[0, 0]
            down, right = np.unravel_index(int(table.argmax()), table.shape)
            values.append(float(table[down, right]))
            found.append((((rows + down) % height) * width + (columns + right) % width).ravel())
        return Solution(np.array(values), np.stack(found), np.full(len(found), np.nan), [self.name] * len(found))

    def products(self, x: Locations, y: Locations) -> np.ndarray:
        """The best shift's inner product of all pairs, (N, M).

        Raises:
            MatchingError: no grid, or two different ones.
        """
        grid = self._grid(x, y)
        step = max(1, _BLOCK_BYTES // (16 * x.count * max(x.tokens.shape[2], len(x), len(y))))
        best = np.empty((len(x), len(y)))
        for i in range(0, len(x), step):
            for j in range(0, len(y), step):
                table = self._correlations(x.tokens[i : i + step], y.tokens[j : j + step], grid)
                best[i : i + step, j : j + step] = table.amax(dim=(2, 3)).cpu().numpy()
        return best

    def _correlations(self, x: Tensor, y: Tensor, grid: tuple[int, int]) -> Tensor:
        """Inner products under every shift, (N, M, H, W): location s of x with location s + shift of y."""
        device = torch.device("cpu") if x.device.type == "mps" else x.device
        spectra = [
            torch.fft.rfft2(tokens.to(device, torch.float64).mT.unflatten(2, grid)).permute(2, 3, 0, 1)
            for tokens in (x, y)
        ]
        cross = spectra[0].conj() @ spectra[1].mT
        return torch.fft.irfft2(cross.permute(2, 3, 0, 1), s=grid)

    def _grid(self, x: Locations, y: Locations) -> tuple[int, int]:
        grids = {_checked(self.grid or images.grid or _square(images.count)) for images in (x, y)}
        if len(grids) > 1:
            raise MatchingError(f"shifts need equal grids, found {' and '.join(map(str, sorted(grids)))}")
        (grid,) = grids
        for images in (x, y):
            if math.prod(grid) != images.count:
                raise MatchingError(f"a grid of {grid} does not hold {images.count} locations")
        return grid


def _checked(grid: Sequence[int]) -> tuple[int, int]:
    """A grid of two whole numbers above 0, whatever sequence holds them."""
    numbers = tuple(grid) if isinstance(grid, Sequence | np.ndarray) else ()
    if len(numbers) != 2 or any(int(number) != number or number < 1 for number in numbers):
        raise MatchingError(f"a grid is two whole numbers (H, W) above 0, found {grid}")
    return int(numbers[0]), int(numbers[1])


def _square(count: int) -> tuple[int, int]:
    side = math.isqrt(count)
    if side * side != count:
        raise MatchingError(
            f"{count} locations form no square, so their grid is not known; give Translation(grid=(H, W))"
        )
    return side, side
