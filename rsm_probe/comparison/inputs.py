"""Checks of RSMs before they are compared."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from rsm_probe.arrays import condensed_hint, real_matrix, require_similarities, require_symmetric
from rsm_probe.checks import require_flag
from rsm_probe.errors import ComparisonError

# An RSM is constant up to float32 rounding if centring leaves less than this share of its squared norm.
CONSTANT = 1e-14


def stack_rsms(rsms: Sequence[Any], names: Sequence[str], *, skip_missing: bool = False) -> np.ndarray:
    """Stack RSMs over the same images into one array.

    Args:
        rsms: symmetric arrays (N, N) of similarities, or `RSM`s with equal image ids.
        names: names of the RSMs, for messages.
        skip_missing: accept NaN. A pair that any RSM misses becomes NaN in all of them, so that all values of a
            comparison rest on the same pairs.

    Returns:
        Shape (R, N, N), float64.

    Raises:
        ComparisonError: no RSM, different shapes, images or orders, an asymmetric matrix, values that are not real or
            not finite, arrays that look like distances, or no pair that is known in all RSMs.
    """
    require_flag(skip_missing, "skip_missing", ComparisonError)
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
                    f"{position}: {' and '.join('none' if image is None else repr(image) for image in images)}; "
                    "k.align(l) cuts two RSMs to the images of both, and compare(..., on='intersection') all of them"
                )
        array = real_matrix(rsm, f"the {name} RSM", ComparisonError)
        if array.ndim != 2 or array.shape[0] != array.shape[1]:
            raise ComparisonError(
                f"the {name} RSM has shape {array.shape}; only square matrices (N, N) can be compared"
                f"{condensed_hint(array)}"
            )
        bad = np.isinf(array) if skip_missing else ~np.isfinite(array)
        if bad.any():
            row, column = np.argwhere(bad)[0]
            advice = (
                "; compare(..., skip_missing=True) leaves out missing pairs" if np.isnan(array[row, column]) else ""
            )
            raise ComparisonError(f"the {name} RSM holds {array[row, column]} for images {row} and {column}{advice}")
        require_symmetric(array, f"the {name} RSM", ComparisonError)
        if ids is None:  # an `RSM` object was checked when it was created
            require_similarities(array, f"the {name} RSM", ComparisonError)
        if arrays and array.shape != arrays[0].shape:
            raise ComparisonError(
                f"the {names[0]} and the {name} RSM hold {len(arrays[0])} and {len(array)} images; compare RSMs of the "
                "same images"
            )
        arrays.append(array)
    stack = np.stack(arrays)
    if (known := known_pairs(stack)) is None:
        return stack
    if not np.triu(known, 1).any():
        pairs_of = [
            f"{name}: {len(a) * (len(a) - 1) // 2 - lost_pairs(a)} of {len(a) * (len(a) - 1) // 2}"
            for name, a in list(zip(names, arrays, strict=True))[:5]
        ]
        raise ComparisonError(
            f"no pair of images is known in all RSMs ({', '.join(pairs_of)}); compare fewer RSMs at once"
        )
    return np.where(known, stack, np.nan)


def known_pairs(*stacks: np.ndarray) -> np.ndarray | None:
    """Which entries (N, N) no RSM of some stacks (R, N, N) misses; None if nothing is missing."""
    if not any(holds_nan(stack) for stack in stacks):
        return None
    known = ~np.logical_or.reduce([np.isnan(stack).any(axis=0) for stack in stacks])
    return None if known.all() else known


def holds_nan(array: np.ndarray) -> bool:
    """Whether an array holds NaN, in one pass without a temporary array: the minimum then is NaN."""
    return array.dtype.kind == "f" and array.size > 0 and bool(np.isnan(array.min()))


def lost_pairs(rsm: np.ndarray) -> int:
    """Number of pairs of different images that an RSM (N, N) misses."""
    return int(np.isnan(rsm[np.triu_indices(len(rsm), 1)]).sum())


def in_range(rsms: np.ndarray) -> np.ndarray:
    """Divide RSMs by their largest entry if their squares would overflow or underflow."""
    largest = np.abs(rsms).max(axis=(1, 2), initial=0.0)
    if np.isnan(largest).any():
        largest = np.fmax.reduce(np.abs(rsms), axis=(1, 2), initial=0.0)
    if ((largest == 0) | ((largest > 1e-100) & (largest < 1e100))).all():
        return rsms
    return rsms / np.where(largest > 0, largest, 1.0)[:, None, None]
