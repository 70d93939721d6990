"""Labelled arrays on disk: xarray datasets in Zarr for results, plain arrays for checkpoints; never pickle.

Everything is written beside its destination and moved there when it is complete. A file is replaced in one step; a
folder in two, between which a kill leaves the old one beside its place under a name that begins with a dot.
"""

from __future__ import annotations

import io
import json
import os
import struct
import threading
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsm_probe.errors import StorageError
from rsm_probe.storage.checksums import ARRAYS, ATTRIBUTE, MANIFEST, require_manifest, write_manifest
from rsm_probe.storage.declared import require_documents, require_held, require_plain
from rsm_probe.storage.listing import Files, store_at, storing
from rsm_probe.storage.paths import is_url, local_folder, path_or_url
from rsm_probe.storage.replacing import replacing

if TYPE_CHECKING:
    import xarray as xr

Arrays = dict[str, np.ndarray]
# Signature, numbers of disks, entries on this disk and in all, size and place of their list, length of a comment.
_END_OF_ARCHIVE = struct.Struct("<4s4H2LH")
_setting = threading.Lock()


def save_dataset(path: str | Path, dataset: xr.Dataset) -> None:
    """Writes a dataset as a Zarr group, replacing what is there.

    Beside Zarr's own files lies `checksums.json` with the SHA-256 of each, by which `open_dataset` finds damage.

    Raises:
        StorageError: the folder cannot be written, or the dataset holds what Zarr cannot store.
    """
    import zarr

    with replacing(path) as fresh:
        # Format 2 has a specification for text; format 3 still warns that it has none.
        store = store_at(str(fresh))
        # Said to Zarr, since old releases of xarray pass it on to what does not take it. Its setting is one for all
        # threads, of which the first to end would take it from the others.
        with _setting, zarr.config.set({"array.write_empty_chunks": True}):
            dataset.drop_encoding().to_zarr(store, mode="w", zarr_format=2, consolidated=True)
        write_manifest(fresh)


def open_dataset(path: str | Path) -> xr.Dataset:
    """Opens a Zarr group written by `save_dataset`, or one of all pairs, whose arrays are read when they are used.

    Args:
        path: a folder, or a URL of a file system that fsspec knows.

    Raises:
        StorageError: there is no dataset at the path; a file of it is missing or damaged (the message names it); it
            declares more than its files hold, or more than fits into memory.
    """
    import xarray as xr
    import zarr

    from rsm_probe.storage.lazy import read_when_used

    where = path_or_url(path, "path")
    if not is_url(where) and not Path(where).is_dir():
        raise StorageError(f"no stored dataset at {where}")
    files = Files(where)
    sizes = files.sizes()
    advice = f"restore that file, or remove {where} and make it again"
    if "zarr.json" in sizes:  # all pairs
        advice = "remove that file, if it is there, and run the same work again: only what is missing is made again"
    if MANIFEST in sizes:
        require_manifest(files, sizes, advice)
    require_documents(files, sizes, advice)
    with storing(f"{where} is no readable Zarr dataset", advice), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        group = zarr.open_group(store_at(where), mode="r")
        arrays = dict(group.arrays())
        for array in arrays.values():
            require_plain(array, where)
        require_held(arrays, group.attrs.get(ARRAYS), sizes, where, advice)
        texts = {}
        for name, array in arrays.items():
            if array.dtype.kind == "T":  # which xarray may read already, without a name in its errors
                with storing(f"{where}/{name} is damaged", advice):
                    texts[name] = np.array(list(np.asarray(array[...])), np.str_)
        dataset = xr.open_zarr(store_at(where), chunks=None)
        for marked in (dataset, *dataset.variables.values()):
            for key in (ATTRIBUTE, ARRAYS):
                marked.attrs.pop(key, None)
        # Text of any length, which much of NumPy does not take yet.
        fixed = {name: (dataset[name].dims, values) for name, values in texts.items()}
        dataset = dataset.assign_coords(fixed)
        if group.metadata.zarr_format == 2:  # its files were checked as a whole
            return dataset.load()
        large = {name: array for name, array in arrays.items() if name not in fixed and name not in dataset.indexes}
        return dataset.assign({name: read_when_used(dataset[name].variable, large[name], where) for name in large})


def save_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes plain arrays as one file (`.npz`), atomically and synced to disk; each has a checksum.

    Raises:
        StorageError: the file cannot be written (disk full, read-only folder), or an array holds objects.
    """
    with replacing(path) as fresh, fresh.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)
        stream.flush()
        os.fsync(stream.fileno())


def load_arrays(path: str | Path) -> Arrays:
    """Reads a file written by `save_arrays`; objects are refused, so no code can run.

    Raises:
        StorageError: the file is missing, damaged, or holds something other than plain arrays.
    """
    file = local_folder(path, "path")
    with storing(f"cannot read {path}", "remove it to compute it again"):
        held = file.stat().st_size
        with zipfile.ZipFile(file) as archive:
            _require_count(file, len(archive.infolist()))
            return {entry.filename.removesuffix(".npy"): _array(archive, entry, held) for entry in archive.infolist()}


def _require_count(file: Path, listed: int) -> None:
    """Makes sure that no entry was swallowed by a damaged one before it, which the zip module does not notice.

    Raises:
        ValueError: the end of the file names another number.
    """
    with file.open("rb") as stream:
        stream.seek(-_END_OF_ARCHIVE.size, os.SEEK_END)
        signature, *_, count, _, _, _ = _END_OF_ARCHIVE.unpack(stream.read())
    # Beyond 65534 entries the number stands elsewhere.
    if signature != b"PK\5\6" or (count != listed and count != 0xFFFF):
        raise ValueError(f"it holds {listed} arrays, and its end says otherwise")


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, held: int) -> np.ndarray:
    """One array of an archive of `held` bytes. Its declared size is checked against the file before memory is taken.

    Raises:
        ValueError: it declares other than it holds, or objects.
    """
    # NumPy reads as many bytes as the header declares: of fewer than the entry has, the checksum would go unchecked.
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > held or entry.flag_bits & 1:
        raise ValueError(f"{entry.filename} is compressed, encrypted, or larger than the file")
    content = archive.read(entry)
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"{entry.filename} is of format {version}")
    shape, fortran, dtype = read_header[version](stream)
    if dtype.hasobject:
        raise ValueError(f"{entry.filename} holds objects, which can run any code; they are not read")
    count, rest = int(np.prod([int(size) for size in shape], dtype=object)), len(content) - stream.tell()
    if count * dtype.itemsize != rest or count < 0:
        raise ValueError(f"{entry.filename} declares {count * dtype.itemsize} bytes and holds {rest}")
    values = np.frombuffer(content, dtype, count, stream.tell()) if rest else np.empty(count, dtype)
    return values.reshape(shape, order="F" if fortran else "C").copy(order="K")


def save_text(path: str | Path, text: str) -> None:
    """Writes a text file, atomically.

    Raises:
        StorageError: the file cannot be written.
    """
    with replacing(path) as fresh:
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
        StorageError: the file is missing, larger than any that `save_json` writes, or not a JSON object.
    """
    file = local_folder(path, "path")
    return Files(str(file.parent)).document(file.name, "restore it, or remove it to compute it again")
