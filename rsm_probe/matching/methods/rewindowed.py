"""Matching in windows that are recut every round until a round gains little: linear in S, close to the optimum."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from rsm_probe.checks import require_number, require_whole
from rsm_probe.errors import MatchingError
from rsm_probe.matching.matching import Locations, Pairs, inverted
from rsm_probe.matching.methods.batch_optimal import Pairing, SortedLocations, Windowed, inner_product
from rsm_probe.matching.methods.optimal import Auction

# What stays of a round's gain to be gained by later rounds is about two to four times the gain.
_TOLERANCE = 0.0025
# Rounds after which to stop, whatever they gain.
_MOST_ROUNDS = 16
# What all rows of a window together may miss, relative to the value; and the least value, relative to the norms.
_SLACK, _LEAST_VALUE = 0.015, 0.1
_BIDS_PER_ROW = 500
# Vector instructions read this many columns at a time.
_LANES = 64
# With given windows or rounds.
_WINDOW, _ROUNDS, _GAP = 256, 3, 0.01


@dataclass(frozen=True, repr=False)
class Rewindowed(Windowed):
    """Batch-Optimal with windows that are recut every round (our method).

    Up to 1 024 locations, the pair is solved exactly, as by `optimal`, and its bound is certified. Beyond, start from
    the locations of both images sorted along their shared first principal axis and paired by position, or from the
    identity if its value is larger. Each round then improves the pairs within windows of about 512, which can only
    raise the value. The first round deals the pairs out, so that every window holds locations from everywhere; each
    further round gathers neighbours, along rotated principal axes, and begins with the prices of the round before. The
    rounds end when one gains less than the tolerance. Time and memory are linear in the number of locations.

    With `window`, `rounds` or `gap`, there is a fixed number of rounds, each an auction from the beginning in windows
    of a fixed size; what is not given is 256, 3 or 0.01.

    Attributes:
        window: locations per window.
        rounds: number of rounds.
        gap: gap of each window's auction, relative to the product of the norms.
        tolerance: stop after a round that gains less than this share of the value, or of a tenth of the product of
            the norms if the value is smaller; by default 0.0025.
    """

    window: int | None = None
    rounds: int | None = None
    gap: float | None = None
    tolerance: float | None = field(default=None, kw_only=True)

    name: ClassVar[str] = "rewindowed"
    # Locations that are solved exactly, and about those of a window otherwise.
    most_exact: ClassVar[int] = 1024
    usual_window: ClassVar[int] = 512

    def __post_init__(self) -> None:
        if self.tolerance is not None:
            require_number(self.tolerance, "tolerance", MatchingError, above=0, most=1)
        if self.adaptive:
            return
        if self.tolerance is not None:
            raise MatchingError("tolerance ends the rounds, so it cannot be given with window, rounds or gap")
        for option, default in (("window", _WINDOW), ("rounds", _ROUNDS), ("gap", _GAP)):
            if getattr(self, option) is None:
                object.__setattr__(self, option, default)
        Auction(self._gap)  # validates the gap
        require_whole(self.window, "window", 1, MatchingError)
        require_whole(self.rounds, "rounds", 1, MatchingError)

    def __repr__(self) -> str:
        # Stores identify the method by this text; with given windows and rounds, it is that of earlier versions.
        if self.adaptive:
            return f"Rewindowed(tolerance={_TOLERANCE if self.tolerance is None else self.tolerance!r})"
        return f"Rewindowed(window={self.window!r}, rounds={self.rounds!r}, gap={self.gap!r})"

    @property
    def adaptive(self) -> bool:
        """Whether the method chooses windows and rounds itself."""
        return self.window is None and self.rounds is None and self.gap is None

    @property
    def renewed(self) -> bool:  # type: ignore[override]
        """True unless options are given, with which results are those of earlier versions."""
        return self.adaptive

    @property
    def _gap(self) -> float:
        assert self.gap is not None
        return self.gap

    @property
    def _most_at_once(self) -> int:
        """Locations of an image that need no windows."""
        return self.most_exact if self.window is None else self.window

    def reaches_identity(self, rows: int, columns: int) -> bool:
        """Always true: the identity is a possible start, and rounds can only raise the value."""
        return True

    def prepare(self, images: Locations) -> SortedLocations:
        """Sort the locations of each image; compute its principal axes unless one window holds all locations."""
        side = super().prepare(images)
        if images.count > self._most_at_once:
            _ = side.axes  # compute it here, in one thread
        return side

    def matched(self, x: SortedLocations, i: int, y: SortedLocations, j: int) -> tuple[np.ndarray, float]:
        """Match a pair, consistently in both directions; see `Windowed.matched`."""
        if max(x.count, y.count) <= self._most_at_once:
            return self._at_once(x, i, y, j)
        # Rounds depend on the order of the images, so both directions use the same order.
        if _comes_first(y, j, x, i):
            partners, bound = self.matched(y, j, x, i)
            return inverted(partners, x.count), bound
        axes = _shared_axes(x.axes[i], y.axes[j]).to(x.tokens.dtype)
        coordinates = [x.tokens[i] @ axes, y.tokens[j] @ axes]
        first = [np.argsort(along[:, 0].numpy(), kind="stable") for along in coordinates]
        starts = [first, [np.arange(x.count), np.arange(y.count)]]
        pairing = Pairing(x, i, y, j, *max(starts, key=partial(_aligned_product, x.tokens[i], y.tokens[j])))
        if self.adaptive:
            scale = float(x.images.image_norms[i] * y.images.image_norms[j])
            self._until_little_is_gained(pairing, coordinates, scale)
        else:
            self._in_given_rounds(pairing, coordinates)
        return pairing.permutation(), np.nan

    def _at_once(self, x: SortedLocations, i: int, y: SortedLocations, j: int) -> tuple[np.ndarray, float]:
        """Solve all locations in one window."""
        if not self.adaptive:
            pairing = Pairing(x, i, y, j, x.order[i], y.order[j])
            pairing.improve(max(x.count, y.count), Auction())
            return pairing.permutation(), np.nan
        affinity = (x.tokens[i] @ y.tokens[j].T).numpy()[None]
        solution = Auction().solve(Pairs(np.array([i]), np.array([j]), x.images, y.images, affinity))
        assert solution.permutations is not None
        return solution.permutations[0], float(solution.bounds[0])

    def _in_given_rounds(self, pairing: Pairing, coordinates: list[torch.Tensor]) -> None:
        assert self.window is not None
        assert self.rounds is not None
        solver = Auction(self._gap)
        for number in range(self.rounds):
            if number:
                pairing.sort(coordinates, number % coordinates[0].shape[1])
            if number % 3 == 0:
                pairing.deal(self.window)
            pairing.improve(self.window, solver)

    def _until_little_is_gained(self, pairing: Pairing, coordinates: list[torch.Tensor], scale: float) -> None:
        """Improve a pairing round by round.

        Args:
            pairing: the pairs to begin with, changed in place.
            coordinates: along the shared principal axes, (S, A) and (T, A).
            scale: product of the image norms.
        """
        size = len(pairing)
        windows = -(-size // self.usual_window)
        window = -(-size // (windows * _LANES)) * _LANES
        tolerance = _TOLERANCE if self.tolerance is None else self.tolerance
        prices = np.zeros(size, pairing.tokens[0].numpy().dtype)
        value = pairing.value()
        for number in range(_MOST_ROUNDS):
            if number:
                turned = torch.from_numpy(_rotation(coordinates[0].shape[1], number)).to(coordinates[0].dtype)
                pairing.gather_neighbours([side @ turned for side in coordinates], window)
            else:
                pairing.deal(window)
            least = max(value, _LEAST_VALUE * scale)
            pairing.rearrange(window, partial(_improved, pairing, prices, _SLACK * least / size, number == 0))
            before, value = value, pairing.value()
            if number and value - before <= tolerance * max(value, _LEAST_VALUE * scale):
                return


def _improved(
    pairing: Pairing, prices: np.ndarray, epsilon: float, first: bool, part: slice, affinity: np.ndarray
) -> np.ndarray:
    """Improve windows at their prices; see `improve_windows` and `Pairing.rearrange`."""
    # Lazy: importing Numba takes seconds.
    from rsm_probe.matching.compiled.cpu_auction import improve_windows

    columns, shape = pairing.orders[1][part].numpy(), affinity.shape[:2]
    of_windows, positions = prices[columns].reshape(shape), np.empty(shape, np.int64)
    improve_windows(affinity, of_windows, epsilon, first, _BIDS_PER_ROW, positions)
    prices[columns] = of_windows.ravel()
    return positions


def _rotation(axes: int, number: int) -> np.ndarray:
    """A rotation (A, A), the same for all images, different in each round."""
    return np.linalg.qr(np.random.default_rng(number).normal(size=(axes, axes)))[0]


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
