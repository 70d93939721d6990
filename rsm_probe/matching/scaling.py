"""Scaling of tokens, so that their affinities neither overflow nor underflow."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rsm_probe.errors import MatchingError

# Scale the largest token to this in half precision: close to the maximum, so that small tokens keep their digits.
_LARGEST_HALF = 2.0**15


def each_rescaled(tokens: Tensor) -> tuple[Tensor, np.ndarray]:
    """Scale tokens (N, S, C) so that their affinities neither overflow nor underflow in float32.

    Each image has its own unit, because a common one would let small images beside a large one underflow. Units are
    powers of two, which changes no digit. Images of ordinary size keep a unit of 1; if all do, the tokens are returned
    as they are. Locations far smaller than the largest of their image may still underflow, which loses less than 1e-14
    of the norms.

    Returns:
        The scaled tokens, and the units (N,) to multiply them by.

    Raises:
        MatchingError: the squared tokens of an image do not fit into float64.
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
    # In float64, because the reciprocals of the smallest units exceed float32.
    parts = tokens[numbers].double() / torch.from_numpy(units[extreme]).to(tokens.device)[:, None, None]
    return tokens.index_copy(0, numbers, parts.to(tokens.dtype)), units


def in_half_precision(tokens: Tensor) -> tuple[Tensor, np.ndarray]:
    """Round tokens (N, S, C) to float16 with one unit per image, (N,), a power of two.

    CUDA devices multiply float16 tokens and sum in float32. Elsewhere, the rounded tokens keep their original dtype.
    """
    largest = _largest(tokens)
    units = np.where(largest > 0, np.exp2(np.frexp(largest / _LARGEST_HALF)[1].astype(np.float64)), 1.0)
    half = (tokens / torch.from_numpy(units).to(tokens)[:, None, None]).to(torch.float16)
    return half if tokens.is_cuda else half.to(tokens.dtype), units


def _largest(tokens: Tensor) -> np.ndarray:
    """The largest magnitude of each image, (N,), float64."""
    # In memory order, and without allocating the magnitudes.
    in_order = tokens if tokens.stride(1) >= tokens.stride(2) else tokens.mT
    ends = torch.maximum(in_order.amax(dim=(1, 2)), -in_order.amin(dim=(1, 2)))
    return ends.cpu().numpy().astype(np.float64)
