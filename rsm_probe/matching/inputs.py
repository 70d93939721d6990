"""Whatever holds real numbers -> tensors that can be computed with."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from rsm_probe.errors import MatchingError

# The largest token in half precision: as large as it holds, so that small tokens keep their digits.
_LARGEST_HALF = 2.0**15


def real_tensor(values: Tensor | np.ndarray) -> Tensor:
    """Values in float32, or in float64 where they need it, on the device they are on, without gradients.

    Raises:
        MatchingError: complex numbers, text or objects.
    """
    if not isinstance(values, Tensor):
        try:
            array = np.asarray(values)
        except ValueError as error:
            raise MatchingError(f"expected an array of numbers: {error}") from None
        if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
            raise MatchingError(f"expected real numbers, found dtype {array.dtype}")
        # PyTorch knows neither foreign byte orders nor negative strides.
        values = torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
    if values.is_complex():
        raise MatchingError(f"expected real numbers, found dtype {values.dtype}")
    # float32 holds integers of 24 bits.
    wide = not values.is_floating_point() and values.dtype.itemsize > 2
    return values.detach().to(torch.promote_types(values.dtype, torch.float64 if wide else torch.float32))


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


def first_nonfinite(tokens: Tensor) -> int | None:
    """The first image of tokens (N, S, C) that holds NaN or infinity, or None."""
    # A finite sum has finite terms: one cheap pass. A sum may overflow, so others are looked at closely.
    if torch.isfinite(tokens.sum()):
        return None
    bad = (~torch.isfinite(tokens)).flatten(1).any(dim=1)
    return int(bad.nonzero()[0, 0]) if bool(bad.any()) else None
