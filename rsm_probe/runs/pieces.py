"""Work in pieces that are stored on disk, so that no piece is computed twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from rsm_probe.errors import StorageError
from rsm_probe.storage.files import Arrays, load_arrays, save_arrays

# The array with the owner of a file.
_OWNER = "owner"


def stacked(
    file: Path,
    owner: str,
    count: int,
    make: Callable[[int], Arrays],
    on_done: Callable[[int], object] = lambda pieces: None,
    save_seconds: float = 10.0,
) -> Arrays:
    """Compute the arrays of `count` pieces, each once, and stack them along a new first axis.

    Finished pieces are written every few seconds, at the end, and at an error or interruption; the same call resumes.
    A damaged file, or one of a different owner, is replaced.

    Args:
        file: the `.npz` file.
        owner: text that changes whenever the pieces do, such as a hash of everything that decides them.
        count: number of pieces.
        make: number of a piece -> its arrays, with the same names and shapes for all pieces.
        on_done: called first with the number of pieces read from the file, then with 1 after each further piece.
        save_seconds: seconds between two writes.

    Raises:
        StorageError: the file cannot be written.
    """
    done = _read(file, owner)
    pieces: dict[str, list[np.ndarray]] = {name: list(values)[:count] for name, values in done.items()}
    start = min((len(values) for values in pieces.values()), default=0)
    on_done(start)
    saved, finished, last = start, start, time.monotonic()

    def write() -> None:
        save_arrays(file, {_OWNER: np.array(owner), **_stack(pieces, finished)})

    try:
        for number in range(start, count):
            for name, values in make(number).items():
                pieces.setdefault(name, []).append(np.asarray(values))
            finished = number + 1
            on_done(1)
            if time.monotonic() - last >= save_seconds:
                write()
                saved, last = finished, time.monotonic()
    finally:
        if finished > saved:
            write()
    return _stack(pieces, count)


def once(file: Path, owner: str, make: Callable[[], Arrays]) -> Arrays:
    """Compute arrays once and read them later; see `stacked`."""
    return {name: values[0] for name, values in stacked(file, owner, 1, lambda _: make()).items()}


def owner_of(file: Path) -> str | None:
    """The owner of stored pieces; None if the file cannot be read."""
    try:
        return str(load_arrays(file).get(_OWNER))
    except StorageError:
        return None


def _read(file: Path, owner: str) -> Arrays:
    if not file.exists():
        return {}
    try:
        arrays = load_arrays(file)
    except StorageError:
        return {}
    return arrays if str(arrays.pop(_OWNER, "")) == owner else {}


def _stack(pieces: Mapping[str, list[np.ndarray]], count: int) -> Arrays:
    return {name: np.stack(values[:count]) for name, values in pieces.items()}
