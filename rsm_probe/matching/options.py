"""Matchings with options as text, as in `optimal(gap=0.01)`, for configurations and the command line."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass, replace
from typing import Any

from rsm_probe.errors import MatchingError, did_you_mean, look_up
from rsm_probe.matching.matching import Matching

# Longer texts are not parsed.
_LONGEST = 500
_WORDS = {"true": True, "false": False, "null": None}


def matching_with_options(written: str, methods: Mapping[str, Matching]) -> Matching:
    """Return the method of a text such as `optimal(gap=1e-2)`.

    Values are numbers, words, quoted texts, and tuples of these; no code runs.

    Args:
        written: name of a method, with its options in parentheses.
        methods: name -> method with its default options.

    Raises:
        MatchingError: not of this form, an unknown name, or an option that is unknown or out of its range.
    """
    name, _, _ = written.partition("(")
    name = name.strip()
    method = look_up(name, methods, "matching", MatchingError)
    known = {field.name: field for field in _options(method)}
    given = _parsed(written, name)
    for key in given:
        if key not in known:
            raise MatchingError(
                f"matching {name!r} has no option {key!r}{did_you_mean(key, known)} (known: "
                f"{', '.join(known) or 'none'})"
            )
    try:
        return replace(method, **given) if given else method  # type: ignore[type-var]
    except MatchingError as error:
        raise MatchingError(f"matching {written[:80]!r}: {error}") from None


def label_with_options(method: Matching, methods: Mapping[str, Matching]) -> str:
    """Write a method as `matching_with_options` reads it: its name, and the options that differ from the defaults."""
    default = methods.get(method.name)
    if type(method) is not type(default):
        return method.name
    differing = (
        f"{option.name}={_shown(value)}"
        for option in _options(method)
        if (value := getattr(method, option.name)) not in (None, getattr(default, option.name))
    )
    shown = ", ".join(differing)
    return f"{method.name}({shown})" if shown else method.name


def _options(method: Matching) -> tuple[Field[Any], ...]:
    return tuple(field for field in fields(method) if field.init) if is_dataclass(method) else ()


def _parsed(written: str, name: str) -> dict[str, Any]:
    """The options of a text as values by name."""
    form = f"matching {written[:80]!r} must have the form {name}(option=value, ...)"
    text = written.strip()
    if not text.endswith(")"):
        raise MatchingError(f"{form}, but no parenthesis closes it; put it in quotes where commas separate a list")
    if len(text) > _LONGEST:
        raise MatchingError(f"{form} of at most {_LONGEST} characters")
    try:
        call = ast.parse(f"f{text[text.index('(') :]}", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise MatchingError(form) from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise MatchingError(form)
    options: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in options:
            raise MatchingError(f"{form}, each option once")
        options[keyword.arg] = _value(keyword.value, form)
    return options


def _value(node: ast.expr, form: str) -> Any:
    if isinstance(node, ast.Name):
        return _WORDS.get(node.id, node.id)
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_value(one, form) for one in node.elts)
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        value = ...
    if not (value is None or isinstance(value, (bool, int, float, str))):
        raise MatchingError(f"{form}; values are numbers, words and tuples")
    return value


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        inner = ", ".join(map(_shown, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return value if isinstance(value, str) and value.isidentifier() else repr(value)
