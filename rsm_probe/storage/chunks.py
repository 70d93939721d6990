"""Arrays on disk whose chunks are written one by one, each with a checksum: Zarr groups, local or behind a URL.

Each chunk is written atomically, and each array has a fill value that no written chunk holds. After an interruption,
missing chunks can therefore be told from finished ones, and damaged chunks from intact ones.
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
        where: its path or URL, for error messages.
    """

    def __init__(self, group: zarr.Group, where: str) -> None:
        super().__init__(group, where)
        self._arrays: dict[str, zarr.Array] = {}

    def __contains__(self, name: str) -> bool:
        """Whether the group holds an array of that name.

        Raises:
            StorageError: chunks of the array exist, but its metadata are missing.
        """
        if self.files.size(f"{name}/{METADATA}") is not None:
            return True
        if any(not UNFINISHED.fullmatch(file) for file in self.files.sizes(name)):
            raise StorageError(f"{self.where}/{name}/{METADATA} is missing; {self._remove(name)}")
        return False

    def array(self, name: str) -> zarr.Array:
        """Open an array with Zarr.

        Raises:
            StorageError: there is no array of that name, or its metadata are damaged.
        """
        import zarr

        if name not in self._arrays:
            file = f"{self.where}/{name}/{METADATA}"
            with storing(f"{file} is damaged", self._remove(name)):
                document = self.files.document(f"{name}/{METADATA}", self._remove(name))
                if not require_signed(document, file, self._remove(name)) and document.get("attributes"):
                    raise StorageError(f"{file} is damaged: its checksum is missing; {self._remove(name)}")
                if document.get("node_type") != "array":
                    raise StorageError(f"{file} is damaged: it does not describe an array; {self._remove(name)}")
                array = zarr.Array.from_dict(self.group.store_path / name, document)
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
        """Create an array unless it exists.

        Args:
            name: name of the array; slashes make groups within the group.
            shape: shape of the whole array.
            chunks: shape of a chunk.
            dtype: type of the values.
            fill: a value that no chunk will hold; it marks chunks that are not written yet.
            dimensions: names of the dimensions, which xarray reads.

        Returns:
            Whether the array was created.

        Raises:
            StorageError: the array cannot be written, or one of a different shape or type exists.
        """
        chunks = tuple(max(1, min(chunk, size)) for chunk, size in zip(chunks, shape, strict=True))
        if name in self:
            array = self.array(name)
            there, wanted = (array.shape, array.chunks, array.dtype), (shape, chunks, np.dtype(dtype))
            if there != wanted:
                raise StorageError(
                    f"{self.where}/{name}/{METADATA} is damaged: it declares {brief(there)}, not {brief(wanted)}; "
                    f"{self._remove(name)}"
                )
            if not self._is_signed(array):  # the process was killed before signing it, or an earlier version wrote it
                self._sign(name, array)
            return False
        with storing(f"cannot write {self.where}/{name}"):
            self._make(
                name, shape=shape, chunks=chunks, dtype=np.dtype(dtype), fill_value=fill, dimension_names=dimensions
            )
        return True

    def put(self, name: str, values: np.ndarray, dimensions: tuple[str, ...]) -> None:
        """Write a small array as one chunk, replacing any array of that name.

        Raises:
            StorageError: the array cannot be written.
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
                # Write a chunk even if all of its texts are empty.
                config={"write_empty_chunks": True},
            )

    def _make(self, name: str, **options: Any) -> None:
        """Create an array with these options of Zarr, and sign it."""
        from zarr.codecs import Crc32cCodec

        # Representations hardly compress, and uncompressed chunks are read fastest.
        self._sign(name, self.group.create_array(name, compressors=[Crc32cCodec()], **options))

    def _sign(self, name: str, array: zarr.Array) -> None:
        """Add the checksum to the metadata of a new array."""
        document = self.files.document(f"{name}/{METADATA}", self._remove(name))
        array.update_attributes(signed(document.get("attributes", {}), covered(document)))

    def put_names(self, name: str, names: Sequence[str], dimension: str) -> None:
        """Write these names as an array, unless it holds them already.

        Raises:
            StorageError: the array cannot be written.
        """
        if not (self.holds_names(name, names) and self._is_signed(self.array(name))):
            self.put(name, np.array(list(names), np.str_), (dimension,))

    def holds_names(self, name: str, names: Sequence[str]) -> bool:
        """Whether an array exists, is intact and holds exactly these names."""
        try:
            return name in self and [str(text) for text in self.read(name)] == list(names)
        except StorageError:  # damaged
            return False

    def write(self, name: str, where: Selection, values: np.ndarray) -> None:
        """Write whole chunks.

        Raises:
            StorageError: they cannot be written (disk full, read-only folder).
        """
        array = self.array(name)
        with storing(f"cannot write {self._first_file(array, name, where)}"):
            array[where] = values

    def read(self, name: str, where: Selection | None = None) -> np.ndarray:
        """Read a part of an array, or all of it.

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
        """Whether all chunks of a part exist and pass their checksums."""
        return self._tried(self.array(name), name, where)[0] is not None

    def complete(self, name: str) -> bool:
        """Whether a file exists for every chunk of an array, without reading any."""
        array = self.array(name)
        if not self._is_signed(array) and array.dtype.kind == "T":  # earlier versions wrote no empty texts
            return True
        return first_missing(array, self.files.sizes(name).get) is None

    def _tried(self, array: zarr.Array, name: str, where: Selection | None) -> tuple[np.ndarray | None, str]:
        """Read a part; return its values and "", or None and what is wrong."""
        texts = array.dtype.kind == "T"
        if not is_harmless(array, where) or (texts and self._is_signed(array)):
            size_of = cache(lambda key: self.files.size(f"{name}/{key}"))
            if first_missing(array, size_of, where) is not None:
                return None, "missing or torn"
            # Each text takes at least four bytes.
            if texts and 4 * array.size > sum(size_of(key) or 0 for key in chunk_keys(array, where)):
                return None, "damaged: it is too small for the declared shape"
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
        """The path or URL of the first chunk of a part."""
        return f"{self.where}/{name}/{next(chunk_keys(array, where), 'c')}"

    def _again(self) -> str:
        return "remove that file, if it exists, and rerun the same work: it computes only what is missing"

    def _remove(self, name: str) -> str:
        return f"remove {self.where}/{name}, if it exists, and rerun the same work, which writes it again"


def _unwritten(values: np.ndarray, fill: Any) -> bool:
    if values.dtype.kind == "f":
        return bool(np.isnan(values).any()) if np.isnan(fill) else bool((values == fill).any())
    return values.dtype.kind in "iu" and bool((values == fill).any())


def _part(array: zarr.Array, key: str) -> Selection:
    """The part of an array that the chunk of this file holds."""
    numbers = [int(number) for number in key.split("/")[1:]]
    return tuple(slice(k * chunk, (k + 1) * chunk) for k, chunk in zip(numbers, array.chunks, strict=True))
