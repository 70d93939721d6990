"""Where something may be written: local folders and URLs, and names that become files without leaving their folder."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from pathlib import Path
from typing import Any

from rsm_probe.checks import brief
from rsm_probe.errors import StorageError

# What file systems allow of one name and of a whole path, in bytes.
_LONGEST_NAME, _LONGEST_PATH = 255, 4095
# Longer names are cut, so that prefixes, suffixes and the names of temporary files still fit.
_LONGEST_FILE = 180
# "s3://a", what pathlib makes of it ("s3:/a", "s3:"), chains of fsspec ("zip::s3://a") and "file:a". One letter is a
# drive of Windows; a colon in the middle of a name is allowed.
_LIKE_URL = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]+:(?:[:/\\]|$)|file:)", re.IGNORECASE)
_RESERVED = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)
_PLAIN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_+=,@() ."


def located(where: str | Path) -> str:
    """A path or URL as text; of local files, always the path."""
    return str(where).removeprefix("file://")


def is_url(where: str | Path) -> bool:
    """Whether something lies behind a URL, and not in this machine's file system."""
    return "://" in located(where)


def absolute(where: str | Path) -> str:
    """A path as processes that began in other folders find it; URLs are found from everywhere."""
    return str(where) if is_url(where) else str(Path(located(where)).absolute())


def local_folder(where: Any, name: str = "out") -> Path:
    """A folder or file of this machine that a caller named. Nothing is made.

    Args:
        where: text or a path; `file:///...` is the path.
        name: of the argument, for messages.

    Raises:
        StorageError: not a path, empty, a name that no file can have, or a URL; the message says what to write.
    """
    text = _text(where, name)
    if text[:8] == "file:///":
        text = text[7:]
    if _LIKE_URL.match(text.lstrip()):
        raise StorageError(
            f"{name} must be a folder or file of this machine, found the URL {brief(where)}; write its path (for one "
            f"that is really called so, the absolute path)"
        )
    path = Path(text)
    encoded = [os.fsencode(part) for part in path.parts]
    if any(len(part) > _LONGEST_NAME for part in encoded) or len(os.fsencode(path)) > _LONGEST_PATH:
        raise StorageError(
            f"{name} is too long for a path: names have at most {_LONGEST_NAME} bytes each, found {brief(where)}"
        )
    return path


def path_or_url(where: Any, name: str = "out") -> str:
    """A local folder, or a URL of a file system that fsspec knows, as text. Nothing is made.

    Raises:
        StorageError: as `local_folder`; a URL of an unknown file system, or one that lost a slash.
    """
    text = _text(where, name)
    # A name of a file may hold "://", but only after a slash.
    if "://" not in text or text.startswith(("file:", "/", ".")):
        if _LIKE_URL.match(text) and not text.startswith("file:///"):
            raise StorageError(
                f"{name} is neither a path nor a URL, found {brief(where)}; write a URL as text, with two slashes "
                f"(s3://bucket/folder), and a folder of this machine by its path (if it is really called so, the "
                f"absolute path)"
            )
        return str(local_folder(text, name))
    from fsspec import available_protocols

    known = available_protocols()
    for part in text.split("::"):
        scheme = part.partition("://")[0]
        if scheme not in known:
            raise StorageError(
                f"{name} is a URL of a file system that fsspec does not know ({brief(scheme)}), found {brief(where)}; "
                f"write the path of a folder, or a URL such as s3://bucket/folder"
            )
    return text


def file_name(name: str) -> str:
    """One file name for any name of a model, layer, image or label; two different names never share one.

    Letters, digits, spaces and `-_+=,@().` stay as they are. Everything else becomes `%` and its bytes in hexadecimal:
    separators, control characters, dots and spaces at an end, the first letter of names that Windows reserves. Names
    that are too long end in a hash.

    Returns:
        At most 180 bytes; it may stand between a prefix and a suffix.
    """
    # Some file systems take the two ways of writing "é" for one name.
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
    # "%-" begins no escape.
    end = "%-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    shortened, size = [], len(end)
    for unit in units:
        size += len(unit.encode())
        if size > _LONGEST_FILE:
            break
        shortened.append(unit)
    return "".join(shortened) + end


def inside(folder: Path, path: Path) -> Path:
    """A path within a folder to which `replacing` may write: a link there is replaced, and not followed.

    Args:
        folder: that nothing may leave.
        path: of a file in it or in one of its folders; nothing of it need be there.

    Returns:
        The path.

    Raises:
        StorageError: the path leads outside of the folder, by `..` or by a link in place of one of its folders.
    """
    try:
        home, parent = folder.resolve(), path.parent.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle
        raise StorageError(f"cannot write {path}: {error}") from error
    if path.name in ("", "..") or not parent.is_relative_to(home):
        raise StorageError(
            f"cannot write {path}: it leads outside of {folder}, to {parent}; remove the link, or choose another folder"
        )
    return path


def _escaped(letter: str) -> str:
    return "".join(f"%{byte:02X}" for byte in letter.encode("utf-8", "surrogatepass"))


def _text(where: Any, name: str) -> str:
    """The path that a caller gave, as text that a file system accepts."""
    try:
        text = os.fspath(where)
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise StorageError(f"{name} must be the path of a folder or file, found {brief(where)}")
    text = str(text)  # a string of NumPy
    if not text.strip():
        raise StorageError(f"{name} is empty; write the path of a folder or file")
    if "\0" in text:
        raise StorageError(f"{name} holds a NUL character: {brief(where)}")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise StorageError(f"{name} is not a name that a file can have: {brief(where)}") from None
    return text
