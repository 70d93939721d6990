"""Conversion of array-likes of real numbers to dense arrays and tensors, and checks of matrices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsm_probe.errors import RsmProbeError

# Rounding error of zero distances in float32, relative to the largest distance.
_NOISE_OF_DISTANCES = 1e-3


def require_dense(tensor: Tensor, name: str, error: type[RsmProbeError]) -> None:
    """Refuse tensors that are not dense blocks of real numbers.

    Raises:
        RsmProbeError: of the given type, for tensors that are nested, sparse, quantised, complex, on the meta device or
            of fewer than 16 bits (float8). The message says how to convert them.
    """
    if tensor.is_nested:  # nested tensors have no layout to check
        raise error(f"{name} is a nested tensor; give one of its parts, or torch.nested.to_padded_tensor(...)")
    dtype = tensor.dtype
    for is_refused, problem in (
        (tensor.layout != torch.strided, f"is sparse ({tensor.layout}); give .to_dense()"),
        (tensor.is_meta, "is on the meta device and has no values; give a tensor with data"),
        (tensor.is_quantized, f"is quantised ({dtype}); give .dequantize()"),
        (dtype.is_complex, f"holds complex numbers ({dtype}); give .real or .abs()"),
        (
            dtype.is_floating_point and dtype.itemsize < 2,
            f"holds {dtype}, which does not support arithmetic; give .float()",
        ),
    ):
        if is_refused:
            raise error(f"{name} {problem}")


def real_array(values: Any, name: str, error: type[RsmProbeError]) -> np.ndarray:
    """Convert to a NumPy array of real numbers in native byte order.

    Raises:
        RsmProbeError: of the given type, unless the values form an array of real numbers of at most 64 bits.
    """
    if isinstance(values, Tensor):
        require_dense(values, name, error)
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if np.ma.is_masked(values):
        raise error(f"{name} is a masked array, whose masked entries would count as numbers; give .filled(...)")
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as problem:
        raise error(f"{name} is not an array of numbers: {problem}") from None
    if array.dtype.kind == "c":
        raise error(f"{name} holds complex numbers ({array.dtype}); give .real or abs()")
    if array.dtype.kind not in "fiub":
        hint = "; if all entries are numbers, give .astype(float)" if array.dtype.kind == "O" else ""
        raise error(f"{name} must hold real numbers, found dtype {array.dtype}{hint}")
    if array.dtype.itemsize > 8:
        raise error(f"{name} holds {array.dtype}; give .astype(numpy.float64)")
    return np.asarray(array, dtype=array.dtype.newbyteorder("="))


def real_tensor(values: Any, name: str, error: type[RsmProbeError]) -> Tensor:
    """Convert to a detached tensor in float32, or in float64 where the values need it, on their device.

    Raises:
        RsmProbeError: of the given type; see `require_dense` and `real_array`.
    """
    if isinstance(values, Tensor):
        require_dense(values, name, error)
    else:
        # PyTorch does not support negative strides.
        values = torch.from_numpy(np.ascontiguousarray(real_array(values, name, error)))
    # float32 represents integers of up to 24 bits exactly.
    wide = not values.is_floating_point() and values.dtype.itemsize > 2
    return values.detach().to(torch.promote_types(values.dtype, torch.float64 if wide else torch.float32))


def real_matrix(values: Any, name: str, error: type[RsmProbeError]) -> np.ndarray:
    """Convert to a float64 matrix; always a copy.

    Raises:
        RsmProbeError: of the given type; see `real_array`. Tables with labels get a message of their own.
    """
    if hasattr(values, "columns") and hasattr(values, "index"):
        raise error(
            f"{name} is a table ({type(values).__name__}), whose labels would be lost; give "
            "RSM.from_array(table.to_numpy(), ids=[*table.index])"
        )
    return real_array(values, name, error).astype(np.float64)


def images_of_pairs(pairs: int) -> int | None:
    """The number of images N that form this many pairs, N (N - 1) / 2; None if no number does."""
    images = (1 + math.isqrt(1 + 8 * pairs)) // 2
    return images if pairs > 0 and images * (images - 1) == 2 * pairs else None


def condensed_hint(array: np.ndarray) -> str:
    """Return the end of an error message if a vector looks like a condensed matrix, otherwise an empty text."""
    if array.ndim != 1 or (count := images_of_pairs(array.size)) is None:
        return ""
    return (
        f"; if it holds the pairs of {count} images, scipy.spatial.distance.squareform makes a matrix of it, and "
        "RSM.from_array(squareform(vector), ids, kind='distance') makes an RSM of distances"
    )


def require_symmetric(matrix: np.ndarray, name: str, error: type[RsmProbeError]) -> None:
    """Refuse matrices (N, N) that are not symmetric up to rounding; NaN must be symmetric, too.

    Raises:
        RsmProbeError: of the given type. The message says how to make the matrix symmetric.
    """
    largest = np.fmax.reduce(np.abs(matrix), axis=None, initial=0.0)
    alike = np.isclose(matrix, matrix.T, rtol=1e-6, atol=1e-9 * largest, equal_nan=True)
    if alike.all():
        return
    row, column = np.argwhere(~alike)[0]
    if np.isnan(matrix[~alike]).any():
        advice = "if each pair is known in one half at least, numpy.fmax(m, m.T) fills the other"
    elif not np.tril(matrix, -1).any() or not np.triu(matrix, 1).any():
        advice = "one half is empty: give m + m.T, with the diagonal counted once"
    else:
        advice = "(m + m.T) / 2 averages the two halves"
    raise error(
        f"{name} is not symmetric, but similarities within one set of images are: it holds {matrix[row, column]:.6g} "
        f"in row {row}, column {column} and {matrix[column, row]:.6g} in row {column}, column {row}; {advice}"
    )


def require_similarities(matrix: np.ndarray, name: str, error: type[RsmProbeError]) -> None:
    """Refuse matrices (N, N) that look like distances: every image is least similar to itself.

    Kernels never give such similarities, because an entry cannot exceed both self-similarities. NaN says nothing.

    Raises:
        RsmProbeError: of the given type. The message says how to pass distances, and how to override the check.
    """
    noise = _NOISE_OF_DISTANCES * np.fmax.reduce(np.abs(matrix), axis=None, initial=0.0)
    own = np.fmax.reduce(np.abs(np.diagonal(matrix)), initial=0.0)
    if noise and own <= noise and np.fmin.reduce(matrix, axis=None) >= -noise:
        raise error(
            f"{name} looks like a matrix of distances: zeros on the diagonal, nothing negative. To compare distances, "
            "give RSM.from_array(values, ids, kind='distance'), or -values; if larger values mean more alike, give "
            "RSM.from_array(values, ids, kind='similarity')"
        )


def require_distances(matrix: np.ndarray, name: str, error: type[RsmProbeError], *, named: bool = False) -> None:
    """Refuse matrices (N, N) that look like similarities: a diagonal that is not 0 up to rounding, or nothing positive.

    Args:
        matrix: the distances. Estimates may be negative in places.
        name: name of the matrix, for the message.
        error: type of the error to raise.
        named: the user said which distances they are, such as estimates that may all be negative.

    Raises:
        RsmProbeError: of the given type. The message says how to pass similarities.
    """
    if not named and np.fmax.reduce(matrix, axis=None) <= 0 and np.fmin.reduce(matrix, axis=None) < 0:
        raise error(
            f"{name} holds nothing positive, so it looks like negated distances: give -values, or give the values "
            "without kind='distance'; estimates that all fell below 0 need a name, such as dissimilarity='crossnobis'"
        )
    own = np.fmax.reduce(np.abs(np.diagonal(matrix)), initial=0.0)
    if own > _NOISE_OF_DISTANCES * np.fmax.reduce(np.abs(matrix), axis=None, initial=0.0):
        raise error(
            f"{name} holds up to {own:.3g} on its diagonal, but the distance of an image from itself is 0; "
            "give similarities without kind='distance'"
        )


def first_nonfinite(tokens: Tensor) -> int | None:
    """Return the first image of tokens (N, S, C) that contains NaN or infinity, or None."""
    # A finite sum implies finite terms: one cheap pass. Only an infinite sum needs a closer look, as it may overflow.
    if torch.isfinite(tokens.sum()):
        return None
    bad = (~torch.isfinite(tokens)).flatten(1).any(dim=1)
    return int(bad.nonzero()[0, 0]) if bool(bad.any()) else None
