"""Validators, one per kind of argument: whole numbers, numbers, texts, flags. Errors name the argument."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from numbers import Integral, Real
from typing import Any

from rsm_probe.errors import RsmProbeError, did_you_mean, repeated

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


def positions_of(
    ids: Any, known: Sequence[str], name: str, error: type[RsmProbeError], *, all_of_them: bool = False
) -> list[int]:
    """Find images by name.

    Args:
        ids: names of images, each at most once.
        known: names of all images.
        name: name of the argument, for the message.
        error: type of the error to raise.
        all_of_them: require every image.

    Returns:
        The position in `known` of each name.

    Raises:
        RsmProbeError: of the given type, for no name, names that are not text, repeated or unknown, or an image left
            out.
    """
    names = require_texts(ids, name, error)
    where = {image: position for position, image in enumerate(known)}
    if (twice := repeated(names)) is not None:
        raise error(f"{name} names image {twice!r} more than once")
    if (unknown := next((image for image in names if image not in where), None)) is not None:
        raise error(
            f"{name} names image {brief(unknown)}, which this RSM does not hold"
            f"{did_you_mean(unknown, known, 1) or f'; it holds {listed(known)}'}"
        )
    if all_of_them and len(names) < len(known):
        left = next(image for image in known if image not in set(names))
        raise error(f"{name} leaves out image {left!r}; to leave out images, use subset")
    if not names:
        raise error(f"{name} names no image")
    return [where[image] for image in names]


def shared_names(names: Sequence[str], ids: Sequence[Sequence[str]], error: type[RsmProbeError]) -> list[str]:
    """Return the images that all RSMs hold, in the order of the first.

    Args:
        names: names of the RSMs, for the message.
        ids: names of the images of each RSM.
        error: type of the error to raise.

    Raises:
        RsmProbeError: of the given type, if there is none, or if different numbers of images are called by their
            positions, as they are by default, so that equal names need not be the same image.
    """
    numbered = sorted({len(images) for images in ids if list(images) == [str(k) for k in range(len(images))]})
    if len(numbered) > 1:
        raise error(
            f"images are called by their positions (0 to {numbered[-1] - 1} and 0 to {numbered[0] - 1}), which do not "
            "say which images both RSMs hold; give the names of images as ids="
        )
    first, *others = ids
    in_all = set(first).intersection(*others)
    if not in_all:
        shown = "; ".join(f"{name}: {listed(images, 2)}" for name, images in list(zip(names, ids, strict=True))[:3])
        raise error(f"no image is in all RSMs ({shown}); give the same names to the same images, as ids=")
    return [image for image in first if image in in_all]


def brief(value: Any, most: int = 80) -> str:
    """Write a value as text, truncated so that it does not flood a message."""
    # Truncate long text before it is escaped.
    try:
        text = repr(value[:most] if isinstance(value, str | bytes) else value)
    except (ValueError, RecursionError):  # Python refuses to write huge integers and deeply nested lists
        text = f"a value of type {type(value).__name__} that is too large to show"
    return text if len(text) <= most else f"{text[:most]}..."
