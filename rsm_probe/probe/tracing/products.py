"""Origins of matrix products and attention."""

from __future__ import annotations

from torch import Tensor

from rsm_probe.probe.tracing.location_codes import NOWHERE
from rsm_probe.probe.tracing.origins import (
    Lost,
    Origin,
    as_codes,
    compact,
    first_location,
    held_once,
)


def of_product(left: Origin, right: Origin, output: Tensor, batch: int) -> Origin:
    """The origins of the left factor's rows; if these are not locations, those of the right factor's columns."""
    for factor in (left, right):
        if isinstance(factor, Lost):
            return factor
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):  # one factor holds weights
        factor, axis = (left, -1) if isinstance(left, Tensor) else (right, -2)
        assert isinstance(factor, Tensor)
        axis = max(axis, -factor.ndim)
        if mixes_one_axis(factor, axis) and not _joins_locations(first_location(factor, axis), batch):
            if factor.shape == output.shape:
                return factor  # locations are mixed, but their number stays the same
            raise ValueError("locations were mixed into a different number")
        return compact(first_location(factor, axis)).expand(output.shape)
    across = -2 if right.ndim > 1 else 0
    rows, columns = compact(first_location(left, -1)), compact(first_location(right, across))
    # A sum over many locations has no location.
    mixed = held_once(left).shape[-1] > 1, held_once(right).shape[across] > 1
    by_columns = mixed == (True, False) or (_joins_locations(rows, batch) and not _joins_locations(columns, batch))
    return (columns if by_columns else rows).expand(output.shape)


def of_rows(origin: Origin, output: Tensor) -> Origin:
    """The origins of the first operand's rows (in attention, the queries)."""
    if isinstance(origin, Tensor):
        return first_location(origin, -1).expand(output.shape)
    return as_codes(origin, output)  # learned queries collect content from images, but have no location


def mixes_one_axis(codes: Tensor, axis: int) -> bool:
    """Whether a sum over an axis runs over locations, each once, and channels lie on another axis.

    Channels lie on another axis if every vector of codes along the summed axis occurs several times. In patches that
    become vectors, these vectors all differ.
    """
    vectors = held_once(codes).movedim(axis, -1)
    if vectors.shape[-1] == 1:
        return False
    repeated = codes.numel() // vectors.numel() > 1
    vectors = vectors.flatten(0, -2)
    if not repeated and int(vectors.unique(dim=0, return_counts=True)[1].min()) < 2:
        return False
    return bool((vectors.sort(dim=1).values.diff(dim=1) > 0).all())


def _joins_locations(origin: Tensor, batch: int) -> bool:
    """Whether all locations of each image were joined into one. Class tokens, which have none, do not count."""
    codes = held_once(origin)
    return 0 < len(codes[codes > NOWHERE].unique()) <= batch
