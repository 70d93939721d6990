"""The state of a sweep on disk; a resumed sweep repeats at most one mini-batch."""

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
    """Files with the progress of a sweep, valid only for the settings that started it.

    Each file is replaced atomically, and before any file that relies on it. A sweep that is killed at any moment
    therefore resumes and gives bit-identical results.

    Only one process at a time works in a folder; when it ends or is killed, another may continue.

    Args:
        out: the folder of the sweep; nothing is written before `claim`.
        settings: everything that decides the values of the result.
        advice: end of the message that settings differ.

    Raises:
        StorageError: the folder holds a sweep with different settings; the message names them.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], advice: str = "") -> None:
        self.out, self.folder = out, out / "checkpoint"
        self.settings, self._advice = settings, advice
        self._claimed: tuple[int, ...] | None = None
        self.require_own()

    @property
    def begun(self) -> bool:
        """Whether a sweep has claimed the folder."""
        return (self.folder / "settings.json").exists()

    def require_own(self) -> None:
        """Reject a folder that holds a sweep with different settings.

        Raises:
            StorageError: the settings differ, or the path is a file.
        """
        if self.out.exists() and not self.out.is_dir():
            raise StorageError(f"{self.out} is a file; choose a folder")
        changes = differences(load_json(self.folder / "settings.json"), self.settings) if self.begun else ""
        if changes:
            raise StorageError(
                f"{self.out} holds a sweep with different settings ({changes}); choose another folder or remove it"
                f"{self._advice if 'images was' in changes else ''}"
            )

    def finished(self) -> SweepResult | None:
        """Open the stored result, if there is one.

        Raises:
            StorageError: it was computed with different settings.
        """
        path = self.out / "result.zarr"
        if not path.exists():
            return None
        result = SweepResult.open(path)
        if result.dataset.attrs.get("settings") != json.dumps(self.settings):
            raise StorageError(f"{path} was computed with different settings; choose another folder or remove it")
        return result

    @contextmanager
    def held(self) -> Iterator[None]:
        """Prevent other processes from working in the folder.

        Raises:
            StorageError: another process works in it, or has claimed it for different settings in the meantime.
        """
        with sole_writer(self.folder):
            self.require_own()
            yield

    def claim(self) -> None:
        """Claim the folder, within `held`, by writing the settings.

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
        """Check that the folder is still the one that was claimed.

        Raises:
            StorageError: it was removed or replaced.
        """
        if self._identity() != self._claimed:
            raise StorageError(
                f"{self.out} was removed or replaced while the sweep was running, and its checkpoint is lost; run it "
                f"again, in a folder that is not removed meanwhile"
            )

    def file(self, stage: str) -> Path:
        """The file of the arrays of a stage."""
        return self.folder / f"{stage}.npz"

    def load(self, stage: str) -> dict[str, np.ndarray] | None:
        """Load the arrays that a stage saved last, or return None if it has not begun.

        Raises:
            StorageError: the file is damaged.
        """
        file = self.file(stage)
        return load_arrays(file) if file.exists() else None

    def save(self, stage: str, state: Mapping[str, np.ndarray]) -> None:
        """Replace the arrays of a stage.

        Raises:
            StorageError: the file cannot be written, or as `require_there`.
        """
        self.require_there()
        save_arrays(self.file(stage), state)

    def save_rsms(self, number: int, rsms: BatchRsms) -> None:
        """Save the kept RSMs of one mini-batch.

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
        """Load the kept RSMs of the first `count` mini-batches.

        Raises:
            StorageError: a file is missing or damaged, or as `require_there`.
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
        """Store the result together with its settings.

        Raises:
            StorageError: as `save`.
        """
        self.require_there()
        result.dataset.attrs["settings"] = json.dumps(self.settings)
        result.save(self.out / "result.zarr")
