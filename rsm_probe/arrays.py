"""Whatever holds real numbers -> dense arrays and tensors that can be computed with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsm_probe.errors import RsmProbeError


def require_dense(tensor: Tensor, name: str, error: type[RsmProbeError]) -> None:
    """Refuses tensors whose values cannot be read as a block of real numbers.

    Raises:
        RsmProbeError: of the given kind: nested, sparse, quantised, on the meta device, complex, or of fewer than 16 bits
            (float8). The message says how to convert it.
    """
    if tensor.is_nested:
        raise error(f"{name} is a nested tensor; give one of its parts, or torch.nested.to_padded_tensor(...)")
    if tensor.layout != torch.strided:
        raise error(f"{name} is sparse ({tensor.layout}); give .to_dense()")
    if tensor.is_meta:
        raise error(f"{name} is on the meta device and holds no values; give a tensor with data")
    if tensor.is_quantized:
        raise error(f"{name} is quantised ({tensor.dtype}); give .dequantize()")
    if tensor.is_complex():
        raise error(f"{name} holds complex numbers ({tensor.dtype}); give .real or .abs()")
    if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
        raise error(f"{name} holds {tensor.dtype}, in which nothing can be computed; give .float()")


def real_array(values: Any, name: str, error: type[RsmProbeError]) -> np.ndarray:
    """Real numbers as a NumPy array in this machine's byte order.

    Raises:
        RsmProbeError: of the given kind: not an array of real numbers of at most 64 bits.
    """
    if isinstance(values, Tensor):
        require_dense(values, name, error)
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as problem:
        raise error(f"{name} is not an array of numbers: {problem}") from None
    if array.dtype.kind == "c":
        raise error(f"{name} holds complex numbers ({array.dtype}); give .real or abs()")
    if array.dtype.kind not in "fiub":
        raise error(f"{name} must hold real numbers, found dtype {array.dtype}")
    if array.dtype.itemsize > 8:
        raise error(f"{name} holds {array.dtype}; give .astype(numpy.float64)")
    return np.asarray(array, dtype=array.dtype.newbyteorder("="))


def real_tensor(values: Any, name: str, error: type[RsmProbeError]) -> Tensor:
    """Values in float32, or in float64 where they need it, on the device they are on, without gradients.

    Raises:
        RsmProbeError: of the given kind; see `require_dense` and `real_array`.
    """
    if isinstance(values, Tensor):
        require_dense(values, name, error)
    else:
        # PyTorch knows no negative strides.
        values = torch.from_numpy(np.ascontiguousarray(real_array(values, name, error)))
    # float32 holds integers of 24 bits.
    wide = not values.is_floating_point() and values.dtype.itemsize > 2
    return values.detach().to(torch.promote_types(values.dtype, torch.float64 if wide else torch.float32))


def first_nonfinite(tokens: Tensor) -> int | None:
    """The first image of tokens (N, S, C) that holds NaN or infinity, or None."""
    # A finite sum has finite terms: one cheap pass. A sum may overflow, so others are looked at closely.
    if torch.isfinite(tokens.sum()):
        return None
    bad = (~torch.isfinite(tokens)).flatten(1).any(dim=1)
    return int(bad.nonzero()[0, 0]) if bool(bad.any()) else None
