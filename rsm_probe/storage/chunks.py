"""Arrays on disk whose chunks are written one by one, each with a checksum: Zarr groups, local or behind a URL.

A chunk is written in one step, and an array is created with a fill value that no chunk holds. So what is there after
an interruption can be told from what is not, and what a disk damaged from what is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from rsm_probe.checks import brief
from rsm_probe.errors import StorageError
from rsm_probe.storage.checksums import ATTRIBUTE, covered, require_signed, signed
from rsm_probe.storage.declared import chunk_keys, first_missing, is_harmless, require_plain
from rsm_probe.storage.group import METADATA, UNFINISHED, StoredGroup
from rsm_probe.storage.listing import storing

if TYPE_CHECKING:
    import zarr

Selection = tuple[slice, ...]


class ChunkStore(StoredGroup):
    """A Zarr group (format 3) of arrays with checksummed chunks, and attributes.

    Args:
        group: the open group.
        where: its path or URL, for messages.
    """

    def __init__(self, group: zarr.Group, where: str) -> None:
        super().__init__(group, where)
        self._arrays: dict[str, zarr.Array] = {}

    def __contains__(self, name: str) -> bool:
        """Whether there is an array of that name.

        Raises:
            StorageError: there was one; its metadata are missing.
        """
        if self.files.size(f"{name}/{METADATA}") is not None:
            return True
        if any(not UNFINISHED.fullmatch(file) for file in self.files.sizes(name)):
            raise StorageError(f"{self.where}/{name}/{METADATA} is missing; {self._remove(name)}")
        return False

    def array(self, name: str) -> zarr.Array:
        """An array as Zarr opens it.

        Raises:
            StorageError: there is none of that name, or its metadata are damaged.
        """
        import zarr

        if name not in self._arrays:
            file = f"{self.where}/{name}/{METADATA}"
            with storing(f"{file} is damaged", self._remove(name)):
                document = self.files.document(f"{name}/{METADATA}", self._remove(name))
                if not require_signed(document, file, self._remove(name)) and document.get("attributes"):
                    raise StorageError(f"{file} is damaged: its checksum is missing; {self._remove(name)}")
                array = self.group[name]
                if not isinstance(array, zarr.Array):
                    raise StorageError(f"{file} is damaged: it is not of an array; {self._remove(name)}")
                require_plain(array, self.where)
            self._arrays[name] = array
        return self._arrays[name]

    def create(
        self,
        name: str,
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        dtype: np.dtype | type,
        fill: float,
        dimensions: tuple[str, ...],
    ) -> bool:
        """Makes an array, if it is not there.

        Args:
            name: of the array; slashes make groups within the group.
            shape: of the whole.
            chunks: shape of a chunk.
            dtype: of the values.
            fill: a value that no chunk will hold; it stands for chunks that were not written.
            dimensions: their names, which xarray reads.

        Returns:
            Whether it was made.

        Raises:
            StorageError: it cannot be written; one of another shape or type is there.
        """
        chunks = tuple(max(1, min(chunk, size)) for chunk, size in zip(chunks, shape, strict=True))
        if name in self:
            array = self.array(name)
            there, wanted = (array.shape, array.chunks, array.dtype), (shape, chunks, np.dtype(dtype))
            if there != wanted:
                raise StorageError(
                    f"{self.where}/{name}/{METADATA} is damaged: it is of {brief(there)}, not {brief(wanted)}; "
                    f"{self._remove(name)}"
                )
            if not self._is_signed(array):  # killed in between, or of an earlier version
                self._sign(name, array)
            return False
        with storing(f"cannot write {self.where}/{name}"):
            self._make(
                name, shape=shape, chunks=chunks, dtype=np.dtype(dtype), fill_value=fill, dimension_names=dimensions
            )
        return True

    def put(self, name: str, values: np.ndarray, dimensions: tuple[str, ...]) -> None:
        """Writes a small array as one chunk, replacing what is there.

        Raises:
            StorageError: it cannot be written.
        """
        self._arrays.pop(name, None)
        with storing(f"cannot write {self.where}/{name}"):
            data = values.astype(np.dtypes.StringDType()) if values.dtype.kind == "U" else values
            self._make(
                name,
                data=data,
                chunks=tuple(max(1, size) for size in values.shape),
                fill_value=np.nan if data.dtype.kind == "f" else None,
                dimension_names=dimensions,
                overwrite=True,
                # An array of empty texts is written like any other.
                config={"write_empty_chunks": True},
            )

    def _make(self, name: str, **options: Any) -> None:
        """Creates an array by the options of Zarr."""
        from zarr.codecs import Crc32cCodec

        # Representations hold digits that do not compress; uncompressed chunks are read fastest.
        self._sign(name, self.group.create_array(name, compressors=[Crc32cCodec()], **options))

    def _sign(self, name: str, array: zarr.Array) -> None:
        """Adds the checksum to the metadata of an array that was just made."""
        document = self.files.document(f"{name}/{METADATA}", self._remove(name))
        array.update_attributes(signed(document.get("attributes", {}), covered(document)))

    def put_names(self, name: str, names: Sequence[str], dimension: str) -> None:
        """Makes sure that an array holds these names.

        Raises:
            StorageError: it cannot be written.
        """
        if not (self.holds_names(name, names) and self._is_signed(self.array(name))):
            self.put(name, np.array(list(names), np.str_), (dimension,))

    def holds_names(self, name: str, names: Sequence[str]) -> bool:
        """Whether an array holds these names, and none of them is lost."""
        try:
            return name in self and [str(text) for text in self.read(name)] == list(names)
        except StorageError:  # damaged
            return False

    def write(self, name: str, where: Selection, values: np.ndarray) -> None:
        """Writes whole chunks.

        Raises:
            StorageError: they cannot be written (disk full, read-only folder).
        """
        array = self.array(name)
        with storing(f"cannot write {self._first_file(array, name, where)}"):
            array[where] = values

    def read(self, name: str, where: Selection | None = None) -> np.ndarray:
        """Reads a part of an array, or all of it.

        Raises:
            StorageError: a chunk is missing or damaged; the message names its file.
        """
        array = self.array(name)
        values, problem = self._tried(array, name, where)
        if values is None:
            for key in chunk_keys(array, where):
                part, reason = self._tried(array, name, _part(array, key))
                if part is None:
                    raise StorageError(f"{self.where}/{name}/{key} is {reason}; {self._again()}")
            raise StorageError(f"{self._first_file(array, name, where)} is {problem}; {self._again()}")
        return values

    def intact(self, name: str, where: Selection) -> bool:
        """Whether all chunks of a part are there and pass their checksums."""
        return self._tried(self.array(name), name, where)[0] is not None

    def complete(self, name: str) -> bool:
        """Whether all chunks of an array are there, without reading them."""
        array = self.array(name)
        if not self._is_signed(array) and array.dtype.kind == "T":  # once, texts that were all empty had no file
            return True
        return first_missing(array, self.files.sizes(name).get) is None

    def _tried(self, array: zarr.Array, name: str, where: Selection | None) -> tuple[np.ndarray | None, str]:
        """The values, or None and what is wrong."""
        texts = array.dtype.kind == "T"
        if not is_harmless(array, where) or (texts and self._is_signed(array)):
            size_of = cache(lambda key: self.files.size(f"{name}/{key}"))
            if first_missing(array, size_of, where) is not None:
                return None, "missing or torn"
            # A text takes four bytes at least.
            if texts and 4 * array.size > sum(size_of(key) or 0 for key in chunk_keys(array, where)):
                return None, "damaged: it is too small for what is declared"
        try:
            with storing("damaged"):
                values = np.asarray(array[...] if where is None else array[where])
        except StorageError as error:
            return None, str(error)
        return (None, "missing") if _unwritten(values, array.fill_value) else (values, "")

    @staticmethod
    def _is_signed(array: zarr.Array) -> bool:
        return ATTRIBUTE in array.attrs

    def _first_file(self, array: zarr.Array, name: str, where: Selection | None) -> str:
        """The file of the first chunk of a part."""
        return f"{self.where}/{name}/{next(chunk_keys(array, where), 'c')}"

    def _again(self) -> str:
        return "remove that file, if it is there, and run the same work again: only what is missing is made again"

    def _remove(self, name: str) -> str:
        return f"remove {self.where}/{name}, if it is there, and run the same work again, which makes it again"


def _unwritten(values: np.ndarray, fill: Any) -> bool:
    if values.dtype.kind == "f":
        return bool(np.isnan(values).any()) if np.isnan(fill) else bool((values == fill).any())
    return values.dtype.kind in "iu" and bool((values == fill).any())


def _part(array: zarr.Array, key: str) -> Selection:
    """The part of an array that a chunk holds, by its file."""
    numbers = [int(number) for number in key.split("/")[1:]]
    return tuple(slice(k * chunk, (k + 1) * chunk) for k, chunk in zip(numbers, array.chunks, strict=True))
