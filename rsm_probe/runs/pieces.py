"""Work that is done piece by piece and kept on disk, so that no piece is computed twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from rsm_probe.errors import StorageError
from rsm_probe.storage.files import Arrays, load_arrays, save_arrays

# The name of the array that holds a file's owner.
_OWNER = "owner"


def stacked(
    file: Path,
    owner: str,
    count: int,
    make: Callable[[int], Arrays],
    on_done: Callable[[int], object] = lambda pieces: None,
    save_seconds: float = 10.0,
) -> Arrays:
    """The arrays of `count` pieces, each made once, stacked along a new first axis.

    Finished pieces are written every few seconds, at the end and at an error or interruption; the same call continues.
    A file that is damaged, or of another owner, is replaced.

    Args:
        file: `.npz`.
        owner: text that changes whenever the pieces would: a hash of all that decides them.
        count: number of pieces.
        make: number of a piece -> its arrays, of the same names and shapes for all.
        on_done: called with the number of pieces whenever some are done, those that were read first.
        save_seconds: between two writings.

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
    """Arrays that are made once and then read; see `stacked`."""
    return {name: values[0] for name, values in stacked(file, owner, 1, lambda _: make()).items()}


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
