"""The result of a study of brains: the evaluation of all RSMs, and its tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rsm_probe.brains import best, differences
from rsm_probe.errors import StorageError
from rsm_probe.runs.tables import Row, load_table, save_table, with_interval
from rsm_probe.storage.files import open_dataset, save_dataset

if TYPE_CHECKING:
    import xarray as xr

# Names in the run folder: the evaluation, the table of RSMs, and that of differences.
EVALUATION, TABLE, DIFFERENCES = "evaluation.zarr", ("brain.csv", "brain.json"), ("differences.csv", "differences.json")
# How the names of figures begin.
FIGURES = ("explained", "differences")
# What is compared with what in the rows of differences.
NOTIONS_COMPARED, WITH_BEST = "notions of similarity", "best against another"
# What identifies an RSM in rows.
KEYS = ("model", "layer", "matching", "kernel")
_VALUES = ("mean", "low", "high", "p", "p_corrected", "p_ceiling", "p_ceiling_corrected")


@dataclass(frozen=True)
class BrainResult:
    """How well every RSM explains the RDMs of subjects.

    Attributes:
        evaluation: what `rsm_probe.brains.evaluate` returned.
        table: one row per RSM: `rsm` (its label), `model`, `layer`, `matching`, `kernel`, `mean` over subjects with the
            ends of its interval `low` and `high`; `p` and `p_corrected` of explaining nothing, `p_ceiling` and
            `p_ceiling_corrected` of reaching the lower noise ceiling; `above_chance`, `below_ceiling`; `best`, and
            `tied_with_best` for those that cannot be told apart from it.
        differences: one row per pair of RSMs, `rsm_a` minus `rsm_b`: `compared` is "notions of similarity" (a matching
            against the identity at the same layer) or "best against another"; `difference`, `low`, `high`, `p` and
            `p_corrected`.
        facts: `subjects` (what they are), `dimension`, `names`, `joined` (which images are used), `settings` (hash of
            what the result depends on).
        folder: the run folder.
    """

    evaluation: xr.Dataset
    table: list[Row]
    differences: list[Row]
    facts: Mapping[str, Any]
    folder: Path

    @classmethod
    def of(cls, evaluation: xr.Dataset, facts: Mapping[str, Any], folder: Path) -> Self:
        """Compare the RSMs of an evaluation with each other, and tabulate everything."""
        names = {key: [str(value) for value in evaluation[key].values] for key in ("rsm", *KEYS)}
        rows: list[Row] = [
            {key: names[key][k] for key in names} | {key: float(evaluation[key][k]) for key in _VALUES}
            for k in range(len(names["rsm"]))
        ]
        winner, error, ceiling = best(evaluation), _error(evaluation), float(evaluation["ceiling_low"])
        notions = [
            (row["rsm"], other["rsm"])
            for row in rows
            for other in rows
            if other["matching"] == "identity" != row["matching"]
            and all(row[key] == other[key] for key in ("model", "layer", "kernel"))
        ]
        others = [] if winner is None else [(winner, row["rsm"]) for row in rows if row["rsm"] != winner]
        compared = [
            *_compared(evaluation, notions, NOTIONS_COMPARED),
            *_compared(evaluation, others, WITH_BEST),
        ]
        # Where no difference is known, as with a single subject, nothing is told apart.
        apart = {row["rsm_b"] for row in compared if row["compared"] == WITH_BEST and row["p_corrected"] <= error}
        for row in rows:
            row["above_chance"] = row["p_corrected"] <= error
            # The test against the ceiling has two sides.
            row["below_ceiling"] = row["p_ceiling_corrected"] <= error and row["mean"] < ceiling
            row["best"] = row["rsm"] == winner
            row["tied_with_best"] = winner is not None and row["rsm"] not in apart and not row["best"]
        return cls(evaluation, rows, compared, facts, folder)

    def save(self) -> None:
        """Write `brain.csv`, `differences.csv`, and what `open` reads.

        Raises:
            StorageError: a file cannot be written.
        """
        # Figures of an earlier result, whose names depend on the kernels and notions that it had.
        for name in FIGURES:
            for file in (self.folder / "figures").glob(f"{name}*"):
                file.unlink(missing_ok=True)
        self.save_tables()
        # Last, as a run is finished once it is there.
        save_dataset(self.folder / EVALUATION, self.evaluation.assign_attrs(settings=self.facts["settings"]))

    def save_tables(self) -> None:
        """Write `brain.csv`, `differences.csv`, and the same as JSON.

        Raises:
            StorageError: a file cannot be written.
        """
        if self.differences:
            save_table(self.folder, self.differences, DIFFERENCES, {"settings": self.facts["settings"]})
        else:
            for name in DIFFERENCES:
                (self.folder / name).unlink(missing_ok=True)
        save_table(self.folder, self.table, TABLE, {**self.facts, "differences": len(self.differences)})

    @property
    def has_tables(self) -> bool:
        """Whether the tables for readers are there."""
        names = (TABLE[0], DIFFERENCES[0]) if self.differences else TABLE[:1]
        return all((self.folder / name).exists() for name in names)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open the result of a finished run.

        Raises:
            StorageError: the run is not finished, or its result is damaged.
        """
        if not (folder / EVALUATION).is_dir():
            raise StorageError(f"{folder} has no finished run; run it again to continue")
        evaluation = open_dataset(folder / EVALUATION).load()
        table, stored = load_table(folder / TABLE[1])
        facts = {key: value for key, value in stored.items() if key not in ("table", "digest")}
        compared, of = load_table(folder / DIFFERENCES[1]) if facts.pop("differences", 0) else ([], facts)
        # A run that was killed while it wrote another result left files of both.
        if not facts.get("settings") == of.get("settings") == evaluation.attrs.get("settings"):
            raise StorageError(f"{folder} has no finished run; run it again to continue")
        return cls(evaluation, table, compared, facts, folder)

    @property
    def best(self) -> Row | None:
        """The row of the best RSM; None if none explains the subjects better than chance."""
        return next((row for row in self.table if row["best"]), None)

    @property
    def ceiling(self) -> tuple[float, float]:
        """The lower and the upper noise ceiling; NaN where there is none."""
        return float(self.evaluation["ceiling_low"]), float(self.evaluation["ceiling_high"])

    def compared(self, what: str) -> list[Row]:
        """The differences of one kind: `NOTIONS_COMPARED` or `WITH_BEST`."""
        return [row for row in self.differences if row["compared"] == what]

    def __str__(self) -> str:
        first = "none of the RSMs is shown to explain the RDMs"
        if (row := self.best) is not None:
            tied = sum(one["tied_with_best"] for one in self.table)
            first = f"best: {row['rsm']}, {with_interval(row, 'mean')}; not told apart from it: {tied} others"
        return f"{first} ({len(self.table)} rows in {self.folder / TABLE[0]}, {self.facts['joined']})"


def correction_of(stored: str) -> Any:
    """The correction that attributes hold, as functions take it: they hold "none" for None."""
    return None if stored == "none" else stored


def _error(evaluation: xr.Dataset) -> float:
    """The largest p value that counts; 1 - 0.95 is more than 0.05 by a rounding."""
    return 1 - float(evaluation.attrs["level"]) + 1e-12


def _compared(evaluation: xr.Dataset, pairs: Sequence[tuple[str, str]], what: str) -> list[Row]:
    """The differences of pairs of RSMs, corrected together."""
    if not pairs:
        return []
    compared = differences(evaluation, pairs, correction=correction_of(evaluation.attrs["correction"]))
    where = {str(name): k for k, name in enumerate(evaluation["rsm"].values)}
    rows: list[Row] = []
    for k, (a, b) in enumerate(pairs):
        row: Row = {"compared": what, "rsm_a": a, "rsm_b": b}
        for side, name in (("a", a), ("b", b)):
            row |= {f"{key}_{side}": str(evaluation[key].values[where[name]]) for key in KEYS}
        row |= {key: float(compared[key][k]) for key in ("difference", "low", "high", "p", "p_corrected")}
        rows.append({**row, "decided": not math.isnan(row["p_corrected"]) and row["p_corrected"] <= _error(evaluation)})
    return rows
