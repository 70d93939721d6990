"""Tokens scaled so that their affinities neither overflow nor vanish."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rsm_probe.errors import MatchingError

# The largest token in half precision: as large as it holds, so that small tokens keep their digits.
_LARGEST_HALF = 2.0**15


def rescaled(tokens: Tensor) -> tuple[Tensor, float]:
    """Tokens whose affinities neither overflow nor vanish in float32, and the unit to multiply them with.

    Scaling by powers of two changes no digit; tokens of ordinary size are returned as they are.

    Raises:
        MatchingError: the squares of the tokens are no numbers of 64 bits.
    """
    # Least and largest in one pass over memory as it lies, without a tensor of magnitudes.
    in_order = tokens.permute(sorted(range(tokens.ndim), key=tokens.stride, reverse=True))
    largest = max(abs(float(end)) for end in torch.aminmax(in_order))
    if not largest or 1e-15 < largest < 1e15:
        return tokens, 1.0
    if not 1e-150 < largest < 1e150:
        raise MatchingError(f"the largest token is {largest:.3g}; scale tokens to between 1e-150 and 1e150")
    unit = 2.0 ** math.frexp(largest)[1]
    return (tokens.double() / unit).to(tokens.dtype), unit


def in_half_precision(tokens: Tensor) -> tuple[Tensor, float]:
    """Tokens rounded to float16, and the unit to multiply them with, a power of two.

    CUDA devices multiply them as they are, and add up in float32. Others get the same numbers in their former type.
    """
    largest = max(abs(float(end)) for end in torch.aminmax(tokens))
    unit = 2.0 ** math.frexp(largest / _LARGEST_HALF)[1] if largest else 1.0
    half = (tokens / unit).to(torch.float16)
    return half if tokens.is_cuda else half.to(tokens.dtype), unit
