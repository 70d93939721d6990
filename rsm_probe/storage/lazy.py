"""Arrays of a dataset that are read when they are used, with errors that say which array could not be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
import zarr
from xarray.backends import BackendArray
from xarray.core import indexing

from rsm_probe.storage.listing import storing


def read_when_used(variable: xr.Variable, array: zarr.Array, where: str) -> xr.Variable:
    """A variable whose values come from an array on disk.

    Args:
        variable: gives dimensions and attributes.
        array: gives the values, as they are.
        where: the store, for messages.

    Returns:
        The variable. Reading it raises StorageError where a chunk is damaged.
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
            "run the same work again: only what is damaged is made again",
        ):
            return np.asarray(self.array.oindex[key])
