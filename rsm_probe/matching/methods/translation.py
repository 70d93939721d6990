"""The best circular shift of the grid by FFT (Williams et al., "Generalized shape metrics", 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from rsm_probe.checks import brief, require_whole
from rsm_probe.errors import MatchingError
from rsm_probe.matching.matching import Locations, Matching, Pairs, Solution

# Bytes of the spectra of one block of images; two blocks exist at once.
_BLOCK_BYTES = 128 << 20


@dataclass(frozen=True)
class Translation(Matching):
    """Shift one image circularly along all axes of its grid.

    Attributes:
        grid: (H, W) of the locations in row-major order, (T, H, W) for videos, or (L,) for sequences. None uses the
            grid that the probe recorded. It is not guessed: 49 locations may be 7 x 7 or a sequence.
    """

    grid: tuple[int, ...] | None = None

    name: ClassVar[str] = "translation"
    symmetric: ClassVar[bool] = True
    needs_affinity: ClassVar[bool] = False
    growth: ClassVar[float] = 1.0
    at_once: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.grid is not None:
            # Stores identify the method by its repr, so lists and arrays must look the same there.
            object.__setattr__(self, "grid", checked_grid(self.grid))

    def reaches_identity(self, rows: int, columns: int) -> bool:
        """Always true: the zero shift is among the candidates."""
        return True

    def solve(self, pairs: Pairs) -> Solution:
        """Find the best shift of each pair.

        Raises:
            MatchingError: no grid, or two different grids.
        """
        x, y = pairs.images()
        grid = self._grid(x, y)
        axes = np.indices(grid)
        values, permutations = [], []
        for i, j in zip(pairs.rows, pairs.columns, strict=True):
            table = self._correlations(x.tokens[[i]], y.tokens[[j]], grid)[0, 0].cpu().numpy()
            shift = np.unravel_index(int(table.argmax()), grid)
            values.append(float(table[shift]))
            shifted = [(axis + by) % size for axis, by, size in zip(axes, shift, grid, strict=True)]
            permutations.append(np.ravel_multi_index(shifted, grid).ravel())
        return Solution.uncertified(np.array(values), np.stack(permutations), self.name)

    def products(self, x: Locations, y: Locations, *, block_bytes: int = _BLOCK_BYTES) -> np.ndarray:
        """Compute the best shift's inner product for all pairs, (N, M).

        Args:
            x: N images in the rows.
            y: M images in the columns, with equally many locations.
            block_bytes: bytes of the spectra of one block of images; two blocks exist at once.

        Raises:
            MatchingError: no grid, or two different grids.
        """
        grid = self._grid(x, y)
        step = max(1, block_bytes // (16 * x.count * max(x.tokens.shape[2], len(x), len(y))))
        best = np.empty((len(x), len(y)))
        for i in range(0, len(x), step):
            for j in range(0, len(y), step):
                table = self._correlations(x.tokens[i : i + step], y.tokens[j : j + step], grid)
                best[i : i + step, j : j + step] = table.flatten(2).amax(dim=2).cpu().numpy()
        return best

    def _correlations(self, x: Tensor, y: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Inner products under every shift, (N, M, *grid): location s of x against location s + shift of y."""
        device = torch.device("cpu") if x.device.type == "mps" else x.device
        along = tuple(range(2, 2 + len(grid)))
        # Flatten the frequencies, so that one batched product sums the channels of all of them.
        spectra = [
            torch.fft.rfftn(tokens.to(device, torch.float64).mT.unflatten(2, grid), dim=along) for tokens in (x, y)
        ]
        left, right = (spectrum.flatten(2).permute(2, 0, 1) for spectrum in spectra)
        cross = (left.conj() @ right.mT).permute(1, 2, 0).unflatten(2, spectra[0].shape[2:])
        return torch.fft.irfftn(cross, s=grid, dim=along)

    def _grid(self, x: Locations, y: Locations) -> tuple[int, ...]:
        grids = [self._grid_of(images) for images in (x, y)]
        if grids[0] != grids[1]:
            raise MatchingError(f"shifts need equal grids, found {' and '.join(map(str, sorted(grids)))}")
        return grids[0]

    def _grid_of(self, images: Locations) -> tuple[int, ...]:
        if images.count == 1 and self.grid is None:
            return (1,)  # one location shifts trivially
        known = self.grid if self.grid is not None else images.grid
        if known is None:
            raise MatchingError(
                f"translation shifts images along their grid, but the grid of these {images.count} locations is "
                f"unknown: use rsm_probe.matching.Translation(grid=(H, W)) as the matching; match and rsm also take "
                f"grid=(H, W)"
            )
        grid = checked_grid(known)
        if math.prod(grid) != images.count:
            raise MatchingError(f"a grid of {grid} does not hold {images.count} locations")
        return grid


def checked_grid(grid: Any) -> tuple[int, ...]:
    """Convert a grid, given as any sequence, to a tuple with the number of locations along each axis.

    Raises:
        MatchingError: anything but whole numbers above 0.
    """
    is_sequence = isinstance(grid, Sequence | np.ndarray) and not isinstance(grid, str | bytes)
    numbers = list(grid) if is_sequence and getattr(grid, "ndim", 1) != 0 else []
    if not numbers:
        raise MatchingError(f"a grid consists of whole numbers above 0, such as (H, W), found {brief(grid)}")
    for axis, number in enumerate(numbers):
        require_whole(number, f"axis {axis} of the grid", 1, MatchingError)
    return tuple(int(number) for number in numbers)
