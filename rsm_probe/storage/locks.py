"""One writer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rsm_probe.errors import StorageError
from rsm_probe.storage.places import is_url, located


@contextmanager
def sole_writer(where: str | Path) -> Iterator[None]:
    """Keeps other processes of this machine from writing into the same folder; killed, a process lets go of it.

    Behind a URL there is no lock: there, two writers write the same bytes into the same chunks.

    Raises:
        StorageError: another process, or thread, is writing; the folder cannot be made.
    """
    if is_url(where):
        yield
        return
    try:
        path = Path(located(where)).resolve()  # a link and what it leads to are one folder
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        if not Path(lock.lock_file).exists():
            raise StorageError(f"cannot write {where}: no lock can be made beside it") from None
        raise StorageError(f"another process is writing {where}; wait for it, or choose another place") from None
    except (OSError, ValueError) as error:  # ValueError: no name that a file can have
        raise StorageError(f"cannot write {where}: {error}") from error
    try:
        yield
    finally:
        lock.release()
