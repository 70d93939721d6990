"""Check the structure of `.mat` files of versions 5 to 7 before SciPy reads them: it trusts it, down to addresses.

A file is a header and a sequence of elements: a type, a length and contents, which for arrays, cells and structs are
elements again.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from rsm_probe.brains.formats.stored import require_room
from rsm_probe.errors import StorageError

_HEADER = 128
_ARRAY, _COMPRESSED = 14, 15
_NUMBERS_AND_TEXTS = (1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 16, 17, 18)
_DEEPEST = 32


def require_sound(file: Path) -> None:
    """Refuse a file with elements of unknown types, or that are longer than what holds them.

    Raises:
        StorageError: see above.
        CostError: compressed elements do not fit into memory.
    """
    content = memoryview(file.read_bytes())
    order = {b"IM": "<", b"MI": ">"}.get(bytes(content[126:_HEADER]))
    if order is None:
        raise StorageError(f"cannot read {file}: it is not of MATLAB, or torn")
    try:
        _require_elements(content[_HEADER:], order, file, 0)
    except (ValueError, struct.error, zlib.error) as error:
        raise StorageError(f"cannot read {file}: it is damaged ({error})") from error


def _require_elements(content: memoryview, order: str, file: Path, depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError("its arrays are nested too deeply")
    begin = 0
    while begin < len(content):
        kind, length = struct.unpack_from(f"{order}II", content, begin)
        if is_short := kind > 0xFFFF:  # the length is in the type, and the contents in the place of the length
            kind, length = kind & 0xFFFF, kind >> 16
        end = begin + 8 + (0 if is_short else length)
        if end > len(content) or (is_short and (length > 4 or kind not in _NUMBERS_AND_TEXTS)):
            raise ValueError("an element is longer than what holds it")
        if kind == _ARRAY:
            _require_elements(content[begin + 8 : end], order, file, depth + 1)
        elif kind == _COMPRESSED and depth == 0:
            _require_elements(_decompressed(content[begin + 8 : end], order, file), order, file, depth + 1)
        elif kind not in _NUMBERS_AND_TEXTS:
            raise ValueError(f"an element has the unknown type {kind}")
        # Elements are filled up to multiples of 8 bytes, unless they are compressed.
        begin = end if kind == _COMPRESSED else end + (begin - end) % 8


def _decompressed(content: memoryview, order: str, file: Path) -> memoryview:
    """The one element that is compressed here, whose size stands at its beginning."""
    stream = zlib.decompressobj()
    start = stream.decompress(content, 8)
    _, length = struct.unpack(f"{order}II", start)
    require_room(length // 8, str(file))
    rest = stream.decompress(stream.unconsumed_tail, length + 1) if length else b""
    if len(rest) != length:
        raise ValueError(f"a compressed element declares {length} bytes and holds {len(rest)} or more")
    return memoryview(start + rest)
