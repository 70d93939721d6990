"""Check what the metadata of a Zarr group declare against its files, before any array is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rsm_probe.errors import StorageError
from rsm_probe.execution.amounts import available_bytes, format_bytes
from rsm_probe.storage.checksums import ATTRIBUTE, require_signed
from rsm_probe.storage.listing import LARGEST_TEXT, Files

if TYPE_CHECKING:
    import zarr

# Metadata of formats 2 and 3.
_DOCUMENTS = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
# Reading this little is safe, whatever the metadata declare.
_HARMLESS_BYTES, _HARMLESS_CHUNKS = 64 << 20, 4096
# The largest compression ratio of any codec in use; constant arrays come close to it.
_MOST_COMPRESSED = 1 << 16
_TEXT_BYTES = 16
_CHECKSUM_BYTES = 4


def require_plain(array: zarr.Array, where: Any) -> None:
    """Refuse an array whose values are pickled, because reading it would run code from the store.

    Raises:
        StorageError: the values are pickled.
    """
    codecs = [*array.filters, *array.compressors, array.serializer]
    if any("pickle" in repr(codec).lower() for codec in codecs):
        raise StorageError(f"{where} holds pickled values ({array.name}), which can run any code; they are not read")


def require_documents(files: Files, sizes: Mapping[str, int], advice: str) -> None:
    """Check that the metadata of a group are complete, small enough to read, and unchanged since they were written.

    Args:
        files: the files of the group.
        sizes: file name -> bytes, of the whole group.
        advice: what the user can do; ends the error message.

    Raises:
        StorageError: a metadata file is missing, too large or damaged; the message names it.
    """
    folders: set[str] = set()
    for name, size in sizes.items():
        folder, _, last = name.rpartition("/")
        if last in _DOCUMENTS:
            folders.add(folder)
            if size > LARGEST_TEXT:
                raise StorageError(f"{files.where}/{name} holds {size} bytes, too many for such a file; {advice}")
        if last == "zarr.json":
            require_signed(files.document(name, advice), f"{files.where}/{name}", advice)
    if not folders:  # there is no group at all, which Zarr reports better
        return
    arrays = {name.split("/", 1)[0] for name in sizes if "/" in name}
    kind = "zarr.json" if "zarr.json" in sizes else ".zarray"
    for name in sorted(arrays - {folder.split("/", 1)[0] for folder in folders}):
        raise StorageError(f"{files.where}/{name}/{kind} is missing; {advice}")


def require_held(
    arrays: Mapping[str, zarr.Array], names: Any, sizes: Mapping[str, int], where: str, advice: str
) -> None:
    """Check that the files of a group can hold what its arrays declare, and that the arrays fit into memory.

    Args:
        arrays: name -> array.
        names: the arrays that the finished group had, if known.
        sizes: file name -> bytes, of the whole group.
        where: the path or URL of the group, for error messages.
        advice: what the user can do; ends the error message.

    Raises:
        StorageError: an array or file is missing, torn, or declared too large; the message names it.
    """
    for name in names if isinstance(names, list) else ():
        if name not in arrays:
            raise StorageError(f"{where}/{name}/zarr.json is missing; {advice}")
    total = 0
    for name, array in arrays.items():
        mine = {file[len(name) + 1 :]: size for file, size in sizes.items() if file.startswith(f"{name}/")}
        complete = chunk_bytes(array) is not None or ATTRIBUTE in array.attrs
        if array.metadata.zarr_format == 3 and complete:
            # Such arrays have a file for every chunk. The values are checked when they are read.
            if (missing := first_missing(array, mine.get)) is not None:
                raise StorageError(f"{where}/{name}/{missing} is missing or torn; {advice}")
            if chunk_bytes(array) is not None:
                continue
        declared = declared_bytes(array)
        held = sum(mine.values())
        chunks = sum(not file.endswith(_DOCUMENTS) for file in mine)
        # Zarr may omit chunks that hold only fill values, but hardly most of them.
        if declared > max(_HARMLESS_BYTES, min(held * _MOST_COMPRESSED, 2 * chunks * _per_chunk(array))):
            raise StorageError(
                f"{where}/{name} declares {format_bytes(declared)}, which its files of {format_bytes(held)} cannot "
                f"hold; {advice}"
            )
        total += declared
    free = available_bytes()
    if free is not None and total > free:
        raise StorageError(
            f"{where} declares {format_bytes(total)}, but {format_bytes(free)} of memory are available; {advice}"
        )


def declared_bytes(array: zarr.Array, shape: Sequence[int] | None = None) -> int:
    """Bytes of memory that an array takes, or a part of it of the given shape; for text, without the characters."""
    return math.prod(array.shape if shape is None else shape) * (array.dtype.itemsize or _TEXT_BYTES)


def chunk_bytes(array: zarr.Array) -> int | None:
    """Bytes of each chunk file if all chunks take the same, as in the numeric arrays of this package; else None."""
    from zarr.codecs import BytesCodec, Crc32cCodec

    codecs = [*array.filters, array.serializer, *array.compressors]
    if [type(codec) for codec in codecs] != [BytesCodec, Crc32cCodec]:
        return None
    return _per_chunk(array) + _CHECKSUM_BYTES


def first_missing(
    array: zarr.Array, size_of: Callable[[str], int | None], where: tuple[slice, ...] | None = None
) -> str | None:
    """Find the first chunk whose file is missing or has the wrong size.

    Args:
        array: the array to check.
        size_of: file name such as "c/0/3" -> bytes, or None if there is no such file.
        where: check only the chunks that this part touches; None for all.

    Returns:
        The name of the chunk's file; None if all chunks are complete.
    """
    expected = chunk_bytes(array)
    # Stopping at the first missing chunk bounds the time by the number of files, whatever the array declares.
    wrong = (key for key in chunk_keys(array, where) if size_of(key) is None or expected not in (None, size_of(key)))
    return next(wrong, None)


def chunk_keys(array: zarr.Array, where: tuple[slice, ...] | None = None) -> Iterator[str]:
    """Yield the file names of the chunks that a part of an array touches, in order, without listing them first."""
    axes = _touched(array, where)
    for number in range(math.prod(count for _, count in axes)):
        index = []
        for first, count in reversed(axes):
            number, offset = divmod(number, count)
            index.append(first + offset)
        yield array.metadata.encode_chunk_key(tuple(reversed(index)))


def is_harmless(array: zarr.Array, where: tuple[slice, ...] | None) -> bool:
    """Whether a part is so small that it can be read without checking what the metadata declare."""
    axes = _touched(array, where)
    chunks = math.prod(count for _, count in axes)
    # Zarr decodes whole chunks.
    return chunks <= _HARMLESS_CHUNKS and chunks * _per_chunk(array) <= _HARMLESS_BYTES


def _touched(array: zarr.Array, where: tuple[slice, ...] | None) -> list[tuple[int, int]]:
    """Along each axis, the first chunk that a part touches and how many it touches."""
    axes = []
    for axis, (size, chunk) in enumerate(zip(array.shape, array.chunks, strict=True)):
        part = where[axis] if where is not None and axis < len(where) else slice(None)
        start, stop, _ = part.indices(size)
        axes.append((start // chunk, -(-stop // chunk) - start // chunk if stop > start else 0))
    return axes


def _per_chunk(array: zarr.Array) -> int:
    return declared_bytes(array, array.chunks)
