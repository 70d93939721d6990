"""Products: which locations the rows of a product stand for, and what attention makes of them."""

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
    """Rows keep the left factor's origins; where these are not locations, columns keep those of the right factor."""
    for factor in (left, right):
        if isinstance(factor, Lost):
            return factor
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):  # one of them is a table of weights
        factor, axis = (left, -1) if isinstance(left, Tensor) else (right, -2)
        assert isinstance(factor, Tensor)
        axis = max(axis, -factor.ndim)
        if mixes_one_axis(factor, axis) and not _joins_locations(first_location(factor, axis), batch):
            if factor.shape == output.shape:
                return factor  # mixed, but as many as before
            raise ValueError("locations along one axis became another number of mixtures")
        return compact(first_location(factor, axis)).expand(output.shape)
    across = -2 if right.ndim > 1 else 0
    rows, columns = compact(first_location(left, -1)), compact(first_location(right, across))
    # A sum over many locations belongs to none of them.
    mixed = held_once(left).shape[-1] > 1, held_once(right).shape[across] > 1
    by_columns = mixed == (True, False) or (_joins_locations(rows, batch) and not _joins_locations(columns, batch))
    return (columns if by_columns else rows).expand(output.shape)


def of_rows(origin: Origin, output: Tensor) -> Origin:
    """Each row of the output stands for a row of the first factor (in attention, for a query)."""
    if isinstance(origin, Tensor):
        return first_location(origin, -1).expand(output.shape)
    return as_codes(origin, output)  # learned queries: the images are in what they pick up, but no location is


def mixes_one_axis(codes: Tensor, axis: int) -> bool:
    """Whether what is summed over an axis of a matrix or map are locations, each once, while channels lie elsewhere.

    Channels lie elsewhere where every vector along the axis occurs several times; patches that become vectors differ.
    """
    vectors = held_once(codes).movedim(axis, -1)
    if vectors.shape[-1] == 1:
        return False
    repeated = codes.numel() // vectors.numel() > 1
    vectors = vectors.flatten(0, -2)
    counts = vectors.unique(dim=0, return_counts=True)[1]
    if not repeated and int(counts.min()) < 2:
        return False
    ordered = vectors.sort(dim=1).values
    return bool((ordered.diff(dim=1) > 0).all())


def _joins_locations(origin: Tensor, batch: int) -> bool:
    """Whether all locations of an image became one; class tokens, which stand for none, are another matter."""
    codes = held_once(origin)
    return 0 < len(codes[codes > NOWHERE].unique()) <= batch
