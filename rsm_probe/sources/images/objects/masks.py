"""Boxes around the segmentations of COCO: polygons, and masks encoded by the lengths of their runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Runs as text: each character holds five bits above this code, and a sixth that says whether more follow.
_FIRST_CODE, _BITS = 48, 5
_MORE, _SIGN, _VALUE = 1 << _BITS, 1 << (_BITS - 1), (1 << _BITS) - 1


def box_of_segmentation(segmentation: Any) -> tuple[float, float, float, float] | None:
    """The box around a segmentation.

    Args:
        segmentation: a list of polygons [x1, y1, x2, y2, ...], or a mapping with the `size` (height, width) of the
            mask and the lengths of its runs, `counts`, as a list of numbers or as compressed text.

    Returns:
        Left, top, right and bottom in pixels; None if it covers no pixel.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(segmentation, Mapping):
        return _box_of_runs(segmentation)
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str | bytes):
        raise ValueError("a segmentation is a list of polygons, or a mapping with size and counts")
    polygons = [segmentation] if segmentation and not isinstance(segmentation[0], Sequence) else segmentation
    numbers = [np.asarray(polygon, dtype=np.float64) for polygon in polygons if len(polygon)]
    if not numbers:
        return None
    if any(polygon.ndim != 1 or len(polygon) % 2 or not np.isfinite(polygon).all() for polygon in numbers):
        raise ValueError("a polygon is a list of finite numbers, x and y in turn")
    points = np.concatenate([polygon.reshape(-1, 2) for polygon in numbers])
    left, top, right, bottom = (float(value) for value in (*points.min(axis=0), *points.max(axis=0)))
    return left, top, right, bottom


def _box_of_runs(mask: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    """The box around a mask, whose pixels are counted down the columns; runs of zeros and ones alternate."""
    try:
        height, width = (int(side) for side in mask["size"])
        written = mask["counts"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("a mask has a size (height, width) and counts") from error
    runs = np.asarray(_runs(written) if isinstance(written, str | bytes) else written, dtype=np.int64)
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() > height * width:
        raise ValueError(f"counts do not fit a mask of {height} x {width} pixels")
    ends = np.cumsum(runs)
    begins, ends = (ends - runs)[1::2], ends[1::2]
    begins, ends = begins[ends > begins], ends[ends > begins]
    if not len(begins):
        return None
    columns, last_columns = begins // height, (ends - 1) // height
    top, bottom = 0, height
    if (columns == last_columns).all():
        top, bottom = int((begins % height).min()), int(((ends - 1) % height).max()) + 1
    return float(columns.min()), float(top), float(last_columns.max() + 1), float(bottom)


def _runs(text: str | bytes) -> list[int]:
    """Decode runs: from the third on, each is the difference from the run before the last."""
    runs: list[int] = []
    value = shift = 0
    for code in text if isinstance(text, bytes) else text.encode("ascii"):
        bits = code - _FIRST_CODE
        value |= (bits & _VALUE) << shift
        shift += _BITS
        if bits & _MORE:
            continue
        if bits & _SIGN:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("counts end within a number")
    return runs
