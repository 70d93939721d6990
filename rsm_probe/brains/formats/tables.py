"""`.csv` and `.tsv`: square matrices and long tables of pairs, and names of images from columns and lines."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rsm_probe.brains.formats.stored import ReadOptions, StoredRdm, readable, require_room
from rsm_probe.checks import brief, listed
from rsm_probe.errors import ComparisonError, StorageError, did_you_mean, repeated

SEPARATORS = {".csv": ",", ".tsv": "\t"}
_IMAGES = ("image_a", "image_b")
_FORMS = (
    "a table of RDMs is square, with or without a row and a column of image names, or has the columns image_a, image_b "
    "and value"
)
# BIDS writes "n/a".
_MISSING = ("", "nan", "na", "n/a")

Rows = list[list[str]]


def read_table(file: Path, options: ReadOptions) -> list[StoredRdm]:
    """Read a square table, or a long one with a row per pair of images.

    A square table may have a row and a column of image names. A long table has the columns image_a and image_b, values
    in a column that is called "value" (or by `options.key`, or any if it is the only other one), and possibly subjects
    in a column that is called by `options.dimension` (or by `options.subjects`). Pairs without a row are NaN.

    Raises:
        StorageError: the file is missing or not a table of text.
        ComparisonError: the table has neither form, unknown columns, pairs that occur twice, or cells without numbers.
    """
    rows = _read_rows(file)
    if set(_IMAGES) <= set(rows[0]):
        return _of_pairs(rows, file, options)
    options.require_plain(file, ("key", "descriptor", "subjects"), f"only tables with columns {listed(_IMAGES)} have")
    return [_square(rows, file)]


def read_names(ids: str | Path) -> list[str]:
    """Read names of images from a text file, one per line, or from a column of a table.

    Args:
        ids: the path of a text file; or of a table with a row of column names, a colon, and the name of a column, such
            as "events.tsv:stimulus".

    Raises:
        StorageError: there is no such file, or it is not text.
        ComparisonError: there is no such column, or no name.
    """
    path, _, column = str(ids).rpartition(":")
    file = Path(path or ids).expanduser()
    if path and file.suffix.lower() in SEPARATORS:
        header, *rows = _read_rows(file)
        if column not in header:
            raise ComparisonError(
                f"{file} has no column {brief(column)}{did_you_mean(column, header)} (it has {listed(header, 20)})"
            )
        names = [row[header.index(column)] for row in rows]
    else:
        file = Path(ids).expanduser()
        if file.suffix.lower() in SEPARATORS:
            raise ComparisonError(f"{file}, which ids= names, is a table; name its column, too: '{file}:COLUMN'")
        if not file.is_file():
            raise StorageError(
                f"there is no file {brief(str(ids))}; ids takes a list of names, a text file with one name per line, "
                "or a column such as 'table.csv:image'"
            )
        with readable(file):
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ComparisonError(f"{file}, which ids= names, holds no names of images")
    return names


def _read_rows(file: Path) -> Rows:
    """All cells of a table, without space around them; rows are equally long."""
    with readable(file), file.open(encoding="utf-8-sig", newline="") as stream:
        try:
            reader = csv.reader(stream, delimiter=SEPARATORS[file.suffix.lower()])
            rows = [[cell.strip() for cell in row] for row in reader if row]
        except csv.Error as error:
            raise StorageError(f"cannot read {file}: {error}") from error
    if not rows:
        raise ComparisonError(f"{file} is empty; {_FORMS}")
    if len(rows[0]) == 1 and ";" in rows[0][0]:
        raise ComparisonError(
            f"{file} is separated by semicolons; separate its cells by commas, or tabs in a .tsv file"
        )
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise ComparisonError(f"{file} has {len(rows[0])} columns in its first row and {len(row)} in row {number}")
    return rows


def _number(cell: str) -> float:
    return math.nan if cell.lower() in _MISSING else float(cell)


def _is_number(cell: str) -> bool:
    try:
        return not math.isnan(_number(cell))
    except ValueError:
        return False


def _numbers(rows: Sequence[Sequence[str]], where: str, first_row: int, first_column: int) -> np.ndarray:
    """Convert rows of cells to numbers; NaN where they are empty, "nan" or "n/a"."""
    try:
        return np.array([[_number(cell) for cell in row] for row in rows])
    except ValueError:
        pass
    bad = ((r, c, cell) for r, row in enumerate(rows, first_row) for c, cell in enumerate(row, first_column))
    row, column, cell = next(entry for entry in bad if entry[2].lower() not in _MISSING and not _is_number(entry[2]))
    comma = "; write decimal points" if re.fullmatch(r"[-+]?\d+,\d+", cell) else ""
    raise ComparisonError(f"{where} holds {brief(cell)} in row {row}, column {column}, which is not a number{comma}")


def _square(rows: Rows, file: Path) -> StoredRdm:
    """A square table. Its shape says whether it has names, and its corner, if it has them above and beside or not."""
    height, width = len(rows), len(rows[0])
    top, left = height == width + 1, width == height + 1
    if height == width > 1 and not _is_number(rows[0][0]):
        _require_clear_corner(rows, file)
        top = left = True
    if height - top != width - left:
        raise ComparisonError(f"{file} has {height} rows and {width} columns; {_FORMS}")
    above = rows[0][left:] if top else None
    beside = [row[0] for row in rows[top:]] if left else None
    if above is not None and beside is not None and above != beside:
        column, row = next(names for names in zip(above, beside, strict=True) if names[0] != names[1])
        raise ComparisonError(f"the columns and rows of {file} name different images, first {column!r} and {row!r}")
    values = _numbers([row[left:] for row in rows[top:]], str(file), 1 + top, 1 + left)
    return StoredRdm(values, ids=above or beside)


def _require_clear_corner(rows: Rows, file: Path) -> None:
    """Refuse a table whose first row may be names or distances, because no cell on its diagonal is a number."""
    on_diagonal = any(_is_number(rows[k][k]) for k in range(1, len(rows)))
    if rows[0][0].lower() in _MISSING and not on_diagonal and all(map(_is_number, rows[0][1:])):
        raise ComparisonError(
            f"the first row of {file} may hold names of images or distances, as its diagonal is empty; write 0 on the "
            "diagonal"
        )


def _of_pairs(rows: Rows, file: Path, options: ReadOptions) -> list[StoredRdm]:
    """One RDM per subject of a long table."""
    options.require_plain(file, ("descriptor",), f"its columns {listed(_IMAGES)} name images")
    header, *rows = rows
    if (twice := repeated(header)) is not None:
        raise ComparisonError(f"{file} has two columns {twice!r}")
    if not rows:
        raise ComparisonError(f"{file} has no rows below its header")
    subject = options.subjects or (options.dimension if options.dimension in header else None)
    others = [name for name in header if name not in (*_IMAGES, subject)]
    column = options.key or ("value" if len(others) != 1 else others[0])
    for name, argument in ((column, "key"), (subject, "names")):
        if name is not None and name not in header:
            raise ComparisonError(
                f"{file} has no column {name!r}{did_you_mean(name, header)}; name one by {argument}= (there are "
                f"{listed(header, 20)})"
            )
    first, second = (header.index(name) for name in _IMAGES)
    images = list(dict.fromkeys(row[side] for row in rows for side in (first, second)))
    if options.ids is not None:
        if (unknown := next((image for image in images if image not in options.ids), None)) is not None:
            raise ComparisonError(f"ids= leaves out image {unknown!r} of {file}")
        images = list(options.ids)
    position = {image: k for k, image in enumerate(images)}
    at = header.index(column)
    values = _numbers([[row[at]] for row in rows], str(file), 2, at + 1)[:, 0]
    subjects = [None if subject is None else row[header.index(subject)] for row in rows]
    order = list(dict.fromkeys(subjects))
    require_room(len(order) * len(images) ** 2, str(file))
    matrices = {name: np.full((len(images), len(images)), np.nan) for name in order}
    pairs = [(name, row[first], row[second]) for name, row in zip(subjects, rows, strict=True)]
    if len(set(pairs)) < len(pairs):
        name, a, b = next(pair for pair, count in Counter(pairs).items() if count > 1)
        whose = "" if name is None else f" of {name}"
        raise ComparisonError(f"{file} has two rows for the images {a!r} and {b!r}{whose}; average them")
    for (name, a, b), value in zip(pairs, values, strict=True):
        matrices[name][position[a], position[b]] = value
    return [_mirrored(matrix, name, images) for name, matrix in matrices.items()]


def _mirrored(matrix: np.ndarray, name: str | None, images: Sequence[str]) -> StoredRdm:
    """Fill pairs that are listed in one order only, and the diagonal of distances if it is not listed."""
    matrix = np.where(np.isnan(matrix), matrix.T, matrix)
    if pairs_only := bool(np.isnan(np.diagonal(matrix)).all()):
        np.fill_diagonal(matrix, 0.0)
    return StoredRdm(matrix, name, images, pairs_only=pairs_only)
