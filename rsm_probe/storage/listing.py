"""The files of a store, in a folder or behind a URL: which there are, how large they are, and what they hold."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsm_probe.errors import CostError, RsmProbeError, StorageError
from rsm_probe.storage.places import is_url

if TYPE_CHECKING:
    from zarr.storage import LocalStore

# Metadata and tables are a thousand times smaller; more would fill the memory before anything is known of it.
LARGEST_TEXT = 64 << 20


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
    except Exception as error:
        end = f"; {advice}" if advice else ""
        raise StorageError(f"{doing}: {str(error) or type(error).__name__}{end}") from error


def store_at(where: str) -> str | LocalStore:
    """What Zarr is given of a path or URL.

    As text, Zarr would take a path that holds "::" for a chain of file systems, and write to another folder.
    """
    from zarr.storage import LocalStore

    return where if is_url(where) else LocalStore(where)


class Files:
    """The files of a folder, or behind a URL of a file system that fsspec knows.

    Args:
        where: the path or URL, as `rsm_probe.storage.places.place` gives it.
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
                found = self._remote.info(f"{self._root}/{name}")
            except FileNotFoundError:
                return None
            return int(found["size"] or 0) if found["type"] == "file" else None

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
            found = self._remote.find(root, detail=True)
            return {name[len(root) + 1 :]: int(about["size"] or 0) for name, about in found.items()}

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
            StorageError: it is missing, too large, or does not hold a JSON object.
        """
        size = self.size(name)
        if size is None:
            raise StorageError(f"{self.where}/{name} is missing; {advice}")
        return parsed(self.read(name) if size <= LARGEST_TEXT else size, f"{self.where}/{name}", advice)

    def clear(self) -> None:
        """Removes everything, as far as that is possible; an empty folder stays where it was."""
        with suppress(OSError, StorageError):
            if self._remote is not None:
                self._remote.rm(self._root, recursive=True)
                return
            for path in self._folder.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def parsed(content: bytes | int, file: str, advice: str) -> dict[str, Any]:
    """A JSON object.

    Args:
        content: what the file holds, or its size where it is too large to be read.
        file: its name, for messages.
        advice: what to do, for messages.

    Raises:
        StorageError: not a JSON object, nested too deeply, or too large.
    """
    if isinstance(content, int):
        raise StorageError(f"{file} holds {content} bytes, more than any file of its kind; {advice}")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{file} is damaged: {error}; {advice}") from None
    if not isinstance(found, dict):
        raise StorageError(f"{file} is damaged: it must hold a JSON object; {advice}")
    return found


def _listed(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _listed(entry.path, f"{prefix}{entry.name}/")
            else:
                yield f"{prefix}{entry.name}", entry.stat(follow_symlinks=False).st_size
