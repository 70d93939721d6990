"""Check paths and URLs that callers give, and turn arbitrary names into file names that stay in their folder."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import unicodedata
from pathlib import Path
from typing import Any

from rsm_probe.checks import brief
from rsm_probe.errors import StorageError

# The longest file name and path that file systems allow, in bytes.
_LONGEST_NAME, _LONGEST_PATH = 255, 4095
# Longer names are cut, which leaves room for prefixes, suffixes and the names of temporary files.
_LONGEST_FILE = 180
# Matches "s3://a", what pathlib makes of it ("s3:/a", "s3:"), chains of fsspec ("zip::s3://a") and "file:a". Windows
# drives (one letter) and colons in the middle of a name do not match.
_LIKE_URL = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]+:(?:[:/\\]|$)|file:)", re.IGNORECASE)
_RESERVED = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)
_PLAIN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_+=,@() ."


def located(where: str | Path) -> str:
    """A path or URL as text; `file://` URLs become paths."""
    return str(where).removeprefix("file://")


def is_url(where: str | Path) -> bool:
    """Whether this is a URL rather than a path in the local file system."""
    return "://" in located(where)


def absolute(where: str | Path) -> str:
    """Make a path absolute, so that processes with other working folders find it; URLs stay as they are."""
    return str(where) if is_url(where) else str(Path(located(where)).absolute())


def local_folder(where: Any, name: str = "out") -> Path:
    """Check the path of a local folder or file that a caller gave. Nothing is created.

    Args:
        where: text or a path; `file:///...` stands for the path.
        name: name of the argument, for error messages.

    Raises:
        StorageError: the value is not a path, is empty, is not a valid file name, or is a URL; the message says what
            to write instead.
    """
    text = _text(where, name)
    if text[:8] == "file:///":
        text = text[7:]
    if _LIKE_URL.match(text.lstrip()):
        raise StorageError(
            f"{name} must be a local folder or file, found the URL {brief(where)}; write its path (or the absolute "
            f"path, if a local file really has that name)"
        )
    path = Path(text)
    encoded = [os.fsencode(part) for part in path.parts]
    if any(len(part) > _LONGEST_NAME for part in encoded) or len(os.fsencode(path)) > _LONGEST_PATH:
        raise StorageError(
            f"{name} is too long for a path: each name may have at most {_LONGEST_NAME} bytes, found {brief(where)}"
        )
    return path


def path_or_url(where: Any, name: str = "out") -> str:
    """Check a local path, or a URL of a file system that fsspec knows, and return it as text. Nothing is created.

    Raises:
        StorageError: see `local_folder`; or a URL of an unknown file system, or one that lost a slash.
    """
    text = _text(where, name)
    # A path may contain "://", but only after a slash.
    if "://" not in text or text.startswith(("file:", "/", ".")):
        if _LIKE_URL.match(text) and not text.startswith("file:///"):
            raise StorageError(
                f"{name} is neither a path nor a URL, found {brief(where)}; write a URL as text, with two slashes "
                f"(s3://bucket/folder), or the path of a local folder (the absolute path, if it really has that name)"
            )
        return str(local_folder(text, name))
    from fsspec import available_protocols

    known = available_protocols()
    for part in text.split("::"):
        scheme = part.partition("://")[0]
        if scheme not in known:
            raise StorageError(
                f"{name} is a URL of a file system unknown to fsspec ({brief(scheme)}), found {brief(where)}; "
                f"write the path of a folder, or a URL such as s3://bucket/folder"
            )
    return text


def file_name(name: str) -> str:
    """Turn any name of a model, layer, image or label into a file name; different names never share one.

    Letters, digits, spaces and `-_+=,@().` stay as they are. Every other character becomes `%` and its bytes in
    hexadecimal, as do dots and spaces at either end and the first letter of names that Windows reserves. Names that
    are too long are cut and end in a hash.

    Returns:
        At most 180 bytes, which leaves room for a prefix and a suffix.
    """
    # Some file systems treat the two Unicode forms of "é" as one name.
    composed = unicodedata.is_normalized("NFC", name)
    units = [
        letter if letter in _PLAIN or (composed and ord(letter) > 127 and letter.isalnum()) else _escaped(letter)
        for letter in name
    ]
    if not units:
        return "%empty"
    if units[0] in (".", " ") or _RESERVED.fullmatch(name):
        units[0] = _escaped(name[0])
    if units[-1] in (".", " "):
        units[-1] = _escaped(name[-1])
    if sum(len(unit.encode()) for unit in units) <= _LONGEST_FILE:
        return "".join(units)
    # No escape begins with "%-".
    end = "%-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    sizes = itertools.accumulate(len(unit.encode()) for unit in units)
    return "".join(unit for unit, size in zip(units, sizes, strict=True) if size + len(end) <= _LONGEST_FILE) + end


def inside(folder: Path, path: Path) -> Path:
    """Check that a path stays inside a folder, so that `replacing` may write it; it replaces a link at the path itself.

    Args:
        folder: the folder that the path must not leave.
        path: a file in the folder or in one of its subfolders; it need not exist.

    Returns:
        The path, unchanged.

    Raises:
        StorageError: the path leads outside the folder, through `..` or through a linked subfolder.
    """
    try:
        home, parent = folder.resolve(), path.parent.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # circular links
        raise StorageError(f"cannot write {path}: {error}") from error
    if path.name in ("", "..") or not parent.is_relative_to(home):
        raise StorageError(
            f"cannot write {path}: it leads outside {folder}, to {parent}; remove the link, or choose another folder"
        )
    return path


def _escaped(letter: str) -> str:
    return "".join(f"%{byte:02X}" for byte in letter.encode("utf-8", "surrogatepass"))


def _text(where: Any, name: str) -> str:
    """The caller's path as text that file systems accept."""
    try:
        text = os.fspath(where)
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise StorageError(f"{name} must be the path of a folder or file, found {brief(where)}")
    text = str(text)  # NumPy strings become plain ones
    if not text.strip():
        raise StorageError(f"{name} is empty; write the path of a folder or file")
    if "\0" in text:
        raise StorageError(f"{name} holds a NUL character: {brief(where)}")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise StorageError(f"{name} is not a valid file name: {brief(where)}") from None
    return text
