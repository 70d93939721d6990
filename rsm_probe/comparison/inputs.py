"""Checks of RSMs before they are compared."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from rsm_probe.arrays import condensed_hint, real_matrix, require_similarities, require_symmetric
from rsm_probe.errors import ComparisonError

# An RSM is constant up to float32 rounding if centring leaves less than this share of its squared norm.
CONSTANT = 1e-14


def stack_rsms(rsms: Sequence[Any], names: Sequence[str]) -> np.ndarray:
    """Stack RSMs over the same images into one array.

    Args:
        rsms: symmetric arrays (N, N) of similarities, or `RSM`s with equal image ids.
        names: names of the RSMs, for messages.

    Returns:
        Shape (R, N, N), float64.

    Raises:
        ComparisonError: no RSM, different shapes, images or orders, an asymmetric matrix, values that are not real or
            not finite, or arrays that look like distances.
    """
    if not len(rsms):
        raise ComparisonError("there is no RSM to compare")
    reference: tuple[str, list[str]] | None = None
    arrays: list[np.ndarray] = []
    for rsm, name in zip(rsms, names, strict=True):
        ids = getattr(rsm, "ids", None)
        if ids is not None:
            reference = reference or (name, ids)
            if reference[1] != ids:
                pairs = enumerate(zip_longest(reference[1], ids))
                position, images = next((k, images) for k, images in pairs if images[0] != images[1])
                raise ComparisonError(
                    f"the {reference[0]} and the {name} RSM hold different images or another order, first at position "
                    f"{position}: " + " and ".join("none" if image is None else repr(image) for image in images)
                )
        array = real_matrix(rsm, f"the {name} RSM", ComparisonError)
        if array.ndim != 2 or array.shape[0] != array.shape[1]:
            raise ComparisonError(
                f"the {name} RSM has shape {array.shape}; only square matrices (N, N) can be compared"
                f"{condensed_hint(array)}"
            )
        if not np.isfinite(array).all():
            row, column = np.argwhere(~np.isfinite(array))[0]
            raise ComparisonError(f"the {name} RSM holds {array[row, column]} for images {row} and {column}")
        require_symmetric(array, f"the {name} RSM", ComparisonError)
        if ids is None:  # an `RSM` object was checked when it was created
            require_similarities(array, f"the {name} RSM", ComparisonError)
        if arrays and array.shape != arrays[0].shape:
            raise ComparisonError(
                f"the {names[0]} and the {name} RSM hold {len(arrays[0])} and {len(array)} images; compare RSMs of the "
                "same images"
            )
        arrays.append(array)
    return np.stack(arrays)


def in_range(rsms: np.ndarray) -> np.ndarray:
    """Divide RSMs by their largest entry if their squares would overflow or underflow."""
    largest = np.abs(rsms).max(axis=(1, 2), initial=0.0)
    if ((largest == 0) | ((largest > 1e-100) & (largest < 1e100))).all():
        return rsms
    return rsms / np.where(largest > 0, largest, 1.0)[:, None, None]
