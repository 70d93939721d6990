"""Token sets as sides in memory, some images at a time; those of a database are held while there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rsm_probe.matching.bounds import Summaries
from rsm_probe.matching.matching import Matching
from rsm_probe.pairs.sides import Side
from rsm_probe.pairs.token_sets import TokenSet, centred_tokens
from rsm_probe.similarity.centering import Centering


@dataclass(frozen=True)
class BlockReader:
    """How images of a token set become a side.

    Attributes:
        reference: the images whose mean is subtracted.
        centering: which mean.
        method: the matching that images are prepared for.
        dtype: of the tokens.
        device: that holds the side.
        at_once: images that are read at a time.
    """

    reference: TokenSet
    centering: Centering | None
    method: Matching
    dtype: torch.dtype
    device: torch.device
    at_once: int

    def block(self, images: TokenSet, numbers: np.ndarray) -> Side:
        """Some images of a set, by ascending numbers, ready to be matched."""
        tokens = torch.empty((len(numbers), *images.shape[1:]), dtype=self.dtype, device=self.device)
        for start in range(0, len(numbers), self.at_once):
            tokens[start : start + self.at_once] = self.tokens(images, numbers[start : start + self.at_once])
        return Side.of(tokens, images.grid).prepare({self.method.name: self.method})

    def tokens(self, images: TokenSet, numbers: np.ndarray) -> Tensor:
        """Their tokens (n, S, C), centred, in main memory."""
        first, last = int(numbers[0]), int(numbers[-1])
        if last - first + 1 == len(numbers):
            return centred_tokens(images, slice(first, last + 1), self.reference, self.centering).to(self.dtype)
        single = [slice(int(number), int(number) + 1) for number in numbers]
        parts = [centred_tokens(images, part, self.reference, self.centering) for part in single]
        return torch.cat(parts).to(self.dtype)


def summaries_of(side: Side, summaries: Summaries) -> Tensor:
    """The summaries (n, L) of the images of a side, in the unit of the representations."""
    values = summaries.of(side.tokens)
    return values * torch.from_numpy(side.units).to(values.device)[:, None]


class Database:
    """The images that queries are compared with: the blocks that were used last are held, and summaries of all.

    Summaries that would take more than half of the room are not held, but made whenever they are asked for.

    Args:
        images: all of them.
        reader: how they become sides.
        summaries: what makes their summaries.
        size: images of a block at most.
        room: bytes that may be held.

    Attributes:
        images: all of them.
        size: images of a block.
        starts: the first image of every block.
        norms: |x|^2 (M,), NaN of images that were not read yet.
    """

    def __init__(self, images: TokenSet, reader: BlockReader, summaries: Summaries, size: int, room: int) -> None:
        self.images, self._reader, self._summaries = images, reader, summaries
        chunk, size = images.images_per_chunk, min(size, len(images))
        self.size = size // chunk * chunk if size > chunk else size
        self.starts = range(0, len(images), self.size)
        self.norms = np.full(len(images), np.nan)
        tokens, summary = images.shape[1] * images.shape[2] * 4, 8 * summaries.length
        self._keeps_summaries = 2 * len(images) * summary <= room
        free = room - len(images) * summary if self._keeps_summaries else room
        self.most_held = max(1, free // (self.size * (tokens if self._keeps_summaries else tokens + summary)))
        self._held: OrderedDict[int, Side] = OrderedDict()
        self._summarised: dict[int, Tensor] = {}

    @property
    def all_held(self) -> bool:
        """Whether there is room for all blocks, so that none is read twice."""
        return len(self.starts) <= self.most_held

    def block(self, start: int) -> Side:
        """The block that begins with an image."""
        if start not in self._held:
            while len(self._held) >= self.most_held:
                self._held.popitem(last=False)
            stop = min(start + self.size, len(self.images))
            self._held[start] = side = self._reader.block(self.images, np.arange(start, stop))
            self.norms[start:stop] = side.squared_norms
        self._held.move_to_end(start)
        return self._held[start]

    def summaries(self, start: int) -> Tensor:
        """The summaries (n, L) of a block, in the unit of the representations."""
        if start in self._summarised:
            return self._summarised[start]
        values = summaries_of(self.block(start), self._summaries)
        if self._keeps_summaries:
            self._summarised[start] = values
        return values

    def held_first(self, starts: Iterable[int]) -> list[int]:
        """Blocks in the order in which fewest are read: in any fixed order, the last ones used would be missed."""
        return sorted(starts, key=lambda start: start not in self._held)
