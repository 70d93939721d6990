"""Check the structure of `.mat` files of versions 5 to 7 before SciPy reads them: it trusts them, and may crash.

A file is a header and a sequence of elements: a type, a length and contents. The contents of arrays, cells and structs
are elements again: flags with the class, dimensions, a name, and what the class asks for.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rsm_probe.brains.formats.stored import require_room
from rsm_probe.errors import StorageError

_HEADER = 128
# Types of elements.
_NUMBERS, _TEXTS, _ARRAY, _COMPRESSED = (1, 2, 3, 4, 5, 6, 7, 9, 12, 13), (16, 17, 18), 14, 15
# Some programs write other integers and texts here than MATLAB does, and SciPy accepts them.
_OF_DIMENSIONS, _OF_NAMES = (5, 6), (1, 16)
# Classes of arrays; all from 6 to 15 hold numbers, and those above are functions and objects of MATLAB's own.
_CELL, _STRUCT, _OBJECT, _CHAR, _SPARSE, _LAST_OF_NUMBERS, _LAST = 1, 2, 3, 4, 5, 15, 17
_IS_COMPLEX = 1 << 11
_DEEPEST = 32


class Element(NamedTuple):
    """A part of a file.

    Attributes:
        kind: its type.
        content: its contents.
    """

    kind: int
    content: memoryview


def require_sound(file: Path) -> None:
    """Refuse files whose elements are longer than what holds them, of unknown types, or not those of their class.

    Raises:
        StorageError: see above.
        CostError: compressed elements do not fit into memory.
    """
    content = memoryview(file.read_bytes())
    order = {b"IM": "<", b"MI": ">"}.get(bytes(content[126:_HEADER]))
    if order is None:
        raise StorageError(f"cannot read {file}: it is not of MATLAB, or torn")
    try:
        for element in _elements(content[_HEADER:], order):
            if element.kind == _COMPRESSED:
                (element,) = _elements(_decompressed(element.content, order, file), order)
            if element.kind != _ARRAY:
                raise ValueError("there is something between its variables")
            _require_array(element.content, order, 0)
    except (ValueError, struct.error, zlib.error) as error:
        raise StorageError(f"cannot read {file}: it is damaged ({error})") from error


def _elements(content: memoryview, order: str) -> Iterator[Element]:
    begin = 0
    while begin < len(content):
        kind, length = struct.unpack_from(f"{order}II", content, begin)
        if is_short := kind > 0xFFFF:  # the length is in the type, and the contents in the place of the length
            kind, length = kind & 0xFFFF, kind >> 16
        first = begin + (4 if is_short else 8)
        if first + length > len(content) or (is_short and length > 4):
            raise ValueError("an element is longer than what holds it")
        if kind not in (*_NUMBERS, *_TEXTS, _ARRAY, _COMPRESSED):
            raise ValueError(f"an element has the unknown type {kind}")
        yield Element(kind, content[first : first + length])
        # Elements are filled up to multiples of 8 bytes, unless they are compressed.
        begin = begin + 8 if is_short else first + length + (-length % 8 if kind != _COMPRESSED else 0)


def _decompressed(content: memoryview, order: str, file: Path) -> memoryview:
    """The one element that is compressed here, whose length stands at its beginning."""
    stream = zlib.decompressobj()
    start = stream.decompress(content, 8)
    _, length = struct.unpack(f"{order}II", start)
    require_room(length // 8, str(file))
    rest = stream.decompress(stream.unconsumed_tail, length + 1) if length else b""
    if len(rest) != length:
        raise ValueError(f"a compressed element declares {length} bytes and holds {len(rest)} or more")
    return memoryview(start + rest)


def _require_array(content: memoryview, order: str, depth: int) -> None:
    """Check that an array has what its class asks for.

    Raises:
        ValueError: it has not, or is nested too deeply.
    """
    if depth > _DEEPEST:
        raise ValueError("its arrays are nested too deeply")
    parts = list(_elements(content, order))
    if not parts:  # an empty array
        return
    flags = struct.unpack(f"{order}II", parts[0].content)[0]
    kind, is_complex = flags & 0xFF, bool(flags & _IS_COMPLEX)
    if not 0 < kind <= _LAST:
        raise ValueError(f"an array has the unknown class {kind}")
    if kind > _LAST_OF_NUMBERS:
        return
    _, dimensions, name, *parts = parts
    if dimensions.kind not in _OF_DIMENSIONS or name.kind not in _OF_NAMES or len(dimensions.content) < 8:
        raise ValueError("an array has no dimensions or no name")
    shape = struct.unpack(f"{order}{len(dimensions.content) // 4}i", dimensions.content)
    if any(side < 0 for side in shape):
        raise ValueError(f"an array has the shape {shape}")
    arrays = math.prod(shape)
    if kind in (_STRUCT, _OBJECT):
        longest, names, *parts = parts[kind - _STRUCT :]  # objects have the name of their class first
        (longest_name,) = struct.unpack(f"{order}i", longest.content)
        arrays *= len(names.content) // longest_name if longest_name > 0 else 0
    if kind in (_CELL, _STRUCT, _OBJECT):
        fits = len(parts) == arrays and all(part.kind == _ARRAY for part in parts)
    else:
        known = (*_NUMBERS, *_TEXTS) if kind == _CHAR else _NUMBERS
        fits = len(parts) == (3 if kind == _SPARSE else 1) + is_complex and all(part.kind in known for part in parts)
    if not fits:
        raise ValueError(f"an array of class {kind} has other elements than that class")
    for part in parts:
        if part.kind == _ARRAY:
            _require_array(part.content, order, depth + 1)
