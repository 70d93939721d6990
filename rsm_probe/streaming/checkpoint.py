"""The state of a sweep on disk: after an interruption at most one mini-batch is done again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from rsm_probe.comparison.grid import RsmKey
from rsm_probe.errors import StorageError
from rsm_probe.storage.differences import differences
from rsm_probe.storage.files import load_arrays, load_json, save_arrays, save_json
from rsm_probe.storage.locks import sole_writer
from rsm_probe.streaming.kept_rsms import BatchRsms
from rsm_probe.streaming.result import SweepResult


class Checkpoint:
    """Files that say how far a sweep came, valid only for the settings that began it.

    Every file is replaced in one step and written before the next one relies on it, so that a kill at any moment
    leaves a state from which the sweep continues to the same numbers.

    One process at a time works in a folder; when it ends, or is killed, the next may continue.

    Args:
        out: the folder of the sweep; nothing is made or written before `claim`.
        settings: everything that decides the values of the result.

    Raises:
        StorageError: the folder holds the work of other settings; the message names them.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self.out, self.folder = out, out / "checkpoint"
        self.settings = settings
        self._claimed: tuple[int, ...] | None = None
        self.require_own()

    @property
    def begun(self) -> bool:
        """Whether a sweep has claimed the folder."""
        return (self.folder / "settings.json").exists()

    def require_own(self) -> None:
        """Refuses a folder of other settings.

        Raises:
            StorageError: it is.
        """
        if self.out.exists() and not self.out.is_dir():
            raise StorageError(f"{self.out} is a file; choose a folder")
        changes = differences(load_json(self.folder / "settings.json"), self.settings) if self.begun else ""
        if changes:
            raise StorageError(
                f"{self.out} holds a sweep with other settings ({changes}); choose another folder or remove it"
            )

    def finished(self) -> SweepResult | None:
        """The stored result, or None if there is none.

        Raises:
            StorageError: it is the result of other settings.
        """
        path = self.out / "result.zarr"
        if not path.exists():
            return None
        result = SweepResult.open(path)
        if result.dataset.attrs.get("settings") != json.dumps(self.settings):
            raise StorageError(f"{path} is the result of other settings; choose another folder or remove it")
        return result

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes from working in the folder.

        Raises:
            StorageError: one does; or one claimed the folder for other settings in the meantime.
        """
        with sole_writer(self.folder):
            self.require_own()
            yield

    def claim(self) -> None:
        """Writes the settings, within `held`; from now on the folder is theirs.

        Raises:
            StorageError: the folder cannot be written.
        """
        save_json(self.folder / "settings.json", self.settings)
        self._claimed = self._identity()

    def _identity(self) -> tuple[int, ...] | None:
        with suppress(OSError):
            status = (self.folder / "settings.json").stat()
            return status.st_dev, status.st_ino, status.st_mtime_ns
        return None

    def require_there(self) -> None:
        """Makes sure that the folder is still the one that was claimed.

        Raises:
            StorageError: somebody removed or replaced it.
        """
        if self._identity() != self._claimed:
            raise StorageError(
                f"{self.out} was removed or replaced while the sweep was running, and its checkpoint is lost; run it "
                f"again, in a folder that stays"
            )

    def file(self, stage: str) -> Path:
        """Where a stage saves its arrays."""
        return self.folder / f"{stage}.npz"

    def load(self, stage: str) -> dict[str, np.ndarray] | None:
        """The arrays that a stage saved last, or None if it has not begun.

        Raises:
            StorageError: the file is damaged.
        """
        file = self.file(stage)
        return load_arrays(file) if file.exists() else None

    def save(self, stage: str, state: Mapping[str, np.ndarray]) -> None:
        """Replaces the arrays of a stage.

        Raises:
            StorageError: the file cannot be written; see `require_there`.
        """
        self.require_there()
        save_arrays(self.file(stage), state)

    def save_rsms(self, number: int, rsms: BatchRsms) -> None:
        """Keeps the RSMs of one mini-batch.

        Raises:
            StorageError: as `save`.
        """
        self.require_there()
        texts = {
            "keys": np.array([[str(part) for part in key] for key in rsms.keys], dtype=np.str_),
            "ids": np.array(rsms.ids, dtype=np.str_),
            "labels": np.array(rsms.labels, dtype=np.str_),
        }
        save_arrays(self.folder / f"rsms-{number:06d}.npz", {"values": rsms.values, **texts})

    def load_rsms(self, count: int) -> list[BatchRsms]:
        """The RSMs kept of the first `count` mini-batches.

        Raises:
            StorageError: a file is missing or damaged; see `require_there`.
        """
        self.require_there()
        batches = []
        for number in range(count):
            stored = load_arrays(self.folder / f"rsms-{number:06d}.npz")
            batches.append(
                BatchRsms(
                    [RsmKey.from_texts(key) for key in stored["keys"]],
                    stored["values"],
                    [str(name) for name in stored["ids"]],
                    [str(name) for name in stored["labels"]],
                )
            )
        return batches

    def save_result(self, result: SweepResult) -> None:
        """Stores the result, with the settings that it is of.

        Raises:
            StorageError: as `save`.
        """
        self.require_there()
        result.dataset.attrs["settings"] = json.dumps(self.settings)
        result.save(self.out / "result.zarr")
