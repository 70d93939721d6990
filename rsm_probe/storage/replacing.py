"""Atomic writes: write beside the destination, then rename, so that the destination is always complete."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from rsm_probe.errors import StorageError
from rsm_probe.storage.paths import local_folder

# Temporary paths that this process is writing.
_under_way: set[Path] = set()
_lock = threading.Lock()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside the destination, and rename it to the destination at the end.

    On any error, the old content stays. A link at the destination is replaced, not followed. Leftovers of killed
    processes are removed.

    Raises:
        StorageError: the temporary path cannot be written or renamed.
    """
    path = local_folder(path, "path")
    if path.name in ("", ".."):
        raise StorageError(f"cannot write {path}: this folder cannot be replaced; add a file name")
    made: list[Path] = []
    done = False
    fresh, stale = _beside(path), _beside(path)
    try:
        made = make_parents(path)
        yield fresh
        if path.is_symlink() and fresh.is_dir():  # a folder cannot be renamed onto a link
            path.rename(stale)
        elif path.is_dir() and not path.is_symlink():  # a folder cannot be replaced in one step
            if not (fresh.is_dir() and (path / ".zgroup").is_file()):
                raise OSError("a folder with other content is at this path")
            path.rename(stale)
        try:
            fresh.replace(path)
        except OSError:
            if stale.is_symlink() or stale.exists():
                stale.rename(path)
            raise
        done = True
        _clear_stale(path)  # last: a leftover may be the only copy of the old content
    except (OSError, TypeError, ValueError) as error:
        raise StorageError(f"cannot write {path}: {error}") from error
    finally:
        for left in (fresh, stale):
            _remove(left)
            with _lock:
                _under_way.discard(left)
        if not done:
            remove_empty(made)


def make_parents(path: Path) -> list[Path]:
    """Make the parent folders of a path.

    Returns:
        The folders that were made, outermost first.

    Raises:
        OSError: a folder cannot be made; those made before it are removed.
    """
    missing = [folder for folder in path.parents if not folder.exists()][::-1]
    made: list[Path] = []
    try:
        for folder in missing:
            folder.mkdir(exist_ok=True)
            made.append(folder)
        path.parent.mkdir(parents=True, exist_ok=True)  # raises if the parent is not a folder
    except OSError:
        remove_empty(made)
        raise
    return made


def remove_empty(folders: list[Path]) -> None:
    """Remove those folders that `make_parents` made and that are still empty."""
    for folder in reversed(folders):
        with suppress(OSError):
            folder.rmdir()


def _beside(path: Path) -> Path:
    """Reserve a name beside a path; it ends in six hexadecimal digits of the process id and two random ones."""
    with _lock:
        while True:
            beside = path.with_name(f".{path.name}.{os.getpid() & 0xFFFFFF:06x}{token_hex(1)}")
            if beside not in _under_way and not beside.exists():
                _under_way.add(beside)
                return beside


def _clear_stale(path: Path) -> None:
    """Remove what processes that no longer run left beside a path."""
    pattern = re.compile(re.escape(f".{path.name}.") + "([0-9a-f]{6})[0-9a-f]{2}")
    with suppress(OSError):
        for file in list(path.parent.iterdir()):
            named = pattern.fullmatch(file.name)
            if named and not _is_used(file, int(named[1], 16)):
                _remove(file)


def _is_used(file: Path, process: int) -> bool:
    if process == os.getpid() & 0xFFFFFF:
        with _lock:
            return file in _under_way
    if os.name != "posix":  # elsewhere, `os.kill` may end the process instead of probing it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
