"""Labelled arrays on disk: xarray datasets in Zarr for results, plain arrays for checkpoints; never pickle.

Everything is written beside its destination and renamed when it is complete. A file is replaced in one step, a folder
in two: a process killed between them leaves the old folder beside the destination, under a name that begins with a dot.
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
# Signature, two disk numbers, entries on this disk and in total, size and offset of the directory, comment length.
_END_OF_ARCHIVE = struct.Struct("<4s4H2LH")
_setting = threading.Lock()


def save_dataset(path: str | Path, dataset: xr.Dataset) -> None:
    """Write a dataset as a Zarr group, replacing any previous one.

    The folder also gets `checksums.json` with the SHA-256 of each file, against which `open_dataset` checks them.

    Raises:
        StorageError: the folder cannot be written, or the dataset holds values that Zarr cannot store.
    """
    import zarr

    with replacing(path) as fresh:
        # Format 2 specifies how to store text; Zarr still warns that format 3 does not.
        store = store_at(str(fresh))
        # Set in Zarr's configuration, because old releases of xarray pass the option to a function that does not take
        # it. Threads share the configuration, hence the lock: the first to finish would reset it for the others.
        with _setting, zarr.config.set({"array.write_empty_chunks": True}):
            dataset.drop_encoding().to_zarr(store, mode="w", zarr_format=2, consolidated=True)
        write_manifest(fresh)


def open_dataset(path: str | Path) -> xr.Dataset:
    """Open a Zarr group written by `save_dataset`, or a store of all pairs, whose arrays are read lazily.

    Args:
        path: a folder, or a URL of a file system that fsspec knows.

    Raises:
        StorageError: there is no dataset at the path; a file is missing or damaged (the message names it); or the
            metadata declare more than the files hold or memory can take.
    """
    import xarray as xr
    import zarr

    from rsm_probe.storage.lazy import read_when_used

    where = path_or_url(path, "path")
    if not is_url(where) and not Path(where).is_dir():
        raise StorageError(f"no stored dataset at {where}")
    files = Files(where)
    sizes = files.sizes()
    advice = f"restore that file, or remove {where} and create it again"
    if "zarr.json" in sizes:  # a store of all pairs
        advice = "remove that file, if it exists, and rerun the same work: it computes only what is missing"
    if MANIFEST in sizes:
        require_manifest(files, sizes, advice)
    require_documents(files, sizes, advice)
    with storing(f"{where} is not a readable Zarr dataset", advice), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        group = zarr.open_group(store_at(where), mode="r")
        arrays = dict(group.arrays())
        for array in arrays.values():
            require_plain(array, where)
        require_held(arrays, group.attrs.get(ARRAYS), sizes, where, advice)
        texts = {}
        for name, array in arrays.items():
            if array.dtype.kind == "T":  # read before xarray does, whose errors would not name the array
                with storing(f"{where}/{name} is damaged", advice):
                    texts[name] = np.array(list(np.asarray(array[...])), np.str_)
        dataset = xr.open_zarr(store_at(where), chunks=None)
        for marked in (dataset, *dataset.variables.values()):
            for key in (ATTRIBUTE, ARRAYS):
                marked.attrs.pop(key, None)
        # Much of NumPy does not support variable-length text yet.
        fixed = {name: (dataset[name].dims, values) for name, values in texts.items()}
        dataset = dataset.assign_coords(fixed)
        if group.metadata.zarr_format == 2:  # `require_manifest` checked its files
            return dataset.load()
        large = {name: array for name, array in arrays.items() if name not in fixed and name not in dataset.indexes}
        return dataset.assign({name: read_when_used(dataset[name].variable, large[name], where) for name in large})


def save_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write plain arrays to one `.npz` file, atomically and synced to disk; each array has a checksum.

    Raises:
        StorageError: the file cannot be written (disk full, read-only folder), or an array holds objects.
    """
    with replacing(path) as fresh, fresh.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)
        stream.flush()
        os.fsync(stream.fileno())


def load_arrays(path: str | Path) -> Arrays:
    """Read a file written by `save_arrays`. Object arrays are refused, so no code can run.

    Raises:
        StorageError: the file is missing or damaged, or holds anything but plain arrays.
    """
    file = local_folder(path, "path")
    with storing(f"cannot read {path}", "remove it, and it will be computed again"):
        held = file.stat().st_size
        with zipfile.ZipFile(file) as archive:
            _require_count(file, len(archive.infolist()))
            return {entry.filename.removesuffix(".npy"): _array(archive, entry, held) for entry in archive.infolist()}


def _require_count(file: Path, listed: int) -> None:
    """Check the number of entries: a damaged entry can hide those after it, and the zip module does not notice.

    Raises:
        ValueError: the end of the file gives a different number.
    """
    with file.open("rb") as stream:
        stream.seek(-_END_OF_ARCHIVE.size, os.SEEK_END)
        signature, *_, count, _, _, _ = _END_OF_ARCHIVE.unpack(stream.read())
    # Above 65534 entries, the number is stored elsewhere.
    if signature != b"PK\5\6" or (count != listed and count != 0xFFFF):
        raise ValueError(f"it lists {listed} arrays, and its end record gives a different number")


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, held: int) -> np.ndarray:
    """Read one array of an archive of `held` bytes, checking its declared size before allocating memory.

    Raises:
        ValueError: the declared size differs from the actual one, or the array holds objects.
    """
    # NumPy reads only as many bytes as the header declares; if the entry has more, its checksum is never verified.
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > held or entry.flag_bits & 1:
        raise ValueError(f"{entry.filename} is compressed, encrypted, or larger than the file")
    content = archive.read(entry)
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"{entry.filename} has the unknown format version {version}")
    shape, fortran, dtype = read_header[version](stream)
    if dtype.hasobject:
        raise ValueError(f"{entry.filename} holds objects, which can run any code; they are not read")
    count, rest = int(np.prod([int(size) for size in shape], dtype=object)), len(content) - stream.tell()
    if count * dtype.itemsize != rest or count < 0:
        raise ValueError(f"{entry.filename} declares {count * dtype.itemsize} bytes and holds {rest}")
    values = np.frombuffer(content, dtype, count, stream.tell()) if rest else np.empty(count, dtype)
    return values.reshape(shape, order="F" if fortran else "C").copy(order="K")


def save_text(path: str | Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        StorageError: the file cannot be written.
    """
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def save_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON, atomically.

    Raises:
        StorageError: the file cannot be written.
    """
    save_text(path, json.dumps(data, indent=2) + "\n")


def load_json(path: str | Path) -> dict[str, Any]:
    """Read a mapping written by `save_json`.

    Raises:
        StorageError: the file is missing, too large, or not a JSON object.
    """
    file = local_folder(path, "path")
    return Files(str(file.parent)).document(file.name, "restore it, or remove it, and it will be computed again")
