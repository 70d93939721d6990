"""Feature vectors from tokens, and checks of features."""

from __future__ import annotations

from typing import Any

import numpy as np

from rsm_probe.arrays import real_array
from rsm_probe.checks import require_seed, require_whole
from rsm_probe.errors import ComparisonError


def pooled(tokens: Any) -> np.ndarray:
    """Average tokens (N, S, C) over locations: (N, C), float64.

    Raises:
        ComparisonError: wrong shape or non-finite values.
    """
    return finite_array(tokens, "the tokens", "(N, S, C)").mean(axis=1)


def sampled(tokens: Any, count: int, seed: int = 0) -> np.ndarray:
    """Sample `count` of all N * S tokens (N, S, C): (count, C), float64.

    The same seed selects the same locations of the same images, so that representations of equal S can be compared.

    Raises:
        ComparisonError: wrong shape, non-finite values, or fewer than `count` tokens.
    """
    values = finite_array(tokens, "the tokens", "(N, S, C)")
    rows = values.reshape(-1, values.shape[2])
    require_whole(count, "count", 1, ComparisonError)
    require_seed(seed, "seed", ComparisonError)
    if count > len(rows):
        raise ComparisonError(f"there are {len(rows)} tokens, from which {count} cannot be sampled")
    return rows[np.sort(np.random.default_rng(seed).choice(len(rows), count, replace=False))]


def finite_array(values: Any, name: str, shape: str) -> np.ndarray:
    """Convert to float64, with as many axes as the expected shape, such as "(N, S, C)".

    Raises:
        ComparisonError: wrong shape, values that are not real numbers, or NaN or infinity.
    """
    array = real_array(values, name, ComparisonError).astype(np.float64)
    if array.ndim != shape.count(",") + 1 or 0 in array.shape:
        hint = "; of tokens (N, S, C), take pooled(tokens) or sampled(tokens, count)" if array.ndim == 3 else ""
        raise ComparisonError(f"{name} have shape {array.shape}; expected {shape}{hint}")
    if not np.isfinite(array).all():
        image = int(np.argwhere(~np.isfinite(array))[0, 0])
        raise ComparisonError(f"{name} hold NaN or infinity, first in image {image}")
    return array
