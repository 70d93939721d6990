"""The files of a store, in a folder or behind a URL: which there are, how large they are, and what they hold."""

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

# Metadata and tables are a thousand times smaller; more would fill the memory before anything is known of it.
LARGEST_TEXT = 64 << 20
# What the operating system, Zarr, numcodecs, NumPy and zipfile raise for files that are missing, damaged or refused.
# ImportError: the library of a codec or file system is not installed. SystemError: Blosc, for some damaged chunks.
_STORAGE_ERRORS: tuple[type[Exception], ...] = (
    OSError, EOFError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, ImportError, SystemError,
    BadZipFile, zlib.error,
)  # fmt: skip
# Base classes of errors that the libraries behind fsspec raise and that are not OSError: module -> names.
_REMOTE_ERRORS = {
    "aiohttp": ("ClientError",),
    "azure.core.exceptions": ("AzureError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "httpx": ("HTTPError",),
    "paramiko": ("SSHException",),
}


@contextmanager
def storing(doing: str, advice: str = "") -> Iterator[None]:
    """Turns whatever a file system, an object store or a decoder raises into one kind of error.

    Args:
        doing: what failed, for the message, such as "cannot open runs/a.zarr".
        advice: what to do, for the end of the message.

    Raises:
        StorageError: something went wrong.
        CostError: the memory ran out, which says nothing about the files.
    """
    try:
        yield
    except RsmProbeError:
        raise
    except MemoryError as error:
        raise CostError(f"{doing}: the memory ran out; close other programs, or take fewer images") from error
    except _STORAGE_ERRORS + _remote_errors() as error:
        end = f"; {advice}" if advice else ""
        raise StorageError(f"{doing}: {str(error) or type(error).__name__}{end}") from error


def _remote_errors() -> tuple[type[Exception], ...]:
    """Errors of the remote libraries that are loaded: one that is not loaded raised nothing."""
    loaded = ((sys.modules[module], names) for module, names in _REMOTE_ERRORS.items() if module in sys.modules)
    return tuple(getattr(library, name) for library, names in loaded for name in names if hasattr(library, name))


def store_at(where: str) -> str | LocalStore:
    """What Zarr is given of a path or URL.

    As text, Zarr would take a path that holds "::" for a chain of file systems, and write to another folder.
    """
    from zarr.storage import LocalStore

    return where if is_url(where) else LocalStore(where)


class Files:
    """The files of a folder, or behind a URL of a file system that fsspec knows.

    Args:
        where: the path or URL, as `rsm_probe.storage.paths.place` gives it.
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
        """Bytes of a file, or None where there is none of that name."""
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
        """Bytes of all files by their names, which begin behind `under/` and hold slashes; empty where there are none.

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
        """The content of a file.

        Raises:
            StorageError: it cannot be read.
        """
        with storing(f"cannot read {self.where}/{name}"):
            if self._remote is None:
                return (self._folder / name).read_bytes()
            return bytes(self._remote.cat_file(f"{self._root}/{name}"))

    def document(self, name: str, advice: str) -> dict[str, Any]:
        """The JSON object that a file holds.

        Args:
            name: of the file.
            advice: what to do where it is missing or damaged, for the message.

        Raises:
            StorageError: it is missing, too large, nested too deeply, or does not hold a JSON object.
        """
        file, size = f"{self.where}/{name}", self.size(name)
        if size is None:
            raise StorageError(f"{file} is missing; {advice}")
        if size > LARGEST_TEXT:
            raise StorageError(f"{file} holds {size} bytes, more than any file of its kind; {advice}")
        content = self.read(name)
        try:
            document = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise StorageError(f"{file} is damaged: {error}; {advice}") from None
        if not isinstance(document, dict):
            raise StorageError(f"{file} is damaged: it must hold a JSON object; {advice}")
        return document

    def clear(self) -> None:
        """Removes everything, as far as that is possible; an empty folder stays where it was."""
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
