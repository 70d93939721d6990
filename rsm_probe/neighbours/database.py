"""Token sets as sides in memory, block by block; those of a database stay while there is room."""

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
    """Reads images of a token set into sides.

    Attributes:
        reference: the images whose mean is subtracted.
        centering: which mean.
        method: the matching that prepares the images.
        dtype: of the tokens.
        device: holds the side.
        at_once: images read at a time.
    """

    reference: TokenSet
    centering: Centering | None
    method: Matching
    dtype: torch.dtype
    device: torch.device
    at_once: int

    def block(self, images: TokenSet, numbers: np.ndarray) -> Side:
        """Some images of a set, by ascending numbers, ready to match."""
        tokens = torch.empty((len(numbers), *images.shape[1:]), dtype=self.dtype, device=self.device)
        for start in range(0, len(numbers), self.at_once):
            tokens[start : start + self.at_once] = self.tokens(images, numbers[start : start + self.at_once])
        return Side.of(tokens, images.grid).prepare({self.method.name: self.method})

    def tokens(self, images: TokenSet, numbers: np.ndarray) -> Tensor:
        """Centred tokens (n, S, C) of some images, in main memory."""
        first, last = int(numbers[0]), int(numbers[-1])
        if last - first + 1 == len(numbers):
            return centred_tokens(images, slice(first, last + 1), self.reference, self.centering).to(self.dtype)
        single = [slice(int(number), int(number) + 1) for number in numbers]
        parts = [centred_tokens(images, part, self.reference, self.centering) for part in single]
        return torch.cat(parts).to(self.dtype)


def summaries_of(side: Side, summaries: Summaries) -> Tensor:
    """Summaries (n, L) of the images of a side, in the unit of the representations."""
    values = summaries.of(side.tokens)
    return values * torch.from_numpy(side.units).to(values.device)[:, None]


class Database:
    """The images that queries are compared with: recently used blocks stay in memory, and summaries of all images.

    Summaries that would take more than half of the room are recomputed whenever they are needed.

    Args:
        images: all of them.
        reader: reads them into sides.
        summaries: summarises them.
        size: most images per block.
        room: most bytes held.

    Attributes:
        images: all of them.
        size: images per block.
        starts: the first image of every block.
        norms: |x|^2 (M,), NaN for images that were not read yet.
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
        """Whether all blocks fit into memory, so that none is read twice."""
        return len(self.starts) <= self.most_held

    def block(self, start: int) -> Side:
        """The block that starts at an image."""
        if start not in self._held:
            while len(self._held) >= self.most_held:
                self._held.popitem(last=False)
            stop = min(start + self.size, len(self.images))
            self._held[start] = side = self._reader.block(self.images, np.arange(start, stop))
            self.norms[start:stop] = side.squared_norms
        self._held.move_to_end(start)
        return self._held[start]

    def summaries(self, start: int) -> Tensor:
        """Summaries (n, L) of the block that starts at an image, in the unit of the representations."""
        if start in self._summarised:
            return self._summarised[start]
        values = summaries_of(self.block(start), self._summaries)
        if self._keeps_summaries:
            self._summarised[start] = values
        return values

    def held_first(self, starts: Iterable[int]) -> list[int]:
        """Order blocks so that fewest are read: those in memory first. Any fixed order would evict them before use."""
        return sorted(starts, key=lambda start: start not in self._held)
