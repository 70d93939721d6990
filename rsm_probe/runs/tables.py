"""Tables of results: rows as CSV and JSON, and Markdown in the layout of the paper."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rsm_probe.errors import ComparisonError, StorageError
from rsm_probe.storage.files import load_json, save_json, save_text

Row = dict[str, Any]
# Text that spreadsheets interpret as a formula, including the full-width forms of its first character.
_FORMULA = re.compile(r"\s*[=+\-@\uFF1D\uFF0B\uFF0D\uFF20]|[\t\r\n]")
# Characters with a meaning in Markdown. Underscores within words have none, and brackets only before an address.
_MARKED = re.compile(r"[\\`*|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|\](?=[(\[:])")


@dataclass(frozen=True)
class TableResult:
    """The result of a study: everything that its report and its figures show.

    Attributes:
        table: rows with equal keys, one per measurement.
        folder: the run folder.
        settings: settings of the study, as in its `config.yaml`.
        pictured: data of figures about single models; empty unless figures are drawn.
    """

    table: list[Row]
    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    pictured: Iterable[Any] = ()

    def save(self, report: str) -> None:
        """Write `table.csv`, `report.md` and the `result.json` that `open` reads.

        Raises:
            StorageError: a file cannot be written.
        """
        save_text(self.folder / "report.md", report)
        save_table(self.folder, self.table)

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any] | None = None) -> Self:
        """Open the result of a finished run, without `pictured`.

        Raises:
            StorageError: the run is not finished, or its result is damaged.
        """
        return cls(load_table(folder / "result.json")[0], folder, settings or {})

    def select(self, **wanted: Any) -> list[Row]:
        """Select the rows with the given values."""
        return [row for row in self.table if all(row.get(key) == value for key, value in wanted.items())]

    def only(self, **wanted: Any) -> Row:
        """Return the only row with the given values.

        Raises:
            ComparisonError: there is none, or more than one.
        """
        rows = self.select(**wanted)
        if len(rows) != 1:
            raise ComparisonError(f"{len(rows)} rows of the table have {wanted}")
        return rows[0]

    def __str__(self) -> str:
        return (
            f"{len(self.table)} rows in {self.folder / 'table.csv'}, in the paper's layout: {self.folder / 'report.md'}"
        )


def save_table(
    folder: Path,
    table: Sequence[Row],
    names: tuple[str, str] = ("table.csv", "result.json"),
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write the rows of a result as CSV and, together with further facts, as JSON that `load_table` reads.

    Raises:
        StorageError: a file cannot be written.
    """
    save_text(folder / names[0], csv_text(table))
    rows = [_plain(row) for row in table]
    save_json(folder / names[1], {**(facts or {}), "table": rows, "digest": _digest(rows)})


def load_table(file: Path) -> tuple[list[Row], dict[str, Any]]:
    """Load the rows of a result, which have equal keys, and all other contents of the file.

    Raises:
        StorageError: the run is not finished, or the file is damaged.
    """
    if not file.exists():
        raise StorageError(f"{file.parent} has no finished run; run it again to continue")
    damaged = f"{file} is damaged; remove it and run again, which reuses everything else in the folder"
    try:
        stored = load_json(file)
    except StorageError as error:
        raise StorageError(f"{damaged} ({error})") from None
    rows: Any = stored.get("table")
    sound = isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)
    sound = sound and all(row.keys() == rows[0].keys() for row in rows)
    # Results of earlier versions have no digest.
    if not sound or stored.get("digest", _digest(rows)) != _digest(rows):
        raise StorageError(damaged)
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in rows], stored


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows with equal keys as CSV that is safe to open in spreadsheets.

    Numbers are unchanged. Text that a spreadsheet would interpret as a formula gets a leading apostrophe, which it does
    not show.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([_inert(key) for key in rows[0]])
    writer.writerows([[_inert(value) for value in row.values()] for row in rows])
    return text.getvalue()


def escaped(text: str) -> str:
    """Escape a name of a model, layer or image set so that Markdown shows it literally, in one line."""
    line = "".join(" " if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter for letter in text)
    marked = _MARKED.sub(lambda match: f"\\{match[0]}", line)
    return marked.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def kernel_title(kernel: str) -> str:
    """The name of a kernel in the paper's tables."""
    return {"cosine": "Cosine Sim.", "linear": "Inner Product", "rbf": "RBF"}.get(kernel, kernel)


def accuracy_line(accuracies: Mapping[str, float]) -> str:
    """A line of Markdown with the accuracies of networks trained for a study; empty without such networks."""
    if not accuracies:
        return ""
    listed = ", ".join(f"{escaped(name)} {value:.2f}" for name, value in accuracies.items())
    return f"Accuracy on held-out images: {listed}.\n"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a table in Markdown with right-aligned numbers and escaped text."""
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [all(isinstance(row[k], int | float) or _is_number(cells[r][k]) for r, row in enumerate(rows))
               for k in range(len(headings))]  # fmt: skip
    lines = [[escaped(heading) for heading in headings], ["---:" if right else "---" for right in numeric], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def shown(value: float, digits: int = 3) -> str:
    """Format a number; a dash for None or NaN."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def with_interval(row: Mapping[str, Any], value: str, low: str = "low", high: str = "high", digits: int = 3) -> str:
    """Format a value of a row with its interval; a dash if the value is missing or NaN."""
    if math.isnan(row.get(value, math.nan)):
        return "-"
    ends = "" if math.isnan(row[low]) else f" [{row[low]:.{digits}f}, {row[high]:.{digits}f}]"
    return f"{row[value]:.{digits}f}{ends}"


def _cell(value: Any) -> str:
    return shown(value) if isinstance(value, float) else escaped(str(value))


def _is_number(text: str) -> bool:
    return text == "-" or (text[:1] in "-+.0123456789" and any(c.isdigit() for c in text))


def _inert(value: Any) -> Any:
    if not isinstance(value, str) or not _FORMULA.match(value):
        return value
    try:
        return value if math.isfinite(float(value)) else f"'{value}"
    except ValueError:
        return f"'{value}"


def _digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _plain(row: Row) -> Row:
    """JSON has no NaN."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
