"""The matching interface: what a method reads of images and pairs, what it returns, what it guarantees."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from rsm_probe.errors import MatchingError
from rsm_probe.matching import certificate

# Numbers of the tokens that are copied into float64 at a time.
_AT_ONCE = 1 << 24


class TokensNeededError(MatchingError):
    """A method asked for tokens where only affinities are known."""


class Locations:
    """The concept vectors of a set of images, with the norms and orders that several methods read.

    Attributes:
        tokens: (N, S, C), float32 or float64, on any device.
        grid: (H, W) with H * W = S, where it is known.
    """

    def __init__(self, tokens: Tensor, grid: tuple[int, ...] | None = None) -> None:
        self.tokens = tokens
        self.grid = grid

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def count(self) -> int:
        """Locations of one image, S."""
        return self.tokens.shape[1]

    @cached_property
    def on_cpu(self) -> Tensor:
        """The tokens in main memory."""
        return self.tokens.cpu()

    @cached_property
    def norms(self) -> np.ndarray:
        """L2 norm of every concept vector, (N, S), float64."""
        tokens = self.on_cpu if self.tokens.device.type == "mps" else self.tokens
        # Some images at a time: each part is copied into float64.
        parts = tokens.split(max(1, _AT_ONCE // max(1, tokens[:1].numel())))
        return torch.cat([torch.linalg.vector_norm(part, dim=2, dtype=torch.float64) for part in parts]).cpu().numpy()

    @cached_property
    def order(self) -> np.ndarray:
        """Locations by descending norm, (N, S); equal norms keep their order."""
        return np.argsort(-self.norms, axis=1, kind="stable")

    @cached_property
    def image_norms(self) -> np.ndarray:
        """L2 norm of every image, (N,), float64."""
        return np.sqrt((self.norms**2).sum(axis=1))


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of images to match: image `rows[k]` of x with image `columns[k]` of y.

    Attributes:
        rows: (B,), integers.
        columns: (B,), integers.
        x: the first images; None where only affinities are known.
        y: the second images; None where only affinities are known.
        affinity: (B, S, T), float32 or float64, contiguous, finite: inner products of all locations (paper, equation
            5); a tensor on the device where the method solves them there; None for methods that do not need it.
        prepared: what the method that solves them prepared for x and for y; None where nobody asked it to.
        on_device: whether the device solves them, as decided for the whole piece of work; None leaves it to the method.
    """

    rows: np.ndarray
    columns: np.ndarray
    x: Locations | None = None
    y: Locations | None = None
    affinity: np.ndarray | Tensor | None = None
    prepared: tuple[Any, Any] | None = None
    on_device: bool | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def images(self) -> tuple[Locations, Locations]:
        """Both sets of images.

        Raises:
            TokensNeededError: only affinities are known.
        """
        if self.x is None or self.y is None:
            raise TokensNeededError("the tokens of both images are needed, and only their affinity was given")
        return self.x, self.y

    def affinities(self) -> np.ndarray:
        """The affinities, (B, S, T), in main memory.

        Raises:
            MatchingError: they were not computed, as the method said that it does not need them.
        """
        if self.affinity is None:
            raise MatchingError("affinities are needed: the method must declare needs_affinity = True")
        return self.affinity.cpu().numpy() if isinstance(self.affinity, Tensor) else self.affinity

    def prepared_by(self, method: Matching) -> tuple[Any, Any]:
        """What a method prepared for x and for y, prepared now if nobody asked for it before.

        Raises:
            TokensNeededError: only affinities are known.
        """
        if self.prepared is not None:
            return self.prepared
        x, y = self.images()
        return method.prepare(x), method.prepare(y)

    @cached_property
    def aligned_entries(self) -> np.ndarray:
        """The affinities of equal locations, (B, min(S, T)), in main memory.

        Raises:
            MatchingError: no affinities were computed.
        """
        given = self.affinities() if self.affinity is None else self.affinity
        on_diagonal = given.diagonal(0, 1, 2)
        return np.ascontiguousarray(on_diagonal.cpu().numpy() if isinstance(on_diagonal, Tensor) else on_diagonal)

    @property
    def aligned_sums(self) -> np.ndarray:
        """The affinities of equal locations, summed: (B,), float64.

        All methods take these sums, in the same order, so that they agree with the identity to the last digit.
        """
        return self.aligned_entries.sum(axis=1, dtype=np.float64)

    def scales(self) -> np.ndarray:
        """|x||y| of every pair, (B,), which no matched inner product exceeds; 0 where tokens are not known."""
        if self.x is None or self.y is None:
            return np.zeros(len(self))
        return self.x.image_norms[self.rows] * self.y.image_norms[self.columns]

    def part(self, start: int, stop: int) -> Pairs:
        """Some of the pairs."""
        return self if stop - start == len(self) else self.selected(slice(start, stop))

    def selected(self, index: slice | np.ndarray) -> Pairs:
        """Select pairs by a slice or by a mask (B,)."""
        affinity = self.affinity
        if isinstance(affinity, Tensor):
            on_device = index if isinstance(index, slice) else torch.from_numpy(index).to(affinity.device)
            affinity = affinity[on_device]
        elif affinity is not None:
            affinity = affinity[index]
        return replace(self, rows=self.rows[index], columns=self.columns[index], affinity=affinity)

    def reversed(self) -> Pairs:
        """The same pairs with the roles of x and y exchanged."""
        turned = self.affinity
        if turned is not None:
            turned = turned.mT.contiguous() if isinstance(turned, Tensor) else np.ascontiguousarray(turned.mT)
        prepared = None if self.prepared is None else (self.prepared[1], self.prepared[0])
        return Pairs(self.columns, self.rows, self.y, self.x, turned, prepared, self.on_device)


@dataclass(frozen=True, eq=False)
class Solution:
    """What a method answers to B pairs.

    Attributes:
        values: (B,), float64.
        permutations: (B, S), integers, -1 where a location has no partner; None for scores.
        bounds: (B,), float64, upper bounds on any matching of the pair; NaN where there is none.
        solvers: B names of what ran.
    """

    values: np.ndarray
    permutations: np.ndarray | None
    bounds: np.ndarray
    solvers: Sequence[str]

    @classmethod
    def uncertified(cls, values: np.ndarray, permutations: np.ndarray | None, solver: str) -> Solution:
        """A solution without bounds, by one solver."""
        return cls(values, permutations, np.full(len(values), np.nan), [solver] * len(values))

    @classmethod
    def joined(cls, parts: Sequence[Solution]) -> Solution:
        """One solution of the pairs of several."""
        if len(parts) == 1:
            return parts[0]
        permutations = [part.permutations for part in parts if part.permutations is not None]
        return cls(
            np.concatenate([part.values for part in parts]),
            np.concatenate(permutations) if permutations else None,
            np.concatenate([part.bounds for part in parts]),
            [solver for part in parts for solver in part.solvers],
        )


class Matching(ABC):
    """A way to pair locations: a small frozen object that carries its own options.

    A subclass overrides one of: `permutation`, for methods that read one affinity at a time; `solve`, for all others;
    and `products` besides, where all pairs at once are cheaper than one by one. What it computes once per image,
    `prepare` returns and `solve` finds in its `Pairs`. The rest of the project never asks for a method's name but reads
    class attributes:

    Attributes:
        name: how users and results call it.
        is_identity: whether it pairs equal locations, so that products are those of whole images (paper, equation 3).
        exact: whether it reaches the optimum of the assignment (paper, equation 4).
        symmetric: whether matching (x, y) and (y, x) gives equal values. If not, both are tried; of matchings the
            larger value counts, of scores the mean.
        needs_affinity: whether it reads the full affinity (paper, equation 5); if not, it works on tokens.
        growth: its time per pair grows as S to this power; used for estimates only.
        at_once: whether `products` gives all pairs of two sets of images at once; if not, they are solved one by one.
        one_to_one: whether it pairs all locations of the smaller image, each with one of its own, so that norms are
            kept, every kernel applies, and bounds hold; scores do not.
        precision: of the tokens whose inner products make the affinity, "float32" (or theirs) or "float16".
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = False
    symmetric: ClassVar[bool] = False
    needs_affinity: ClassVar[bool] = True
    growth: ClassVar[float] = 2.0
    is_identity: ClassVar[bool] = False
    at_once: ClassVar[bool] = False
    one_to_one: ClassVar[bool] = True
    precision: str = "float32"

    def __repr__(self) -> str:
        # By what it says, a stored result knows the method again: no place in memory may be in it.
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in vars(self).items())})"

    def prepare(self, images: Locations) -> Any:  # noqa: B027 - most methods need nothing
        """Compute once what all pairs of these images need; `solve` reads it by `pairs.prepared_by(self)`.

        It is called in one thread, before several solve pairs.
        """

    def on_device(self, device: torch.device, dtype: torch.dtype, locations: int, pairs: int) -> bool:
        """Whether the device that holds the tokens solves so many pairs; affinities then stay there.

        Ask a `Workload`, which decides for a whole piece of work, instead of calling this for a part of it.

        Args:
            device: of the tokens.
            dtype: of the tokens.
            locations: of the larger image.
            pairs: of the whole piece of work.
        """
        return False

    def reaches_identity(self, rows: int, columns: int) -> bool:
        """Whether no value falls below that of equal locations, for images of so many locations."""
        return self.exact

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Bytes that solving one pair takes beyond its affinity, (rows, columns) with `itemsize` bytes per entry."""
        return 0

    def permutation(self, affinity: np.ndarray) -> np.ndarray:
        """Match the locations of one pair.

        Args:
            affinity: shape (S, T), finite, float32 or float64; the inner products of all pairs of locations.

        Returns:
            Shape (S,), integer: partner of each row, -1 where it has none. No column is used twice.
        """
        raise NotImplementedError(f"{type(self).__name__} must override permutation or solve")

    def solve(self, pairs: Pairs) -> Solution:
        """Match pairs; called from several threads at once.

        Returns:
            Values, permutations (B, S), bounds, and what ran.
        """
        affinities = pairs.affinities()
        permutations = np.stack([self.permutation(affinity) for affinity in affinities])
        values = certificate.matched_sums(affinities, permutations)
        if self.reaches_identity(*affinities.shape[1:]):
            certificate.prefer_identity(pairs.aligned_sums, affinities.shape[2], permutations, values)
        return Solution.uncertified(values, permutations, self.name)

    def products(self, x: Locations, y: Locations) -> np.ndarray:
        """Matched inner products of all pairs of two sets of images, (N, M), float64, if `at_once`."""
        raise NotImplementedError(f"{self.name} solves pairs one by one")


def solve_both_ways(method: Matching, pairs: Pairs) -> Solution:
    """Solve pairs, from both sides where the method is not symmetric.

    Raises:
        MatchingError: the method gives a bound that lies below its own value.
    """
    solution = method.solve(pairs) if method.symmetric else _from_both_sides(method, pairs)
    bounds = certificate.bounds_above(
        solution.bounds, solution.values, partial(_rounding, pairs, solution), method.name
    )
    return solution if bounds is solution.bounds else replace(solution, bounds=bounds)


def _rounding(pairs: Pairs, solution: Solution, k: int) -> float:
    """How far rounding can leave the bound of a pair below its value."""
    if pairs.affinity is None or solution.permutations is None:
        return certificate.PRODUCTS_DIFFER * float(pairs.scales()[k])
    return certificate.rounding_of(pairs.part(k, k + 1).affinities()[0], solution.permutations[k])


def _from_both_sides(method: Matching, pairs: Pairs) -> Solution:
    forward = method.solve(pairs)
    backward = method.solve(pairs.reversed())
    bounds = np.fmin(forward.bounds, backward.bounds)
    if forward.permutations is None or backward.permutations is None:
        return replace(forward, values=(forward.values + backward.values) / 2, bounds=bounds)
    better = backward.values > forward.values
    permutations = forward.permutations.copy()
    permutations[better] = inverted(backward.permutations[better], permutations.shape[1])
    solvers = [b if take else a for a, b, take in zip(forward.solvers, backward.solvers, better, strict=True)]
    return Solution(np.where(better, backward.values, forward.values), permutations, bounds, solvers)


def inverted(permutations: np.ndarray, count: int) -> np.ndarray:
    """The partners (..., S) of the locations of x as those of y, (..., count), -1 where there is none."""
    partners = np.full((*permutations.shape[:-1], count + 1), -1, permutations.dtype)
    # Locations without a partner write into one place too many.
    rows = np.broadcast_to(np.arange(permutations.shape[-1]), permutations.shape)
    np.put_along_axis(partners, np.where(permutations < 0, count, permutations), rows, axis=-1)
    return partners[..., :count]
