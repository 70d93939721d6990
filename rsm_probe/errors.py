"""The project's errors. Every message says what was wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

_Entry = TypeVar("_Entry")


class RsmProbeError(Exception):
    """Base of all errors that rsm_probe raises deliberately.

    Example:
        >>> import rsm_probe
        >>> try:
        ...     rsm_probe.load_model("resnet18")
        ... except rsm_probe.RsmProbeError as error:
        ...     print(type(error).__name__)
        ModelError
    """


class ConfigError(RsmProbeError, ValueError):
    """A configuration contains a wrong key, type or value."""


class ModelError(RsmProbeError, ValueError):
    """A model cannot be found, built or loaded."""


class ImageError(RsmProbeError, ValueError):
    """Images are missing, broken, too few, or of different sizes."""


class LayerError(RsmProbeError, LookupError):
    """A layer is unknown, never ran, or ran more often than its name allows."""


class RepresentationError(RsmProbeError, ValueError):
    """A layer's output is not a set of concept vectors, or contains NaN or infinity."""


class MatchingError(RsmProbeError, ValueError):
    """Locations cannot be matched: wrong shape, wrong method, or non-finite values."""


class ComparisonError(RsmProbeError, ValueError):
    """Two RSMs cannot be compared: different images, too few images, or an undefined value."""


class StorageError(RsmProbeError, OSError):
    """A folder or file cannot be read or written, or was created with different settings."""


class CostError(RsmProbeError, RuntimeError):
    """The work would exceed the allowed time or memory."""


def repeated(names: Iterable[str]) -> str | None:
    """Return the first name that occurs more than once, or None."""
    counts = Counter(names)
    return next((name for name, count in counts.items() if count > 1), None)


def did_you_mean(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """Return a phrase with the candidates closest to a mistyped name, for the end of a message."""
    matches = difflib.get_close_matches(name, list(candidates), n=count, cutoff=0.4)
    return f"; nearest: {', '.join(repr(f) for f in matches)}" if matches else ""


def look_up(name: Any, table: Mapping[str, _Entry], what: str, error: type[RsmProbeError]) -> _Entry:
    """Look up an entry of a table by name.

    Raises:
        RsmProbeError: of the given type, for unknown names; the message lists the known ones.
    """
    if not isinstance(name, str) or name not in table:
        shown = repr(name[:80]) if isinstance(name, str) else repr(name)[:80]
        raise error(f"unknown {what} {shown}{did_you_mean(str(name), table)} (known: {', '.join(table)})")
    return table[name]
