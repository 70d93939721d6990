"""Arrays on disk whose chunks are written one by one, each with a checksum: Zarr groups, local or behind a URL.

A chunk is written in one step, and an array is created with a fill value that no chunk holds. So what is there after
an interruption can be told from what is not, and what a disk damaged from what is whole.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from rsm_probe.errors import StorageError
from rsm_probe.storage.files import require_plain
from rsm_probe.storage.locks import sole_writer
from rsm_probe.storage.places import is_url, located

Selection = tuple[slice, ...]
# What storage answers with: files, the network, checksums that do not match, metadata that is none. The errors of
# object stores have nothing in common but this.
_PROBLEMS = (Exception,)
# How Zarr calls a file that is being written; of other people's files none is called so.
_UNFINISHED = re.compile(r".*\.[0-9a-f]{32}\.partial")


class ChunkStore:
    """A Zarr group (format 3) of arrays with checksummed chunks, and attributes.

    Args:
        group: the open group.
        where: its path or URL, for messages.
    """

    def __init__(self, group: zarr.Group, where: str) -> None:
        self.group = group
        self.where = where
        self._arrays: dict[str, zarr.Array] = {}

    @classmethod
    def open(cls, where: str | Path, kind: str, writable: bool = False) -> ChunkStore:
        """Opens a group that is there.

        Args:
            where: path, or URL of a file system that fsspec knows.
            kind: what it must be a store of.
            writable: whether chunks will be written.

        Raises:
            StorageError: there is none, it cannot be read, or it is of another kind.
        """
        where = located(where)
        try:
            group = zarr.open_group(where, mode="r+" if writable else "r")
            found = group.attrs.get("kind")
        except FileNotFoundError:
            raise StorageError(f"no {kind} at {where}") from None
        except _PROBLEMS as error:
            raise StorageError(f"cannot open {where}: {error}") from error
        if found != kind:
            raise StorageError(f"{where} is no {kind}" + (f" but a {found}" if found else ""))
        return cls(group, where)

    @classmethod
    def open_or_create(cls, where: str | Path, kind: str) -> ChunkStore:
        """Opens a group for writing; where there is none, it begins empty.

        Raises:
            StorageError: it cannot be written, is of another kind, or another kind of thing is in its place.
        """
        where, path = located(where), Path(located(where))
        if not is_url(where) and path.exists() and not (path / "zarr.json").exists():
            if not _is_empty(path):
                raise StorageError(f"{where} holds something else; choose another place for the {kind}")
            _remove_unfinished(path)
        try:
            group = zarr.open_group(where, mode="a", zarr_format=3)
            found = group.attrs.get("kind")
            if found is None and not list(group.keys()):
                group.attrs["kind"] = found = kind
        except _PROBLEMS as error:
            raise StorageError(f"cannot write {where}: {error}") from error
        if found != kind:
            raise StorageError(f"{where} is no {kind}; choose another place")
        return cls(group, where)

    @classmethod
    @contextmanager
    def writing(cls, where: str | Path, kind: str) -> Iterator[ChunkStore]:
        """Opens a group as its only writer; where there is none, it begins empty.

        Raises:
            StorageError: as `open_or_create` and `sole_writer`.
        """
        with sole_writer(where):
            store = cls.open_or_create(where, kind)
            if not is_url(where):
                _remove_unfinished(Path(store.where))
            yield store

    @property
    def attributes(self) -> dict[str, Any]:
        """What is known of the whole."""
        return dict(self.group.attrs)

    def set(self, attributes: Mapping[str, Any]) -> None:
        """Adds or replaces attributes, in one step.

        Raises:
            StorageError: they cannot be written.
        """
        try:
            self.group = self.group.update_attributes(dict(attributes))
        except _PROBLEMS as error:
            raise StorageError(f"cannot write {self.where}: {error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self.group

    def array(self, name: str) -> zarr.Array:
        """An array as Zarr opens it.

        Raises:
            StorageError: there is none of that name.
        """
        if name not in self._arrays:
            try:
                found = self.group[name]
            except _PROBLEMS as error:
                raise StorageError(f"{self.where} is damaged: it holds no readable {name}") from error
            assert isinstance(found, zarr.Array)
            require_plain(found, self.where)
            self._arrays[name] = found
        return self._arrays[name]

    def create(
        self,
        name: str,
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        dtype: np.dtype | type,
        fill: float,
        dimensions: tuple[str, ...],
    ) -> None:
        """Makes an array, if it is not there.

        Args:
            name: of the array; slashes make groups within the group.
            shape: of the whole.
            chunks: shape of a chunk.
            dtype: of the values.
            fill: a value that no chunk will hold; it stands for chunks that were not written.
            dimensions: their names, which xarray reads.

        Raises:
            StorageError: it cannot be written.
        """
        if name in self:
            return
        try:
            self.group.create_array(
                name,
                shape=shape,
                chunks=tuple(max(1, min(chunk, size)) for chunk, size in zip(chunks, shape, strict=True)),
                dtype=np.dtype(dtype),
                fill_value=fill,
                # Representations hold digits that do not compress; uncompressed chunks are read fastest.
                compressors=[Crc32cCodec()],
                dimension_names=dimensions,
            )
        except _PROBLEMS as error:
            raise StorageError(f"cannot write {self.where}/{name}: {error}") from error

    def put(self, name: str, values: np.ndarray, dimensions: tuple[str, ...]) -> None:
        """Writes a small array as one chunk, replacing what is there.

        Raises:
            StorageError: it cannot be written.
        """
        self._arrays.pop(name, None)
        try:
            data = values.astype(np.dtypes.StringDType()) if values.dtype.kind == "U" else values
            self.group.create_array(
                name,
                data=data,
                chunks=tuple(max(1, size) for size in values.shape),
                compressors=[Crc32cCodec()],
                fill_value=np.nan if data.dtype.kind == "f" else None,
                dimension_names=dimensions,
                overwrite=True,
            )
        except _PROBLEMS as error:
            raise StorageError(f"cannot write {self.where}/{name}: {error}") from error

    def put_names(self, name: str, names: Sequence[str], dimension: str) -> None:
        """Makes sure that an array holds these names.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            there = name in self and [str(found) for found in self.read(name)] == list(names)
        except StorageError:  # damaged
            there = False
        if not there:
            self.put(name, np.array(list(names), np.str_), (dimension,))

    def write(self, name: str, where: Selection, values: np.ndarray) -> None:
        """Writes whole chunks.

        Raises:
            StorageError: they cannot be written (disk full, read-only folder).
        """
        try:
            self.array(name)[where] = values
        except _PROBLEMS as error:
            raise StorageError(f"cannot write {self._place(name, where)}: {error}") from error

    def read(self, name: str, where: Selection | None = None) -> np.ndarray:
        """Reads a part of an array, or all of it.

        Raises:
            StorageError: a chunk is missing or damaged; the message names its file.
        """
        array = self.array(name)
        values, problem = self._tried(array, where)
        if values is None:
            bad = next((part for part in _chunks(array, where) if self._tried(array, part)[0] is None), where)
            raise StorageError(f"{self._place(name, bad)} is {problem}")
        return values

    def intact(self, name: str, where: Selection) -> bool:
        """Whether all chunks of a part are there and pass their checksums."""
        return self._tried(self.array(name), where)[0] is not None

    def complete(self, name: str) -> bool:
        """Whether all chunks of an array are there, without reading them."""
        array = self.array(name)
        return bool(array.nchunks_initialized == array.nchunks)

    def _tried(self, array: zarr.Array, where: Selection | None) -> tuple[np.ndarray | None, str]:
        """The values, or None and what is wrong."""
        try:
            values = np.asarray(array[...] if where is None else array[where])
        except _PROBLEMS as error:
            return None, f"damaged: {error}"
        return (None, "missing") if _unwritten(values, array.fill_value) else (values, "")

    def _place(self, name: str, where: Selection | None) -> str:
        """The file of the first chunk of a part."""
        array = self.array(name)
        first = [0] * array.ndim if where is None else [part.start or 0 for part in where]
        first += [0] * (array.ndim - len(first))
        numbers = [str(start // size) for start, size in zip(first, array.chunks, strict=True)]
        return "/".join([self.where, name, "c", *numbers])


def _is_empty(path: Path) -> bool:
    # What a kill leaves of the very first write is no content.
    return path.is_dir() and all(_UNFINISHED.fullmatch(file.name) for file in path.iterdir())


def _remove_unfinished(path: Path) -> None:
    """Removes what writers that were killed left of single files."""
    for file in path.rglob("*.partial"):
        if _UNFINISHED.fullmatch(file.name):
            file.unlink(missing_ok=True)


def _unwritten(values: np.ndarray, fill: Any) -> bool:
    if values.dtype.kind == "f":
        return bool(np.isnan(values).any()) if np.isnan(fill) else bool((values == fill).any())
    return values.dtype.kind in "iu" and bool((values == fill).any())


def _chunks(array: zarr.Array, where: Selection | None) -> Iterator[Selection]:
    """The chunks of an array that a part touches."""
    axes = []
    for axis, (size, chunk) in enumerate(zip(array.shape, array.chunks, strict=True)):
        part = where[axis] if where is not None and axis < len(where) else slice(None)
        start, stop, _ = part.indices(size)
        axes.append([slice(k, min(k + chunk, size)) for k in range(start // chunk * chunk, stop, chunk)])
    yield from itertools.product(*axes)
