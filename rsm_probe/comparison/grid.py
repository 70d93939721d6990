"""Grids of comparisons, labelled by what each RSM is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr


class RsmKey(NamedTuple):
    """What one RSM of a sweep is: which layer of which model, matched and compared how."""

    model: str
    layer: str
    depth: int
    matching: str
    kernel: str

    def label(self) -> str:
        """One text for all of it."""
        return f"{self.model}/{self.layer}/{self.matching}/{self.kernel}"

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> RsmKey:
        """A key from its fields as stored text."""
        model, layer, depth, matching, kernel = map(str, texts)
        return cls(model, layer, int(depth), matching, kernel)


def label_grid(values: np.ndarray, rows: Sequence[RsmKey], columns: Sequence[RsmKey]) -> xr.DataArray:
    """A grid of RSM comparisons with plain coordinates on both axes, so that it can be stored as it is."""
    coordinates: dict[str, Any] = {}
    for side, keys in (("a", rows), ("b", columns)):
        coordinates[f"rsm_{side}"] = [key.label() for key in keys]
        for name in RsmKey._fields:
            coordinates[f"{name}_{side}"] = (f"rsm_{side}", [getattr(key, name) for key in keys])
    return xr.DataArray(values, dims=("rsm_a", "rsm_b"), coords=coordinates, name="cka")
