"""One writer at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from rsm_probe.errors import StorageError
from rsm_probe.storage.paths import is_url, located
from rsm_probe.storage.replacing import make_parents, remove_empty


@contextmanager
def sole_writer(where: str | Path) -> Iterator[None]:
    """Keeps other processes of this machine from writing into the same folder; killed, a process lets go of it.

    Of work that fails and leaves no folder, the lock and the folders above are not left either. Behind a URL there is
    no lock: there, two writers write the same bytes into the same chunks.

    Raises:
        StorageError: another process, or thread, is writing; the folder cannot be made.
    """
    if is_url(where):
        yield
        return
    made: list[Path] = []
    try:
        path = Path(located(where)).resolve()  # a link and what it leads to are one folder
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        there = Path(lock.lock_file).exists()
        made = make_parents(path)
        lock.acquire(timeout=0)
        held = os.stat(lock.lock_file)
    except Timeout:
        remove_empty(made)
        if not Path(lock.lock_file).exists():
            raise StorageError(f"cannot write {where}: no lock can be made beside it") from None
        raise StorageError(f"another process is writing {where}; wait for it, or choose another place") from None
    except (OSError, ValueError, RuntimeError) as error:  # no name that a file can have; links in a circle
        remove_empty(made)
        raise StorageError(f"cannot write {where}: {error}") from error
    failed = True
    try:
        yield
        failed = False
    finally:
        # A process that waits for a lock would not notice its removal, but none waits here.
        if failed and not there:
            with suppress(OSError):
                # Where the folder was removed and made again, the lock there is another's.
                if os.path.samestat(held, os.stat(lock.lock_file)):
                    Path(lock.lock_file).unlink()
        lock.release()
        if failed:
            remove_empty(made)
