"""The state of a sweep on disk: after an interruption at most one mini-batch is done again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rsm_probe.comparison.grid import RsmKey
from rsm_probe.errors import StorageError
from rsm_probe.storage.files import load_arrays, load_json, save_arrays, save_json
from rsm_probe.storage.settings import differences
from rsm_probe.studies.result import BatchRsms


class Checkpoint:
    """Files that say how far a sweep came, valid only for the settings that began it.

    Every file is replaced in one step and written before the next one relies on it, so that a kill at any moment
    leaves a state from which the sweep continues to the same numbers.

    Args:
        folder: where the files are.
        settings: everything that decides the values of the result.

    Raises:
        StorageError: the folder holds the work of other settings; the message names them.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings = settings
        if not (folder / "settings.json").exists():
            return
        stored = load_json(folder / "settings.json")
        changes = differences(stored, settings)
        if changes:
            raise StorageError(
                f"{folder.parent} holds a sweep with other settings ({changes}); choose another folder or remove it"
            )

    def claim(self) -> None:
        """Writes the settings; from now on the folder is theirs.

        Raises:
            StorageError: the folder cannot be written.
        """
        save_json(self.folder / "settings.json", self.settings)

    def load(self, stage: str) -> dict[str, np.ndarray] | None:
        """The arrays that a stage saved last, or None if it has not begun.

        Raises:
            StorageError: the file is damaged.
        """
        file = self.folder / f"{stage}.npz"
        return load_arrays(file) if file.exists() else None

    def save(self, stage: str, state: Mapping[str, np.ndarray]) -> None:
        """Replaces the arrays of a stage.

        Raises:
            StorageError: the file cannot be written.
        """
        save_arrays(self.folder / f"{stage}.npz", state)

    def save_rsms(self, number: int, rsms: BatchRsms) -> None:
        """Keeps the RSMs of one mini-batch."""
        texts = {
            "keys": np.array([[str(part) for part in key] for key in rsms.keys], dtype=np.str_),
            "ids": np.array(rsms.ids, dtype=np.str_),
            "labels": np.array(rsms.labels, dtype=np.str_),
        }
        save_arrays(self.folder / f"rsms-{number:06d}.npz", {"values": rsms.values, **texts})

    def load_rsms(self, count: int) -> list[BatchRsms]:
        """The RSMs kept of the first `count` mini-batches.

        Raises:
            StorageError: a file is missing or damaged.
        """
        kept = []
        for number in range(count):
            stored = load_arrays(self.folder / f"rsms-{number:06d}.npz")
            kept.append(
                BatchRsms(
                    [RsmKey.from_texts(key) for key in stored["keys"]],
                    stored["values"],
                    [str(name) for name in stored["ids"]],
                    [str(name) for name in stored["labels"]],
                )
            )
        return kept
