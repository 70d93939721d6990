"""Whatever holds real numbers -> dense arrays and tensors that can be computed with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsm_probe.errors import RsmProbeError

# What rounding in float32 leaves of distances that are 0, relative to the largest one.
_NOISE_OF_DISTANCES = 1e-3


def require_dense(tensor: Tensor, name: str, error: type[RsmProbeError]) -> None:
    """Refuses tensors whose values cannot be read as a block of real numbers.

    Raises:
        RsmProbeError: of the given kind: nested, sparse, quantised, on the meta device, complex, or of fewer than 16
            bits (float8). The message says how to convert it.
    """
    if tensor.is_nested:  # which has no layout to ask for
        raise error(f"{name} is a nested tensor; give one of its parts, or torch.nested.to_padded_tensor(...)")
    dtype = tensor.dtype
    for is_refused, problem in (
        (tensor.layout != torch.strided, f"is sparse ({tensor.layout}); give .to_dense()"),
        (tensor.is_meta, "is on the meta device and holds no values; give a tensor with data"),
        (tensor.is_quantized, f"is quantised ({dtype}); give .dequantize()"),
        (dtype.is_complex, f"holds complex numbers ({dtype}); give .real or .abs()"),
        (
            dtype.is_floating_point and dtype.itemsize < 2,
            f"holds {dtype}, in which nothing can be computed; give .float()",
        ),
    ):
        if is_refused:
            raise error(f"{name} {problem}")


def real_array(values: Any, name: str, error: type[RsmProbeError]) -> np.ndarray:
    """Real numbers as a NumPy array in this machine's byte order.

    Raises:
        RsmProbeError: of the given kind: not an array of real numbers of at most 64 bits.
    """
    if isinstance(values, Tensor):
        require_dense(values, name, error)
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if np.ma.is_masked(values):
        raise error(f"{name} is a masked array, and what is masked would be taken for numbers; give .filled(...)")
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as problem:
        raise error(f"{name} is not an array of numbers: {problem}") from None
    if array.dtype.kind == "c":
        raise error(f"{name} holds complex numbers ({array.dtype}); give .real or abs()")
    if array.dtype.kind not in "fiub":
        hint = "; if all of it are numbers, give .astype(float)" if array.dtype.kind == "O" else ""
        raise error(f"{name} must hold real numbers, found dtype {array.dtype}{hint}")
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


def real_matrix(values: Any, name: str, error: type[RsmProbeError]) -> np.ndarray:
    """Real numbers as a matrix in float64; a copy.

    Raises:
        RsmProbeError: of the given kind; see `real_array`. Tables with labels get a message of their own.
    """
    if hasattr(values, "columns") and hasattr(values, "index"):
        raise error(
            f"{name} is a table ({type(values).__name__}), whose labels would be lost; give "
            "RSM.from_array(table.to_numpy(), ids=[*table.index])"
        )
    return real_array(values, name, error).astype(np.float64)


def condensed_hint(array: np.ndarray) -> str:
    """The end of a message about a vector that holds the pairs of a matrix, or nothing."""
    count = math.isqrt(2 * array.size) + 1
    if array.ndim != 1 or not array.size or count * (count - 1) != 2 * array.size:
        return ""
    return (
        f"; of the pairs of {count} images, scipy.spatial.distance.squareform makes a matrix, and of distances "
        "RSM.from_array(squareform(vector), ids, kind='distance') an RSM"
    )


def require_symmetric(matrix: np.ndarray, name: str, error: type[RsmProbeError]) -> None:
    """Refuses matrices (N, N) that do not relate images of one set, up to rounding.

    Raises:
        RsmProbeError: of the given kind.
    """
    if not np.allclose(matrix, matrix.T, rtol=1e-6, atol=1e-9 * np.abs(matrix).max(initial=0.0)):
        raise error(f"{name} is not symmetric, as similarities within one set of images are")


def require_similarities(matrix: np.ndarray, name: str, error: type[RsmProbeError]) -> None:
    """Refuses matrices (N, N) in which every image is least like itself: these are distances.

    Similarities that a kernel gives are never like that, as an entry cannot exceed both of its images' own.

    Raises:
        RsmProbeError: of the given kind. The message says how to compare distances, and how to insist.
    """
    noise = _NOISE_OF_DISTANCES * np.abs(matrix).max(initial=0.0)
    if noise and np.abs(np.diagonal(matrix)).max() <= noise and matrix.min() >= -noise:
        raise error(
            f"{name} looks like a matrix of distances: zeros on the diagonal, nothing negative. To compare distances, "
            "give RSM.from_array(values, ids, kind='distance'), or -values; if larger values mean more alike, insist "
            "by RSM.from_array(values, ids, kind='similarity')"
        )


def require_distances(matrix: np.ndarray, name: str, error: type[RsmProbeError]) -> None:
    """Refuses matrices (N, N) with anything but 0 on the diagonal, up to rounding. Estimates may be negative elsewhere.

    Raises:
        RsmProbeError: of the given kind.
    """
    own = np.abs(np.diagonal(matrix)).max(initial=0.0)
    if own > _NOISE_OF_DISTANCES * np.abs(matrix).max(initial=0.0):
        raise error(
            f"{name} holds up to {own:.3g} on its diagonal, and the distance of an image from itself is 0; "
            "similarities are given without kind='distance'"
        )


def first_nonfinite(tokens: Tensor) -> int | None:
    """The first image of tokens (N, S, C) that holds NaN or infinity, or None."""
    # A finite sum has finite terms: one cheap pass. A sum may overflow, so others are looked at closely.
    if torch.isfinite(tokens.sum()):
        return None
    bad = (~torch.isfinite(tokens)).flatten(1).any(dim=1)
    return int(bad.nonzero()[0, 0]) if bool(bad.any()) else None
