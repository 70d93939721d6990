"""By what a store recognises RSMs: the content of a model, how it is read, a layer, and a matching."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from rsm_probe.errors import MatchingError
from rsm_probe.forward.token_kinds import SEPARATOR
from rsm_probe.matching.matching import Matching
from rsm_probe.sources.models.reading import Reading

# A matching and its options; see `matching_text`.
MatchingText = str
# What `repr` writes of options that do not say all that they are: addresses, and large arrays in short.
_UNCLEAR = re.compile(r"[^,(=]* at 0x[0-9a-fA-F]+>?|\.\.\.")
# Characters that make the name of a layer in `layouts` more than the name of one module.
_PATTERN = re.compile(r"[*?\[\]#:]")


@dataclass(frozen=True)
class StoredLayer:
    """A layer of a model, by all that decides its tokens of an image.

    Attributes:
        model: fingerprint of the model.
        reading: how it is called and its layers are read, as JSON.
        name: name of the layer, with the kind of its tokens.
    """

    model: str
    reading: str
    name: str

    @classmethod
    def of(cls, fingerprint: str, reading: Reading, name: str) -> StoredLayer:
        """A layer of a loaded model; layouts count that may apply to this layer."""
        settings = {key: value for key, value in reading.settings().items() if key not in ("tokens", "layouts")}
        module = _module(name)
        layouts = {
            pattern: layout
            for pattern, layout in (reading.layouts or {}).items()
            if pattern == module or _PATTERN.search(pattern)
        }
        return cls(fingerprint, json.dumps(settings | ({"layouts": layouts} if layouts else {}), sort_keys=True), name)

    @cached_property
    def key(self) -> str:
        """The hash that stands for the layer in a store."""
        return _hash([self.model, self.reading, self.name])


@dataclass(frozen=True)
class SeriesSet:
    """Series of RSMs whose products lie together: layers of one model, each under one or more matchings.

    A series is a layer under a matching: one RSM in every mini-batch.

    Attributes:
        layers: keys of the layers, in forward order.
        series: (index of a layer, matching), in the order of the arrays.
        bounded: indices of those series whose certified gaps are stored.
        left_out: part of the images -> positions of images that were not computed.
    """

    layers: tuple[str, ...]
    series: tuple[tuple[int, MatchingText], ...]
    bounded: tuple[int, ...] = ()
    left_out: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @classmethod
    def of(
        cls,
        matchings: Mapping[str, Sequence[MatchingText]],
        bounded: frozenset[MatchingText],
        left_out: Mapping[int, Sequence[int]],
    ) -> SeriesSet:
        """The set of these matchings by layer.

        Args:
            matchings: key of a layer -> its matchings.
            bounded: the matchings that certify their products.
            left_out: part -> positions, as in the class.
        """
        layers = tuple(matchings)
        series = tuple((k, matching) for k, key in enumerate(layers) for matching in matchings[key])
        gaps = tuple(k for k, (_, matching) in enumerate(series) if matching in bounded)
        absent = tuple((part, tuple(positions)) for part, positions in sorted(left_out.items()) if len(positions))
        return cls(layers, series, gaps, absent)

    @classmethod
    def from_stored(cls, stored: Mapping[str, list]) -> SeriesSet:
        """Read what `as_stored` wrote."""
        return cls(
            tuple(stored["layers"]),
            tuple((int(layer), str(matching)) for layer, matching in stored["series"]),
            tuple(stored["bounded"]),
            tuple((int(part), tuple(positions)) for part, positions in stored["left_out"]),
        )

    def as_stored(self) -> dict[str, list]:
        """The set as JSON."""
        return {
            "layers": list(self.layers),
            "series": [list(one) for one in self.series],
            "bounded": list(self.bounded),
            "left_out": [[part, list(positions)] for part, positions in self.left_out],
        }

    @cached_property
    def key(self) -> str:
        """The hash that stands for the set in a store."""
        return _hash(self.as_stored())

    def absent(self, part: int) -> tuple[int, ...]:
        """Positions of the images of a part that were not computed."""
        return dict(self.left_out).get(part, ())


def in_forward_order(new: Sequence[str], earlier: Sequence[str], registered: Sequence[str]) -> list[str]:
    """Merge layers of two sweeps of a model, each in forward order.

    Which of two layers runs first is not known if no sweep has both: those are in the order in which the model holds
    them, where that agrees with both sweeps.

    Args:
        new: layers of the later sweep.
        earlier: layers of the earlier one.
        registered: names of modules.
    """
    order = {name: number for number, name in enumerate(registered)}
    held = sorted({**dict.fromkeys(new), **dict.fromkeys(earlier)}, key=lambda layer: order.get(_module(layer), -1))
    if [one for one in held if one in new] == list(new) and [one for one in held if one in earlier] == list(earlier):
        return held
    merged = list(new)
    for number, layer in enumerate(earlier):
        if layer not in merged:
            merged.insert(merged.index(earlier[number - 1]) + 1 if number else 0, layer)
    return merged


def _module(layer: str) -> str:
    """The module of a layer, without the number of a call, a part of its output or the kind of its tokens."""
    return re.split(r"[#\[]", layer.rpartition(SEPARATOR)[0] or layer)[0]


def matching_text(method: Matching) -> MatchingText:
    """By what a store recognises a matching: its options, and the name of a class that is the user's.

    Raises:
        MatchingError: two matchings with different options could have the same text.
    """
    text, kind = repr(method), type(method)
    if unclear := _UNCLEAR.search(text):
        raise MatchingError(
            f"matching {method.name!r} cannot be recognised in a store: its repr holds {unclear[0].strip()!r}, which "
            f"does not say all of an option; give {kind.__name__} a __repr__ that does (of an array, a hash of its "
            f"bytes; of a function, its name), or leave out out="
        )
    own = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
    return text if own else f"{kind.__module__}.{kind.__qualname__}: {text}"


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
