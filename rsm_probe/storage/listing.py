"""The files of a store, in a folder or behind a URL: their names, sizes and contents."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from rsm_probe.errors import CostError, RsmProbeError, StorageError
from rsm_probe.storage.paths import is_url

if TYPE_CHECKING:
    from zarr.storage import LocalStore

# Real metadata and tables are a thousand times smaller; a larger file could fill the memory before it is parsed.
LARGEST_TEXT = 64 << 20
# Raised by the operating system, Zarr, numcodecs, NumPy and zipfile for missing, damaged or inaccessible files.
# ImportError: the library for a codec or file system is not installed. SystemError: Blosc, for some damaged chunks.
# AttributeError: Zarr, for metadata that are valid JSON of the wrong type. SyntaxError: NumPy, for a damaged header.
_STORAGE_ERRORS: tuple[type[Exception], ...] = (
    OSError, EOFError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, ImportError, SystemError,
    AttributeError, SyntaxError, BadZipFile, zlib.error,
)  # fmt: skip
# Errors of decoders, and of the libraries behind fsspec, that derive from none of these: module -> base classes.
_LIBRARY_ERRORS = {
    "aiohttp": ("ClientError",),
    "azure.core.exceptions": ("AzureError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "ftplib": ("Error",),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "httpx": ("HTTPError",),
    "lzma": ("LZMAError",),
    "paramiko": ("SSHException",),
    "smbprotocol.exceptions": ("SMBException",),
    "tarfile": ("TarError",),
    "tokenize": ("TokenError",),
}


@contextmanager
def storing(doing: str, advice: str = "") -> Iterator[None]:
    """Turn the errors of file systems, object stores and decoders into StorageError; others pass unchanged.

    Args:
        doing: what failed, such as "cannot open runs/a.zarr"; begins the message.
        advice: what the user can do; ends the message.

    Raises:
        StorageError: a file is missing, damaged or inaccessible.
        CostError: the memory ran out, which says nothing about the files.
    """
    try:
        yield
    except RsmProbeError:
        raise
    except MemoryError as error:
        raise CostError(f"{doing}: the memory ran out; close other programs, or use fewer images") from error
    except _STORAGE_ERRORS + _library_errors() as error:
        end = f"; {advice}" if advice else ""
        raise StorageError(f"{doing}: {str(error) or type(error).__name__}{end}") from error


def _library_errors() -> tuple[type[Exception], ...]:
    """The errors of those libraries that are loaded; the others cannot have raised anything."""
    loaded = ((sys.modules[module], names) for module, names in _LIBRARY_ERRORS.items() if module in sys.modules)
    return tuple(getattr(library, name) for library, names in loaded for name in names if hasattr(library, name))


def store_at(where: str) -> str | LocalStore:
    """Convert a path or URL to a store that Zarr opens.

    Zarr would read a path that contains "::" as a chain of file systems if it were given as text.
    """
    from zarr.storage import LocalStore

    return where if is_url(where) else LocalStore(where)


class Files:
    """The files of a folder, or behind a URL of a file system that fsspec knows.

    Args:
        where: the path or URL, as `rsm_probe.storage.paths.path_or_url` returns it.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._remote: Any = None
        if is_url(where):
            from fsspec.core import url_to_fs

            with storing(f"cannot open {where}"):
                self._remote, self._root = url_to_fs(where)
        else:
            self._folder = Path(where)

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None if there is no file of that name."""
        with storing(f"cannot read {self.where}/{name}"):
            if self._remote is None:
                path = self._folder / name
                return path.stat().st_size if path.is_file() else None
            self._remote.invalidate_cache()
            try:
                info = self._remote.info(f"{self._root}/{name}")
            except FileNotFoundError:
                return None
            return int(info["size"] or 0) if info["type"] == "file" else None

    def sizes(self, under: str = "") -> dict[str, int]:
        """Map the names of all files below a folder, relative to it and with slashes, to their sizes in bytes.

        Raises:
            StorageError: they cannot be listed.
        """
        with storing(f"cannot read {self.where}/{under}"):
            if self._remote is None:
                folder = self._folder / under
                return dict(_listed(str(folder), "")) if folder.is_dir() else {"": 0} if folder.exists() else {}
            self._remote.invalidate_cache()
            root = f"{self._root}/{under}".rstrip("/")
            infos = self._remote.find(root, detail=True)
            return {name[len(root) + 1 :]: int(info["size"] or 0) for name, info in infos.items()}

    def read(self, name: str) -> bytes:
        """Read a file.

        Raises:
            StorageError: it cannot be read.
        """
        with storing(f"cannot read {self.where}/{name}"):
            if self._remote is None:
                return (self._folder / name).read_bytes()
            return bytes(self._remote.cat_file(f"{self._root}/{name}"))

    def document(self, name: str, advice: str) -> dict[str, Any]:
        """Read the JSON object in a file.

        Args:
            name: name of the file.
            advice: what the user can do if the file is missing or damaged; ends the error message.

        Raises:
            StorageError: the file is missing, too large, nested too deeply, or does not hold a JSON object.
        """
        file, size = f"{self.where}/{name}", self.size(name)
        if size is None:
            raise StorageError(f"{file} is missing; {advice}")
        if size > LARGEST_TEXT:
            raise StorageError(f"{file} holds {size} bytes, too many for such a file; {advice}")
        content = self.read(name)
        try:
            document = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise StorageError(f"{file} is damaged: {error}; {advice}") from None
        if not isinstance(document, dict):
            raise StorageError(f"{file} is damaged: it must hold a JSON object; {advice}")
        return document

    def clear(self) -> None:
        """Remove all files, ignoring errors; the emptied folder remains."""
        with suppress(OSError, StorageError):
            if self._remote is not None:
                self._remote.rm(self._root, recursive=True)
                return
            for path in self._folder.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _listed(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _listed(entry.path, f"{prefix}{entry.name}/")
            else:
                yield f"{prefix}{entry.name}", entry.stat(follow_symlinks=False).st_size
