"""`.npy` and `.npz`, without objects: reading those would run code from the file."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from rsm_probe.brains.formats.stored import (
    ReadOptions,
    StoredRdm,
    Variables,
    candidates,
    rdms_in,
    readable,
    require_room,
    stored,
)
from rsm_probe.errors import StorageError

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npy(file: Path, options: ReadOptions) -> list[StoredRdm]:
    """Read one array; see `matrices` for its axes.

    Raises:
        StorageError: the file is missing, torn, or holds objects.
        ComparisonError: these are not RDMs.
    """
    options.require_plain(file, ("key", "descriptor", "subjects"), "a .npy file holds one array; give lists of names")
    with readable(file):
        with file.open("rb") as stream:
            shape, dtype = _header(stream)
            _require_plain(dtype, str(file))
            declared, held = stream.tell() + math.prod(shape) * dtype.itemsize, file.stat().st_size
        if declared > held:
            raise StorageError(f"{file} is torn: it declares {declared} bytes and holds {held}; save it again")
        require_room(math.prod(shape), str(file))
        array = np.load(file, allow_pickle=False)
    return stored(array, str(file), names=None, ids=options.ids)


def read_npz(file: Path, options: ReadOptions) -> list[StoredRdm]:
    """Read one array of several, and names from others.

    Raises:
        StorageError: the file is missing or damaged, or an array that is needed holds objects.
        ComparisonError: unknown arrays, several that may hold RDMs, or these are not RDMs.
    """
    with readable(file), zipfile.ZipFile(file) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        headers = {name: _entry_header(archive, entry) for name, entry in entries.items()}

        def value(name: str) -> Any:
            shape, dtype, begin = headers[name]
            _require_plain(dtype, f"{file}: {name}")
            if begin + math.prod(shape) * dtype.itemsize != entries[name].file_size:
                raise StorageError(f"{name} in {file} declares another size than it has; save it again")
            require_room(math.prod(shape), f"{file}: {name}")
            with archive.open(entries[name]) as stream:
                array = np.lib.format.read_array(stream, allow_pickle=False)
                stream.read(1)  # the end of an entry, where its checksum is compared
            return array

        described = {name: f"{dtype} {shape}" for name, (shape, dtype, _) in headers.items()}
        shapes = {name: shape for name, (shape, dtype, _) in headers.items() if dtype.kind in "fiubc"}
        return rdms_in(Variables(described, candidates(shapes), value), file, options)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of the array that begins here.

    Raises:
        ValueError: no array of NumPy begins here.
    """
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"its format has the unknown version {version}")
    shape, _, dtype = _HEADERS[version](stream)
    if any(side < 0 for side in shape):
        raise ValueError(f"it declares the shape {shape}")
    return shape, dtype


def _entry_header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype, int]:
    with archive.open(entry) as stream:
        shape, dtype = _header(stream)
        return shape, dtype, stream.tell()


def _require_plain(dtype: np.dtype, where: str) -> None:
    if dtype.hasobject:
        raise StorageError(
            f"{where} holds Python objects, which can run any code when they are read; save numbers instead, as in "
            "numpy.save(file, array.astype(float))"
        )
