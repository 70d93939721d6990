"""Labelled arrays on disk: xarray datasets in Zarr for results, plain arrays for checkpoints; never pickle.

Everything is written beside its destination and moved there when it is complete. A file is replaced in one step; a
folder in two, between which a kill leaves the old one beside its place under a name that begins with a dot.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from rsm_probe.errors import StorageError
from rsm_probe.storage.places import is_url, located

Arrays = dict[str, np.ndarray]


def save_dataset(path: str | Path, dataset: xr.Dataset) -> None:
    """Writes a dataset as a Zarr group, replacing what is there.

    Raises:
        StorageError: the folder cannot be written, or the dataset holds what Zarr cannot store.
    """
    with replacing(Path(path)) as fresh:
        # Format 2 has a specification for text; format 3 still warns that it has none.
        dataset.drop_encoding().to_zarr(fresh, mode="w", zarr_format=2, consolidated=True)


def open_dataset(path: str | Path) -> xr.Dataset:
    """Opens a Zarr group written by `save_dataset`, or one of all pairs; arrays are read when they are used.

    Args:
        path: a folder, or a URL of a file system that fsspec knows.

    Raises:
        StorageError: there is no dataset at the path, or it is damaged.
    """
    path = located(path)
    if not is_url(path) and not Path(path).is_dir():
        raise StorageError(f"no stored dataset at {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for _, array in zarr.open_group(path, mode="r").arrays():
                require_plain(array, path)
            dataset = xr.open_zarr(path, chunks=None)
            # Text of any length, which much of NumPy does not take yet.
            texts = {name: part for name, part in dataset.variables.items() if part.dtype.kind == "T"}
            fixed = {name: (part.dims, np.array(list(part.values), np.str_)) for name, part in texts.items()}
            return dataset.assign_coords(fixed)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise StorageError(f"{path} is no readable Zarr dataset: {error}") from error


def require_plain(array: zarr.Array, where: str | Path) -> None:
    """Makes sure that reading an array runs no code of whoever wrote it.

    Raises:
        StorageError: its values are pickled.
    """
    codecs = [*array.filters, *array.compressors, array.serializer]
    if any("pickle" in repr(codec).lower() for codec in codecs):
        raise StorageError(f"{where} holds pickled values ({array.name}), which can run any code; they are not read")


def save_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes plain arrays as one file (`.npz`), atomically and synced to disk.

    Raises:
        StorageError: the file cannot be written (disk full, read-only folder), or an array holds objects.
    """
    with replacing(Path(path)) as fresh, fresh.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)
        stream.flush()
        os.fsync(stream.fileno())


def load_arrays(path: str | Path) -> Arrays:
    """Reads a file written by `save_arrays`; objects are refused, so no code can run.

    Raises:
        StorageError: the file is missing, damaged, or holds something other than plain arrays.
    """
    try:
        with open(path, "rb") as stream:
            stored = np.load(stream, allow_pickle=False)
            if not isinstance(stored, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise StorageError(f"cannot read {path}: {error}; remove it to compute it anew") from error


def save_text(path: str | Path, text: str) -> None:
    """Writes a text file, atomically.

    Raises:
        StorageError: the file cannot be written.
    """
    with replacing(Path(path)) as fresh:
        fresh.write_text(text, encoding="utf-8")


def save_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Writes a mapping as indented JSON, atomically.

    Raises:
        StorageError: the file cannot be written.
    """
    save_text(path, json.dumps(data, indent=2) + "\n")


def load_json(path: str | Path) -> dict[str, Any]:
    """Reads a mapping written by `save_json`.

    Raises:
        StorageError: the file is missing or no JSON object.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StorageError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise StorageError(f"{path} must hold a JSON object")
    return data


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside a path, to be written and then moved there; whatever goes wrong, the old content stays.

    Raises:
        StorageError: the place cannot be written or moved.
    """
    fresh, stale = (path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}") for _ in range(2))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        if path.is_dir():  # a folder cannot be replaced in one step
            if not (fresh.is_dir() and (path / ".zgroup").is_file()):
                raise OSError("a folder with other content is in its place")
            path.rename(stale)
            try:
                fresh.rename(path)
            except OSError:
                stale.rename(path)
                raise
        else:
            fresh.replace(path)
    except (OSError, TypeError, ValueError) as error:
        raise StorageError(f"cannot write {path}: {error}") from error
    finally:
        for left in (fresh, stale):
            with suppress(OSError):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
