"""Tokens scaled so that their affinities neither overflow nor vanish."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rsm_probe.errors import MatchingError

# The largest token in half precision: as large as it holds, so that small tokens keep their digits.
_LARGEST_HALF = 2.0**15


def each_rescaled(tokens: Tensor) -> tuple[Tensor, np.ndarray]:
    """Tokens (N, S, C) whose affinities neither overflow nor vanish in float32, and the units (N,) of the images.

    Each image has its own unit: one for the whole set would let the small images beside a large one vanish. Scaling by
    powers of two changes no digit. Images of ordinary size keep a unit of 1, and a set of such images is returned as it
    is. Locations far smaller than the largest of their own image may still vanish: less than 1e-14 of the norms.

    Raises:
        MatchingError: the squares of the tokens of an image do not fit into 64 bits.
    """
    largest = _largest(tokens)
    units = np.ones(len(largest))
    extreme = np.flatnonzero((largest > 0) & ~((largest > 1e-15) & (largest < 1e15)))
    if not len(extreme):
        return tokens, units
    beyond = extreme[~((largest[extreme] > 1e-150) & (largest[extreme] < 1e150))]
    if len(beyond):
        raise MatchingError(
            f"the largest token of image {beyond[0]} is {largest[beyond[0]]:.3g}; scale tokens to between 1e-150 and "
            f"1e150"
        )
    units[extreme] = np.exp2(np.frexp(largest[extreme])[1].astype(np.float64))
    numbers = torch.from_numpy(extreme).to(tokens.device)
    # In float64: the reciprocals of the smallest units are beyond float32.
    parts = tokens[numbers].double() / torch.from_numpy(units[extreme]).to(tokens.device)[:, None, None]
    return tokens.index_copy(0, numbers, parts.to(tokens.dtype)), units


def in_half_precision(tokens: Tensor) -> tuple[Tensor, np.ndarray]:
    """Tokens (N, S, C) rounded to float16, and the units (N,) of the images, powers of two.

    CUDA devices multiply them as they are, and add up in float32. Others get the same numbers in their former type.
    """
    largest = _largest(tokens)
    units = np.where(largest > 0, np.exp2(np.frexp(largest / _LARGEST_HALF)[1].astype(np.float64)), 1.0)
    half = (tokens / torch.from_numpy(units).to(tokens)[:, None, None]).to(torch.float16)
    return half if tokens.is_cuda else half.to(tokens.dtype), units


def _largest(tokens: Tensor) -> np.ndarray:
    """The largest magnitude of every image (N,), float64."""
    # As the tokens lie in memory, and without a tensor of magnitudes.
    in_order = tokens if tokens.stride(1) >= tokens.stride(2) else tokens.mT
    ends = torch.maximum(in_order.amax(dim=(1, 2)), -in_order.amin(dim=(1, 2)))
    return ends.cpu().numpy().astype(np.float64)
