"""What a study states, as a table: rows for CSV, and Markdown in the layout of the paper."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rsm_probe.errors import ComparisonError, StorageError
from rsm_probe.storage.files import load_json, save_json, save_text

Row = dict[str, Any]


@dataclass(frozen=True)
class TableResult:
    """The result of a study.

    Attributes:
        table: rows of equal keys, one for each thing that was measured.
        folder: of the run.
    """

    table: list[Row]
    folder: Path

    def save(self, report: str) -> None:
        """Writes `table.csv`, `report.md` and what `open` reads.

        Raises:
            StorageError: a file cannot be written.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.table[0]))
        writer.writeheader()
        writer.writerows(self.table)
        save_text(self.folder / "table.csv", text.getvalue())
        save_text(self.folder / "report.md", report)
        save_json(self.folder / "result.json", {"table": [_plain(row) for row in self.table]})

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The result of a finished run.

        Raises:
            StorageError: the run is not finished.
        """
        if not (folder / "result.json").exists():
            raise StorageError(f"{folder} holds no finished run; run it again, it continues")
        rows = load_json(folder / "result.json")["table"]
        return cls([{key: math.nan if value is None else value for key, value in row.items()} for row in rows], folder)

    def select(self, **wanted: Any) -> list[Row]:
        """The rows that have these values."""
        return [row for row in self.table if all(row[key] == value for key, value in wanted.items())]

    def only(self, **wanted: Any) -> Row:
        """The one row that has these values.

        Raises:
            ComparisonError: there is none, or several.
        """
        rows = self.select(**wanted)
        if len(rows) != 1:
            raise ComparisonError(f"{len(rows)} rows of the table have {wanted}")
        return rows[0]

    def __str__(self) -> str:
        return (
            f"{len(self.table)} rows in {self.folder / 'table.csv'}, in the paper's layout: {self.folder / 'report.md'}"
        )


def kernel_title(kernel: str) -> str:
    """What the paper calls a kernel in its tables."""
    return {"cosine": "Cosine Sim.", "linear": "Inner Product", "rbf": "RBF"}.get(kernel, kernel)


def accuracy_line(accuracies: Mapping[str, float]) -> str:
    """How well the networks that were trained for a study do what they were trained for."""
    if not accuracies:
        return ""
    listed = ", ".join(f"{name} {value:.2f}" for name, value in accuracies.items())
    return f"Accuracy on held-out images: {listed}.\n"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown; numbers are aligned to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [all(isinstance(row[k], int | float) or _is_number(cells[r][k]) for r, row in enumerate(rows))
               for k in range(len(headings))]  # fmt: skip
    lines = [list(headings), ["---:" if right else "---" for right in numeric], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def shown(value: float, digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def with_interval(row: Mapping[str, Any], value: str, low: str = "low", high: str = "high", digits: int = 3) -> str:
    """A value of a row with its interval; a dash where there is none, such as a gain over what was not compared."""
    if math.isnan(row.get(value, math.nan)):
        return "-"
    ends = "" if math.isnan(row[low]) else f" [{row[low]:.{digits}f}, {row[high]:.{digits}f}]"
    return f"{row[value]:.{digits}f}{ends}"


def _cell(value: Any) -> str:
    return shown(value) if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    return text == "-" or (text[:1] in "-+.0123456789" and any(c.isdigit() for c in text))


def _plain(row: Row) -> Row:
    """JSON has no NaN."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
