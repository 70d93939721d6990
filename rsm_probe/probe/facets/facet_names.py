"""The names of facets: `blocks.3.attn[key]`, `blocks.3.attn[key.2]` for one head, `blocks.3.attn[key.*]` for each."""

from __future__ import annotations

import fnmatch
import re
from typing import NamedTuple

QUERY, KEY, VALUE = "query", "key", "value"
FACETS = (QUERY, KEY, VALUE)
_PATTERN = rf"(?P<kind>{'|'.join(FACETS)})(?:\.(?P<head>\d+|\*))?"
_AT_END = re.compile(rf"(?P<layers>.*)\[(?P<key>{_PATTERN})\](?:#(?P<call>\d+))?", re.DOTALL)


class Facet(NamedTuple):
    """A facet of an attention layer.

    Attributes:
        kind: query, key or value.
        head: the head, counted from 0; None for all heads together.
        each: whether every head is a layer of its own.
    """

    kind: str
    head: int | None = None
    each: bool = False


def facet_of(key: str) -> Facet | None:
    """The facet that a key in brackets names, or None."""
    named = re.fullmatch(_PATTERN, key)
    if named is None or not named["head"]:
        return named and Facet(named["kind"])
    each = named["head"] == "*"
    return Facet(named["kind"], None if each else int(named["head"]), each)


def split_pattern(spec: str) -> tuple[str, str, int | None] | None:
    """The pattern of layers, key and call of a name or glob that ends in a facet; None if it does not."""
    named = _AT_END.fullmatch(spec)
    return named and (named["layers"], named["key"], int(named["call"]) if named["call"] else None)


def matches(name: str, pattern: str) -> bool:
    """Whether a name or glob matches the name of a layer; brackets that name a facet are not a character class."""
    literal = re.sub(rf"\[({_PATTERN})\]", r"[[]\1]", pattern)
    return name == pattern or any(fnmatch.fnmatchcase(name, glob) for glob in (pattern, literal))


def did_you_mean_a_facet(key: str) -> str:
    """A hint for a key that resembles a facet, as the end of a message."""
    word = key.lower()
    near = [name for name in FACETS if word and (name.startswith(word) or word.startswith(name[:3]))]
    return f"; did you mean [{near[0]}]?" if near else ""
