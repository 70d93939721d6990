"""One validator for each kind of argument: whole numbers, numbers, names, choices. Errors name the argument."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from rsm_probe.errors import RsmProbeError


def require_whole(value: Any, name: str, least: int, error: type[RsmProbeError], most: int | None = None) -> None:
    """Refuses anything but a whole number in a range.

    Args:
        value: what was given.
        name: of the argument.
        least: the smallest number allowed.
        error: what to raise.
        most: the largest number allowed, or None.

    Raises:
        RsmProbeError: of the given kind.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise error(f"{name} must be a whole number, found {brief(value)}")
    whole = int(value)
    if whole < least:
        raise error(f"{name} must be at least {least}, found {brief(whole)}")
    if most is not None and whole > most:
        raise error(f"{name} must be at most {most}, found {brief(whole)}")


def require_seed(value: Any, name: str, error: type[RsmProbeError]) -> None:
    """Refuses anything but a seed that PyTorch and NumPy both take: a whole number in [0, 2^63).

    Raises:
        RsmProbeError: of the given kind.
    """
    require_whole(value, name, 0, error, most=2**63 - 1)


def require_number(
    value: Any,
    name: str,
    error: type[RsmProbeError],
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> None:
    """Refuses anything but a finite number in a range.

    Args:
        value: what was given.
        name: of the argument.
        error: what to raise.
        above: the number must exceed this, or None.
        least: the smallest number allowed, or None.
        most: the largest number allowed, or None.

    Raises:
        RsmProbeError: of the given kind.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise error(f"{name} must be a number, found {brief(value)}")
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond float64
        number = math.inf
    if not math.isfinite(number):
        raise error(f"{name} must be a finite number, found {brief(value)}")
    if above is not None and not number > above:
        raise error(f"{name} must be above {above}, found {value}")
    if least is not None and number < least:
        raise error(f"{name} must be at least {least}, found {value}")
    if most is not None and number > most:
        raise error(f"{name} must be at most {most}, found {value}")


def require_text(value: Any, name: str, error: type[RsmProbeError]) -> str:
    """Text that files, tables and stores keep as it is.

    Returns:
        The text; NumPy's own strings become Python's.

    Raises:
        RsmProbeError: of the given kind: not text, a NUL character (NumPy drops it at the end of a string), or half of
            a surrogate pair (file names that are not UTF-8 hold these).
    """
    if not isinstance(value, str):
        hint = f"; write {str(value)!r}" if isinstance(value, Integral) and not isinstance(value, bool) else ""
        raise error(f"{name} must be text, found {brief(value)} ({type(value).__name__}){hint}")
    if "\0" in value:
        raise error(f"{name} holds a NUL character: {brief(value)}")
    if not _is_unicode(value):
        raise error(f"{name} is not valid Unicode (a file name that is not UTF-8?): {brief(value)}")
    return str(value)


def require_texts(values: Any, name: str, error: type[RsmProbeError]) -> list[str]:
    """Several texts, such as ids or labels; see `require_text`.

    Raises:
        RsmProbeError: of the given kind: a single text, no sequence, or an entry that is not text.
    """
    # Sets have no order, by which names and images belong together.
    if isinstance(values, str | bytes | Mapping | set | frozenset) or not isinstance(values, Iterable):
        raise error(f"{name} must be a sequence of texts, found {brief(values)} ({type(values).__name__})")
    try:
        texts = list(values)
    except TypeError:  # a tensor of a single number, for one
        raise error(f"{name} must be a sequence of texts, found {brief(values)} ({type(values).__name__})") from None
    # Millions of ids are checked at once; only where something is wrong, one by one for its place.
    if all(type(text) is str for text in texts):
        together = "".join(texts)
        if "\0" not in together and (together.isascii() or _is_unicode(together)):
            return texts
    return [require_text(value, f"{name}[{number}]", error) for number, value in enumerate(texts)]


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def require_flag(value: Any, name: str, error: type[RsmProbeError]) -> None:
    """Refuses anything but True and False.

    Raises:
        RsmProbeError: of the given kind.
    """
    if type(value).__name__ not in ("bool", "bool_"):  # bool_ is NumPy's
        raise error(f"{name} must be True or False, found {brief(value)}")


def require_callable(value: Any, name: str, error: type[RsmProbeError]) -> None:
    """Refuses what cannot be called.

    Raises:
        RsmProbeError: of the given kind.
    """
    if not callable(value):
        raise error(f"{name} must be a function, found {brief(value)} ({type(value).__name__})")


def brief(value: Any, most: int = 80) -> str:
    """How a value is written, cut where it would flood a message."""
    # Of long text, only what is shown is escaped.
    try:
        text = repr(value[:most] if isinstance(value, str | bytes) else value)
    except (ValueError, RecursionError):  # Python writes no numbers of thousands of digits, nor lists so deeply nested
        text = f"a value of type {type(value).__name__} that is too large to be written here"
    return text if len(text) <= most else f"{text[:most]}..."
