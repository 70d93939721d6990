"""Matching within windows: linear in the number of locations, without a full affinity (paper, appendix F)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
import torch
from torch.nn import functional

from rsm_probe.checks import require_whole
from rsm_probe.errors import MatchingError
from rsm_probe.execution.devices import full_precision, require_memory
from rsm_probe.matching.certificate import identity_partners, prefer_identity
from rsm_probe.matching.cpu_or_gpu import Workload
from rsm_probe.matching.matching import Locations, Matching, Pairs, Solution
from rsm_probe.matching.methods.identity import products_of_pairs
from rsm_probe.matching.methods.optimal import Auction

# Bytes of window affinities held at once.
_BLOCK_BYTES = 4 << 20
# Principal axes per image, and subspace iterations to find them.
_AXES = 4
_ITERATIONS = 3


@dataclass(frozen=True, eq=False)
class SortedLocations:
    """A set of images, prepared for windowed matching.

    Attributes:
        images: the images themselves.
        tokens: (N, S, C), in main memory.
        order: locations by descending norm, (N, S).
    """

    images: Locations
    tokens: torch.Tensor
    order: np.ndarray

    @cached_property
    def axes(self) -> np.ndarray:
        """Principal axes of each image's locations, scaled by standard deviations: (N, A, C) with A <= 4, float64."""
        return principal_axes(self.images.tokens)

    @property
    def count(self) -> int:
        """Number of locations of one image, S."""
        return self.images.count


@dataclass(frozen=True)
class Windowed(Matching):
    """Base of windowed matchings: solve pairs one by one on the CPU, from their tokens."""

    symmetric: ClassVar[bool] = True
    needs_affinity: ClassVar[bool] = False
    growth: ClassVar[float] = 1.0

    def prepare(self, images: Locations) -> SortedLocations:
        """Sort the locations of each image by norm."""
        return SortedLocations(images, images.on_cpu, images.order)

    def solve(self, pairs: Pairs) -> Solution:
        """Match the pairs one by one, from their tokens."""
        x, y = pairs.prepared_by(self)
        numbers = list(zip(pairs.rows, pairs.columns, strict=True))
        matched = [self.matched(x, i, y, j) for i, j in numbers]
        permutations, bounds = (
            np.stack([partners for partners, _ in matched]),
            np.array([bound for _, bound in matched]),
        )

        def products(permutations: np.ndarray) -> np.ndarray:
            given = zip(numbers, permutations, strict=True)
            return np.array([inner_product(x.tokens[i], y.tokens[j], partners) for (i, j), partners in given])

        values = products(permutations)
        if self.reaches_identity(x.count, y.count):
            # Windows compare rounded affinities; this comparison is in float64.
            identity = identity_partners(x.count, y.count)
            aligned = products(np.broadcast_to(identity, permutations.shape))
            prefer_identity(aligned, y.count, permutations, values)
        return Solution(values, permutations, bounds, [self.name] * len(values))

    @abstractmethod
    def matched(self, x: SortedLocations, i: int, y: SortedLocations, j: int) -> tuple[np.ndarray, float]:
        """Return the partner of each location, (S,), -1 for unmatched ones, and a bound, NaN without one."""


@dataclass(frozen=True)
class BatchOptimal(Windowed):
    """The paper's Batch-Optimal: sort locations by norm, cut them into windows, and solve each window exactly.

    Attributes:
        window: locations per window; the last window may be shorter.
        where: where windows are solved; see `Auction`.
    """

    window: int = 512
    where: Literal["auto", "cpu", "device"] = field(default="auto", kw_only=True, repr=False)

    name: ClassVar[str] = "batch-optimal"

    def __post_init__(self) -> None:
        require_whole(self.window, "window", 1, MatchingError)
        Auction(where=self.where)  # validates `where`

    def reaches_identity(self, rows: int, columns: int) -> bool:
        """True if one window holds all locations, because a window is solved exactly."""
        return self.window >= max(rows, columns)

    def matched(self, x: SortedLocations, i: int, y: SortedLocations, j: int) -> tuple[np.ndarray, float]:
        """Solve the windows of a pair; return the partners (S,), -1 for unmatched ones, and NaN for no bound."""
        pairing = Pairing(x, i, y, j, x.order[i], y.order[j])
        pairing.improve(self.window, Auction())
        return pairing.permutation(), np.nan

    def on_device(self, device: torch.device, dtype: torch.dtype, locations: int, pairs: int) -> bool:
        """Decide whether the device solves the windows of this many pairs; see `Auction`."""
        window = min(self.window, locations)
        return Auction(where=self.where).on_device(device, dtype, window, pairs * (locations // window))

    def solve(self, pairs: Pairs) -> Solution:
        """Match the pairs from their tokens: one by one on the CPU, many at once on a device."""
        x, y = pairs.images()
        stays = pairs.on_device
        if stays is None:
            stays = Workload(len(pairs), max(x.count, y.count)).on_device(self, x.tokens.device, x.tokens.dtype)
        return self._solve_on_device(pairs) if stays else super().solve(pairs)

    def _solve_on_device(self, pairs: Pairs) -> Solution:
        x, y = pairs.prepared_by(self)
        size = max(x.count, y.count)
        left, rows = _by_norm(x, pairs.rows, size)
        right, columns = _by_norm(y, pairs.columns, size)
        positions = np.empty(rows.shape, np.int64)
        window = min(self.window, size)
        whole = size // window * window
        for start, stop, width in ((0, whole, window), (whole, size, size - whole)):
            if width:
                part, solver = slice(start, stop), Auction(where=self.where)
                positions[:, part] = start + _positions_in_windows(left[:, part], right[:, part], width, solver)
        permutations = np.empty_like(positions)
        np.put_along_axis(permutations, rows, np.take_along_axis(columns, positions, axis=1), axis=1)
        values = _products(left, right, positions)
        permutations = np.where(permutations < y.count, permutations, -1)[:, : x.count]
        if self.reaches_identity(x.count, y.count):
            # The identity in sorted positions: where each location of x stands in the order of y.
            same = np.take_along_axis(np.argsort(columns, axis=1), rows, axis=1)
            prefer_identity(_products(left, right, same), y.count, permutations, values)
        return Solution.uncertified(values, permutations, f"{self.name}-device")


def inner_product(x: torch.Tensor, y: torch.Tensor, permutation: np.ndarray) -> float:
    """The matched inner product of two images, (S, C) and (T, C) in main memory, in float64."""
    # Lazy: importing Numba takes seconds.
    from rsm_probe.matching.compiled.loops import matched_product

    return float(matched_product(x.numpy(), y.numpy(), permutation))


def _by_norm(side: SortedLocations, numbers: np.ndarray, size: int) -> tuple[torch.Tensor, np.ndarray]:
    """Tokens (B, size, C) of selected images in order of their norms, padded with zeros, and that order (B, size)."""
    filled = np.tile(np.arange(side.count, size), (len(numbers), 1))
    order = np.concatenate([side.order[numbers], filled], axis=1)
    tokens = side.images.tokens[torch.from_numpy(numbers).to(side.images.tokens.device)]
    tokens = functional.pad(tokens, (0, 0, 0, size - side.count))
    index = torch.from_numpy(order).to(tokens.device)[:, :, None]
    return tokens.gather(1, index.expand_as(tokens)), order


def _products(left: torch.Tensor, right: torch.Tensor, positions: np.ndarray) -> np.ndarray:
    """Inner products (B,), float64, of images (B, S, C), whose location s is paired with `positions[:, s]`."""
    partners = torch.from_numpy(positions).to(right.device)[:, :, None].expand_as(right)
    return products_of_pairs(right.gather(1, partners), left)


def _positions_in_windows(x: torch.Tensor, y: torch.Tensor, width: int, solver: Auction) -> np.ndarray:
    """Match locations window by window.

    Args:
        x: tokens (B, W * width, C), in contiguous windows.
        y: tokens of the same shape.
        width: locations per window.
        solver: solves all windows at once.

    Returns:
        The position of each partner, (B, W * width).
    """
    left, right = (side.reshape(-1, width, side.shape[2]) for side in (x, y))
    with full_precision(left.device):
        affinity = torch.bmm(left, right.mT)
    starts = np.arange(0, x.shape[1], width)
    return (solver.assign(affinity).reshape(len(x), -1, width) + starts[:, None]).reshape(len(x), -1)


class Pairing:
    """The locations of two images in two orders; equal positions are paired.

    The smaller image is padded with zero vectors, which are numbered after its locations.
    """

    def __init__(
        self, x: SortedLocations, i: int, y: SortedLocations, j: int, first: np.ndarray, second: np.ndarray
    ) -> None:
        self.counts = x.count, y.count
        size = max(self.counts)
        self.tokens = [
            tokens if len(tokens) == size else functional.pad(tokens, (0, 0, 0, size - len(tokens)))
            for tokens in (x.tokens[i], y.tokens[j])
        ]
        self.orders = [
            torch.from_numpy(np.concatenate([order, np.arange(len(order), size)])) for order in (first, second)
        ]

    def __len__(self) -> int:
        return len(self.orders[0])

    def sort(self, coordinates: list[torch.Tensor], axis: int) -> None:
        """Sort the pairs by the sum of their coordinates along an axis; padding has coordinate 0."""
        size = len(self)
        along = sum(
            functional.pad(side[:, axis], (0, size - len(side)))[order]
            for side, order in zip(coordinates, self.orders, strict=True)
        )
        self._arrange(torch.as_tensor(along))

    def deal(self, window: int) -> None:
        """Deal the pairs out like cards, so that every window holds pairs from everywhere."""
        windows = -(-len(self) // window)
        self._arrange(torch.arange(len(self)) % windows)

    def gather_neighbours(self, coordinates: list[torch.Tensor], window: int) -> None:
        """Arrange the pairs so that each window holds those whose sums of coordinates (S, A) are near on all axes.

        Pairs with equal sums gain the most by an exchange of partners: what separates the one from its partner then
        points against what separates the other.
        """
        size = len(self)
        sums = sum(
            functional.pad(side, (0, 0, 0, size - len(side)))[order]
            for side, order in zip(coordinates, self.orders, strict=True)
        )
        self._take(torch.from_numpy(_halved(torch.as_tensor(sums).numpy(), np.arange(size), window, 0)))

    def _arrange(self, keys: torch.Tensor) -> None:
        self._take(torch.argsort(keys, stable=True))

    def _take(self, positions: torch.Tensor) -> None:
        self.orders = [order[positions] for order in self.orders]

    def improve(self, window: int, solver: Auction) -> None:
        """Solve every window; a window keeps its pairs if solving it gains nothing."""

        def solve(part: slice, affinity: np.ndarray) -> np.ndarray:
            numbers = np.arange(len(affinity))
            pairs = Pairs(numbers, numbers, affinity=affinity)
            solution = solver.solve(pairs)
            assert solution.permutations is not None
            better = (solution.values > pairs.aligned_sums)[:, None]
            return np.where(better, solution.permutations, np.arange(affinity.shape[1]))

        self.rearrange(window, solve)

    def rearrange(self, window: int, solve: Callable[[slice, np.ndarray], np.ndarray]) -> None:
        """Permute the second order within windows.

        Args:
            window: locations per window; the last window may be shorter.
            solve: positions and the affinities (B, n, n) of the windows there -> the partner of each row, (B, n).
        """
        window = min(window, len(self))
        require_memory(
            2 * window**2 * self.tokens[0].element_size(), f"a window of {window} locations", "take smaller windows"
        )
        whole = len(self) // window * window
        several = window * max(1, _BLOCK_BYTES // (window**2 * self.tokens[0].element_size()))
        parts = [slice(start, min(start + several, whole)) for start in range(0, whole, several)]
        for part, width in [(part, window) for part in parts] + [(slice(whole, len(self)), len(self) - whole)]:
            if width:
                left, right = (tokens[order[part]] for tokens, order in zip(self.tokens, self.orders, strict=True))
                channels = left.shape[1]
                affinity = torch.bmm(left.view(-1, width, channels), right.view(-1, width, channels).mT).numpy()
                positions = torch.from_numpy(solve(part, affinity))
                self.orders[1][part] = self.orders[1][part].view(-1, width).gather(1, positions).flatten()

    def value(self) -> float:
        """The inner product of the pairs."""
        (x, y), (first, second) = self.tokens, self.orders
        partners = np.empty(len(self), np.int64)
        partners[first.numpy()] = second.numpy()
        return inner_product(x, y, partners)

    def permutation(self) -> np.ndarray:
        """Return the partner of each location of x, -1 if that is padding."""
        first, second = self.counts
        partners = np.empty(len(self), np.int64)
        partners[self.orders[0].numpy()] = self.orders[1].numpy()
        return np.where(partners < second, partners, -1)[:first]


def _halved(coordinates: np.ndarray, numbers: np.ndarray, window: int, axis: int) -> np.ndarray:
    """Order locations so that windows are the leaves of a k-d tree: halve them along one axis after the other."""
    windows = -(-len(numbers) // window)
    if windows <= 1:
        return numbers
    ordered = numbers[np.argsort(coordinates[numbers, axis], kind="stable")]
    middle, following = windows // 2 * window, (axis + 1) % coordinates.shape[1]
    halves = ordered[:middle], ordered[middle:]
    return np.concatenate([_halved(coordinates, half, window, following) for half in halves])


def principal_axes(tokens: torch.Tensor) -> np.ndarray:
    """Compute the principal axes of each image's locations, scaled by their standard deviations.

    A fixed start and a few subspace iterations give the axes to within some percent, which is enough for sorting.

    Args:
        tokens: (N, S, C), on any device.

    Returns:
        Shape (N, A, C) with A <= 4, float64.
    """
    centred = tokens - tokens.mean(dim=1, keepdim=True)
    channels = centred.shape[2]
    start = torch.randn(channels, min(2 * _AXES, channels), generator=torch.Generator().manual_seed(0))
    basis = start.to(centred).expand(len(centred), -1, -1)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(centred.mT @ (centred @ basis))[0]
    within = (centred @ basis).cpu().double()
    variances, turns = torch.linalg.eigh(within.mT @ within / centred.shape[1])
    axes = basis.cpu().double() @ (turns * variances.clamp(min=0).sqrt()[:, None, :])
    return axes.flip(2)[:, :, :_AXES].mT.numpy()
