"""Matching in windows that are recut every round: above 99 % of the optimum on trained features, linear in S."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from rsm_probe.checks import require_whole
from rsm_probe.errors import MatchingError
from rsm_probe.matching.matching import Locations, inverted
from rsm_probe.matching.methods.batch_optimal import Pairing, SortedLocations, Windowed, inner_product
from rsm_probe.matching.methods.optimal import Auction


@dataclass(frozen=True)
class Rewindowed(Windowed):
    """Batch-Optimal with small windows that are recut every round (our method).

    Start from the locations of both images sorted along their shared first principal axis and paired by position, or
    from the identity if its value is larger. Each round then solves windows of the current pairs, which can only raise
    the value. Some rounds deal the pairs out along an axis, so that every window holds locations from everywhere; the
    others cut along one axis after the other, so that a window holds neighbours. A round costs as much as Batch-Optimal
    with the same windows and needs no more memory.

    Attributes:
        window: locations per window.
        rounds: number of rounds.
        gap: gap of each window's auction, relative to the product of the norms.
    """

    window: int = 256
    rounds: int = 3
    gap: float = 0.01

    name: ClassVar[str] = "rewindowed"

    def __post_init__(self) -> None:
        super().__post_init__()
        Auction(self.gap)  # validates the gap
        require_whole(self.rounds, "rounds", 1, MatchingError)

    def reaches_identity(self, rows: int, columns: int) -> bool:
        """Always true: the identity is a possible start, and rounds can only raise the value."""
        return True

    def prepare(self, images: Locations) -> SortedLocations:
        """Sort the locations of each image; compute its principal axes unless one window holds all locations."""
        side = super().prepare(images)
        if images.count > self.window:
            _ = side.axes  # compute it here, in one thread
        return side

    def partners(self, x: SortedLocations, i: int, y: SortedLocations, j: int) -> np.ndarray:
        """Return the partner of each location (S,), -1 for unmatched locations; consistent in both directions."""
        if max(x.count, y.count) <= self.window:
            return super().partners(x, i, y, j)  # one window holds all locations
        # Rounds depend on the order of the images, so both directions use the same order.
        if _comes_first(y, j, x, i):
            return inverted(self.partners(y, j, x, i), x.count)
        axes = _shared_axes(x.axes[i], y.axes[j]).to(x.tokens.dtype)
        coordinates = [x.tokens[i] @ axes, y.tokens[j] @ axes]
        first = [np.argsort(along[:, 0].numpy(), kind="stable") for along in coordinates]
        starts = [first, [np.arange(x.count), np.arange(y.count)]]
        pairing = Pairing(x, i, y, j, *max(starts, key=partial(_aligned_product, x.tokens[i], y.tokens[j])))
        solver = Auction(self.gap)
        for number in range(self.rounds):
            if number:
                pairing.sort(coordinates, number % coordinates[0].shape[1])
            if number % 3 == 0:
                pairing.deal(self.window)
            pairing.improve(self.window, solver)
        return pairing.permutation()


def _comes_first(x: SortedLocations, i: int, y: SortedLocations, j: int) -> bool:
    """Order images by content: fewer locations first, then smaller norms, then smaller sums."""
    first, second = (x.count, x.images.image_norms[i]), (y.count, y.images.image_norms[j])
    if first != second:
        return first < second
    return float(x.tokens[i].double().sum()) < float(y.tokens[j].double().sum())


def _aligned_product(x: torch.Tensor, y: torch.Tensor, orders: list[np.ndarray]) -> float:
    """The inner product of two images, (S, C) and (T, C), paired by position in the given orders."""
    shared = min(len(x), len(y))
    partners = np.full(len(x), -1)
    partners[orders[0][:shared]] = orders[1][:shared]
    return inner_product(x, y, partners)


def _shared_axes(x: np.ndarray, y: np.ndarray) -> torch.Tensor:
    """Principal axes (C, A) of two images together, from the scaled axes (A, C) of each."""
    both = np.concatenate([x, y])
    _, turns = np.linalg.eigh(both @ both.T)
    count = min(len(x), x.shape[1])
    return torch.from_numpy((both.T @ turns)[:, ::-1][:, :count].copy())
