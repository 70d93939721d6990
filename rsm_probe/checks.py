"""Validators, one per kind of argument: whole numbers, numbers, texts, flags. Errors name the argument."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from numbers import Integral, Real
from typing import Any

from rsm_probe.errors import RsmProbeError

# Characters of a name in a list of names.
_LONGEST_NAME = 60


def require_whole(value: Any, name: str, least: int, error: type[RsmProbeError], most: int | None = None) -> None:
    """Require a whole number in a range.

    Args:
        value: the value to check.
        name: name of the argument, for the message.
        least: smallest number allowed.
        error: type of the error to raise.
        most: largest number allowed, or None.

    Raises:
        RsmProbeError: of the given type.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise error(f"{name} must be a whole number, found {brief(value)}")
    whole = int(value)
    if whole < least:
        raise error(f"{name} must be at least {least}, found {brief(whole)}")
    if most is not None and whole > most:
        raise error(f"{name} must be at most {most}, found {brief(whole)}")


def require_seed(value: Any, name: str, error: type[RsmProbeError]) -> None:
    """Require a seed that PyTorch and NumPy both accept: a whole number in [0, 2^63).

    Raises:
        RsmProbeError: of the given type.
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
    """Require a finite number in a range.

    Args:
        value: the value to check.
        name: name of the argument, for the message.
        error: type of the error to raise.
        above: the number must exceed this, or None.
        least: smallest number allowed, or None.
        most: largest number allowed, or None.

    Raises:
        RsmProbeError: of the given type.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise error(f"{name} must be a number, found {brief(value)}")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond float64
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
    """Require text that files, tables and stores preserve.

    Returns:
        The text; NumPy strings become Python strings.

    Raises:
        RsmProbeError: of the given type, for anything but text, for NUL characters (NumPy drops them at the end of a
            string) and for unpaired surrogates (file names that are not UTF-8 contain them).
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
    """Require a sequence of texts, such as ids or labels; see `require_text`.

    Raises:
        RsmProbeError: of the given type, for a single text, anything but a sequence, or an entry that is not text.
    """
    # Sets have no order, so their texts cannot be assigned to images.
    if isinstance(values, str | bytes | Mapping | set | frozenset) or not isinstance(values, Iterable):
        raise error(f"{name} must be a sequence of texts, found {brief(values)} ({type(values).__name__})")
    try:
        texts = list(values)
    except TypeError:  # e.g. a tensor of a single number
        raise error(f"{name} must be a sequence of texts, found {brief(values)} ({type(values).__name__})") from None
    # Check millions of ids at once; only if something is wrong, check them one by one to locate it.
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
    """Require True or False.

    Raises:
        RsmProbeError: of the given type.
    """
    if type(value).__name__ not in ("bool", "bool_"):  # bool_ is NumPy's
        raise error(f"{name} must be True or False, found {brief(value)}")


def require_callable(value: Any, name: str, error: type[RsmProbeError]) -> None:
    """Require a callable.

    Raises:
        RsmProbeError: of the given type.
    """
    if not callable(value):
        raise error(f"{name} must be a function, found {brief(value)} ({type(value).__name__})")


def listed(names: Collection[object], most: int = 5) -> str:
    """Write the first few of some names, and how many there are if that is not all of them."""
    shown = ", ".join(str(name)[:_LONGEST_NAME] for name in islice(names, most))
    return shown if len(names) <= most else f"{shown}, ... ({len(names)} in all)"


def brief(value: Any, most: int = 80) -> str:
    """Write a value as text, truncated so that it does not flood a message."""
    # Truncate long text before it is escaped.
    try:
        text = repr(value[:most] if isinstance(value, str | bytes) else value)
    except (ValueError, RecursionError):  # Python refuses to write huge integers and deeply nested lists
        text = f"a value of type {type(value).__name__} that is too large to show"
    return text if len(text) <= most else f"{text[:most]}..."
