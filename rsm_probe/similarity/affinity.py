"""Blocks of tokens -> inner products between all pairs of locations, on the device that holds the tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

# Bytes of one block of affinities. It is a constant, not derived from workers or memory, so that the shapes of
# the matrix products, and with them the last bits of the results, never depend on the machine's load.
BLOCK_BYTES = 8 << 20


def pairs_per_block(x: Tensor, y: Tensor) -> int:
    """How many affinities (S, T) make one block; at least 1."""
    return max(1, BLOCK_BYTES // (x.shape[1] * y.shape[1] * x.element_size()))


def block_slices(x: Tensor, y: Tensor, diagonal: bool = False) -> Iterator[tuple[slice, int]]:
    """Which pairs the blocks hold: all pairs, or those below the diagonal (with it, if asked) where x is y."""
    step = pairs_per_block(x, y)
    for column in range(y.shape[0]):
        first = column + (not diagonal) if y is x else 0
        for start in range(first, x.shape[0], step):
            yield slice(start, min(start + step, x.shape[0])), column


def affinity_block(x: Tensor, y: Tensor, rows: slice, column: int) -> np.ndarray:
    """One matrix product: the locations of several images against those of one (paper, equation 5).

    Args:
        x: tokens (N, S, C), contiguous.
        y: tokens (M, T, C), contiguous.
        rows: images of x.
        column: image of y.

    Returns:
        Shape (rows, S, T), on the CPU.
    """
    return torch.matmul(x[rows], y[column].T).cpu().numpy()


def pair_affinities(x: Tensor, y: Tensor, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The locations of images of x against those of single images of y.

    Args:
        x: tokens (N, S, C), contiguous.
        y: tokens (M, T, C), contiguous.
        rows: (B,), images of x.
        columns: (B,), images of y.

    Returns:
        Shape (B, S, T), on the CPU.
    """
    numbers = (torch.from_numpy(part).to(x.device) for part in (rows, columns))
    left, right = (tokens[number] for tokens, number in zip((x, y), numbers, strict=True))
    return torch.bmm(left, right.mT).cpu().numpy()
