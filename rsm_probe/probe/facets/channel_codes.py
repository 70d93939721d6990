"""Encodes as numbers which channels of which projections a value comes from, or which attention it belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rsm_probe.probe.tracing.location_codes import NOWHERE
from rsm_probe.probe.tracing.origins import compact, held_once

# Channels, each with the number of its projection.
Channels = frozenset[tuple[int, int]]


@dataclass(eq=False)
class Attention:
    """One attention operation: its operands, each with the channels of every head, or None where unknown.

    Attributes:
        rows: the left factor of the scores.
        columns: their right factor.
        query: the queries; known after the softmax.
        key: the keys.
        value: the values; known after they were weighted.
        holder: the submodule that ran it.
    """

    rows: list[Channels] | None = None
    columns: list[Channels] | None = None
    query: list[Channels] | None = None
    key: list[Channels] | None = None
    value: list[Channels] | None = None
    holder: str = ""


@dataclass(frozen=True)
class Scores:
    """What is known of scores, the products of queries and keys, or of weights, their softmax over the keys."""

    attention: Attention
    weights: bool


Content = Channels | Scores | None


class ChannelCodes:
    """What each code means: codes are numbered from 1; 0 is a value without channels, as in traces of locations."""

    def __init__(self) -> None:
        self._contents: list[Content] = [frozenset()]
        self._unions: dict[Channels, int] = {}

    def add(self, contents: Iterable[Content], shape: Sequence[int], axis: int, device: torch.device) -> Tensor:
        """New codes (of the given shape) for values that differ along one axis."""
        first = len(self._contents)
        self._contents += contents
        sizes = [1] * len(shape)
        sizes[axis] = shape[axis]
        codes = torch.arange(first, len(self._contents), dtype=torch.float64, device=device)
        return codes.view(sizes).expand(tuple(shape))

    def contents(self, codes: Tensor) -> set[Content]:
        """The meanings of all codes in a tensor."""
        return {self._contents[int(code)] for code in held_once(codes).unique().tolist() if code > NOWHERE}

    def of_attention(self, codes: Tensor) -> Scores | None:
        """The scores or weights whose codes these are; None for channels.

        Raises:
            ValueError: they are of several.
        """
        contents = self.contents(codes)
        if not any(isinstance(content, Scores | None) for content in contents):
            return None
        (content,) = contents
        if content is None:
            raise ValueError("values of several attentions were combined")
        assert isinstance(content, Scores)
        return content

    def join(self, operands: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The codes of values that each depend on one value of every operand."""
        codes = operands[0].expand(tuple(shape))
        for other in operands[1:]:
            one, two = torch.broadcast_tensors(held_once(codes), held_once(other.expand(tuple(shape))))
            if torch.equal(one, two):
                continue
            pairs, inverse = torch.stack((one, two)).flatten(1).unique(dim=1, return_inverse=True)
            joined = [self._joined(int(a), int(b)) for a, b in pairs.T.tolist()]
            codes = torch.tensor(joined, dtype=torch.float64, device=codes.device)[inverse].view(one.shape)
            codes = codes.expand(tuple(shape))
        return compact(codes)

    def _joined(self, one: int, two: int) -> int:
        if one == two or two <= NOWHERE:
            return one
        if one <= NOWHERE:
            return two
        first, second = self._contents[one], self._contents[two]
        if isinstance(first, frozenset) and isinstance(second, frozenset):
            return self._union(first | second)
        if isinstance(first, Scores) and isinstance(second, frozenset):  # such as relative positions of queries
            return one
        if isinstance(first, frozenset) and isinstance(second, Scores):
            return two
        self._contents.append(None)
        return len(self._contents) - 1

    def _union(self, channels: Channels) -> int:
        if channels not in self._unions:
            self._unions[channels] = len(self._contents)
            self._contents.append(channels)
        return self._unions[channels]

    def heads(self, codes: object, axis: int) -> list[Channels] | None:
        """The channels of each vector along an axis, without repetition, in order; None if they do not lie along it.

        A vector that mixes more channels than it has values belongs to none of them.
        """
        if not isinstance(codes, Tensor) or not varies(codes, axis):
            return None
        rows = held_once(codes).movedim(axis, -1).flatten(0, -2)
        distinct, number = rows.unique(dim=0, return_inverse=True)
        indices = torch.arange(len(rows), device=rows.device)
        first = torch.full((len(distinct),), len(rows), device=rows.device).scatter_reduce(0, number, indices, "amin")
        heads: dict[Channels, None] = {}
        for row in distinct[first.argsort()].tolist():
            contents = [self._contents[int(code)] for code in set(row)]
            if not all(isinstance(content, frozenset) for content in contents):
                return None
            channels = frozenset[tuple[int, int]]().union(*contents)  # type: ignore[arg-type]
            if len(channels) > codes.shape[axis]:
                return None
            if channels:
                heads[channels] = None
        return list(heads) or None


def varies(codes: Tensor, axis: int) -> bool:
    """Whether codes differ along an axis; an axis of size 1 counts."""
    return codes.shape[axis] == 1 or held_once(codes).shape[axis] > 1
