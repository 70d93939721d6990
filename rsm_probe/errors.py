"""The one family of errors: each says what was wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

_Entry = TypeVar("_Entry")


class RsmProbeError(Exception):
    """Base of every error that rsm_probe raises on purpose."""


class ConfigError(RsmProbeError, ValueError):
    """A configuration holds a wrong key, type or value."""


class ModelError(RsmProbeError, ValueError):
    """A model cannot be found, built or loaded."""


class ImageError(RsmProbeError, ValueError):
    """Images are missing, broken, too few, or of different sizes."""


class LayerError(RsmProbeError, LookupError):
    """A layer is unknown, never ran, or ran more often than its name allows."""


class RepresentationError(RsmProbeError, ValueError):
    """A layer's output is no set of concept vectors, or holds NaN or infinity."""


class MatchingError(RsmProbeError, ValueError):
    """Locations cannot be matched: wrong shape, wrong method, or values that are not finite."""


class ComparisonError(RsmProbeError, ValueError):
    """Two RSMs cannot be compared: other images, too few images, or a value that is undefined."""


class StorageError(RsmProbeError, OSError):
    """A folder or file cannot be read or written, or belongs to other settings."""


class CostError(RsmProbeError, RuntimeError):
    """The work would take more time or memory than allowed."""


def repeated(names: Iterable[str]) -> str | None:
    """The first name that is there more than once, or None."""
    counts = Counter(names)
    return next((name for name, count in counts.items() if count > 1), None)


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """A phrase naming the candidates closest to a mistyped name, for the end of a message."""
    matches = difflib.get_close_matches(name, list(candidates), n=count, cutoff=0.4)
    return f"; nearest: {', '.join(repr(f) for f in matches)}" if matches else ""


def look_up(name: Any, table: Mapping[str, _Entry], what: str, error: type[RsmProbeError]) -> _Entry:
    """An entry of a table by its name.

    Raises:
        RsmProbeError: of the given kind, where there is none of that name; the message holds the known ones.
    """
    if not isinstance(name, str) or name not in table:
        shown = repr(name[:80]) if isinstance(name, str) else repr(name)[:80]
        raise error(f"unknown {what} {shown}{nearest(str(name), table)} (known: {', '.join(table)})")
    return table[name]
