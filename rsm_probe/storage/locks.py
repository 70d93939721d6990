"""Locks that allow one writer at a time, and a watch on the folder that is written."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from rsm_probe.errors import StorageError
from rsm_probe.storage.paths import is_url, located
from rsm_probe.storage.replacing import make_parents, remove_empty


@contextmanager
def sole_writer(where: str | Path) -> Iterator[None]:
    """Keep other processes on this machine from writing into the same folder. A killed process releases the lock.

    If the work fails and leaves no folder, the lock file and newly made parent folders are removed, too. URLs are not
    locked: two writers would write the same bytes into the same chunks.

    Raises:
        StorageError: another process or thread is writing, or the folder cannot be made.
    """
    if is_url(where):
        yield
        return
    made: list[Path] = []
    try:
        path = Path(located(where)).resolve()  # a link and its target are one folder
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        there = Path(lock.lock_file).exists()
        made = make_parents(path)
        lock.acquire(timeout=0)
        held = os.stat(lock.lock_file)
    except Timeout:
        remove_empty(made)
        if not Path(lock.lock_file).exists():
            raise StorageError(f"cannot write {where}: cannot create a lock file beside it") from None
        raise StorageError(f"another process is writing {where}; wait for it, or choose another path") from None
    except (OSError, ValueError, RuntimeError) as error:  # an invalid file name, or circular links
        remove_empty(made)
        raise StorageError(f"cannot write {where}: {error}") from error
    failed = True
    try:
        yield
        failed = False
    finally:
        # Removing the file would mislead a process that waits for the lock, but no process waits for one here.
        if failed and not there:
            with suppress(OSError):
                # If the folder was removed and made again, the lock file there belongs to another process.
                if os.path.samestat(held, os.stat(lock.lock_file)):
                    Path(lock.lock_file).unlink()
        lock.release()
        if failed:
            remove_empty(made)


class WatchedFolder:
    """Tells a folder from another that takes its path later.

    Args:
        where: the folder; a URL is not watched.
    """

    def __init__(self, where: str | Path) -> None:
        self._where = where
        self._status: os.stat_result | None = None
        with suppress(OSError, ValueError):
            self._status = os.stat(where)
            # File systems give the number of a removed folder to the next one, but not while it is open.
            weakref.finalize(self, os.close, os.open(where, os.O_RDONLY))

    def is_there(self) -> bool:
        """Whether the folder was neither removed nor replaced; true of what is not watched."""
        if self._status is None:
            return True
        try:
            return os.path.samestat(self._status, os.stat(self._where))
        except OSError:
            return False
