"""Whatever holds real numbers -> tensors that can be computed with."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from rsm_probe.errors import MatchingError


def real_tensor(values: Tensor | np.ndarray) -> Tensor:
    """Values in float32 or float64, on the device they are on, without gradients.

    Raises:
        MatchingError: complex numbers, text or objects.
    """
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        if array.dtype.kind not in "fiub":
            raise MatchingError(f"expected real numbers, found dtype {array.dtype}")
        # PyTorch knows neither foreign byte orders nor negative strides.
        values = torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
    if values.is_complex():
        raise MatchingError(f"expected real numbers, found dtype {values.dtype}")
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


def rescaled(tokens: Tensor) -> tuple[Tensor, float]:
    """Tokens whose affinities neither overflow nor vanish in float32, and the unit to multiply them with.

    Scaling by powers of two changes no digit; tokens of ordinary size are returned as they are.
    """
    largest = float(tokens.abs().max())
    if not largest or 1e-15 < largest < 1e15:
        return tokens, 1.0
    unit = 2.0 ** math.frexp(largest)[1]
    return (tokens.double() / unit).to(tokens.dtype), unit
