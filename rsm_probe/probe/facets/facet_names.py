"""The names of facets: `blocks.3.attn[key]`, and `blocks.3.attn[key.2]` for one head."""

from __future__ import annotations

import re
from typing import NamedTuple

QUERY, KEY, VALUE = "query", "key", "value"
FACETS = (QUERY, KEY, VALUE)
_PATTERN = rf"(?P<kind>{'|'.join(FACETS)})(?:\.(?P<head>\d+))?"
_AT_END = re.compile(rf"(?P<layers>.*)\[(?P<key>{_PATTERN})\](?:#(?P<call>\d+))?", re.DOTALL)


class Facet(NamedTuple):
    """A facet of an attention layer: all heads, or one, counted from 0."""

    kind: str
    head: int | None


def facet_of(key: str | None) -> Facet | None:
    """The facet that a key in brackets names, or None."""
    named = re.fullmatch(_PATTERN, key or "")
    return named and Facet(named["kind"], int(named["head"]) if named["head"] else None)


def split_pattern(spec: str) -> tuple[str, str, int | None] | None:
    """The pattern of layers, key and call of a name or glob that ends in a facet; None if it does not."""
    named = _AT_END.fullmatch(spec)
    return named and (named["layers"], named["key"], int(named["call"]) if named["call"] else None)


def did_you_mean_a_facet(key: str) -> str:
    """A hint for a key that resembles a facet, as the end of a message."""
    word = key.lower()
    near = [name for name in FACETS if word and (name.startswith(word) or word.startswith(name[:3]))]
    return f"; did you mean [{near[0]}]?" if near else ""
