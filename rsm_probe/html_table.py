"""One small HTML table for every object that a notebook shows: no script, and no colours but the notebook's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import islice

# Rows of a table, and letters of a text that are shown.
_MOST_ROWS, _MOST_LETTERS = 12, 100
# Notebooks align cells to the right and draw no lines. A translucent grey is seen on white and on black.
_CELL = "text-align:left; padding:0.2em 1em 0.2em 0"
_HEAD = f"{_CELL}; border-bottom:1px solid rgba(128,128,128,0.6)"


def html_table(
    title: str,
    facts: Mapping[str, object],
    columns: Sequence[str] = (),
    rows: Iterable[Sequence[object]] = (),
    *,
    count: int = 0,
    note: str = "",
) -> str:
    """Write facts on an object and a table of its parts as HTML, every text of it escaped.

    Args:
        title: name of the class.
        facts: name -> value, shown in one line; those that are None or "" are left out.
        columns: heads of the table; if empty, no table is written.
        rows: cells in the order of `columns`. Only the first twelve rows are read and shown.
        count: number of all rows, for a last line that says how many are missing.
        note: a sentence below the table.

    Returns:
        A `<div>`. Numbers have four digits; undefined numbers and texts longer than 100 letters say so.
    """
    known = " &middot; ".join(
        f"{_text(name)} {_text(value)}" for name, value in facts.items() if value not in (None, "")
    )
    parts = [f"<strong>{_text(title)}</strong>{': ' if known else ''}{known}"]
    if columns:
        head = "".join(f'<th scope="col" style="{_HEAD}">{_text(name)}</th>' for name in columns)
        shown = list(islice(rows, _MOST_ROWS))
        lines = ["".join(f'<td style="{_CELL}">{_text(cell)}</td>' for cell in row) for row in shown]
        if count > len(shown):
            lines.append(f'<td colspan="{len(columns)}" style="{_CELL}">… and {count - len(shown):,} more</td>')
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    if note:
        parts.append(f"<div>{_text(note)}</div>")
    return f"<div>{''.join(parts)}</div>"


def _text(value: object) -> str:
    """A value as escaped text."""
    if isinstance(value, float):
        return "undefined" if value != value else f"{value:.4g}"
    text = str(value)
    return escape(text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 1]}…")
