"""Lazily read arrays of a dataset; errors name the array that could not be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
import zarr
from xarray.backends import BackendArray
from xarray.core import indexing

from rsm_probe.storage.listing import storing


def read_when_used(variable: xr.Variable, array: zarr.Array, where: str) -> xr.Variable:
    """Make a variable whose values are read from disk when they are used.

    Args:
        variable: provides dimensions and attributes.
        array: provides the values, which are not decoded further.
        where: the path or URL of the store, for error messages.

    Returns:
        The variable. Reading a damaged chunk raises StorageError.
    """
    return xr.Variable(variable.dims, indexing.LazilyIndexedArray(_Stored(array, where)), variable.attrs)


class _Stored(BackendArray):
    def __init__(self, array: zarr.Array, where: str) -> None:
        self.array, self.where = array, where
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        with storing(
            f"a tile of {self.where}/{self.array.basename} is damaged",
            "rerun the same work: it computes only the damaged tiles",
        ):
            return np.asarray(self.array.oindex[key])
