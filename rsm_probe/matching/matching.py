"""The matching interface: inputs, outputs and guarantees."""

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

# Tokens are copied to float64 in parts of at most this many numbers.
_AT_ONCE = 1 << 24


class TokensNeededError(MatchingError):
    """A method needs tokens, but only affinities were given."""


@dataclass(eq=False)
class Locations:
    """The tokens of a set of images, with the norms and orders that several methods share.

    Attributes:
        tokens: (N, S, C), float32 or float64, on any device.
        grid: (H, W) with H * W = S, or None if unknown.
    """

    tokens: Tensor
    grid: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def count(self) -> int:
        """Number of locations of one image, S."""
        return self.tokens.shape[1]

    @cached_property
    def on_cpu(self) -> Tensor:
        """The tokens in main memory."""
        return self.tokens.cpu()

    @cached_property
    def norms(self) -> np.ndarray:
        """L2 norms of all tokens, (N, S), float64."""
        tokens = self.on_cpu if self.tokens.device.type == "mps" else self.tokens
        # In parts, because each part is copied to float64.
        parts = tokens.split(max(1, _AT_ONCE // max(1, tokens[:1].numel())))
        return torch.cat([torch.linalg.vector_norm(part, dim=2, dtype=torch.float64) for part in parts]).cpu().numpy()

    @cached_property
    def order(self) -> np.ndarray:
        """Locations by descending norm, (N, S); ties keep their original order."""
        return np.argsort(-self.norms, axis=1, kind="stable")

    @cached_property
    def image_norms(self) -> np.ndarray:
        """L2 norms of whole images, (N,), float64."""
        return np.sqrt((self.norms**2).sum(axis=1))


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of images to match: image `rows[k]` of x with image `columns[k]` of y.

    Attributes:
        rows: image indices into x, (B,).
        columns: image indices into y, (B,).
        x: the images in the rows; None if only affinities are known.
        y: the images in the columns; None if only affinities are known.
        affinity: inner products of all locations (paper, equation 5), (B, S, T), float32 or float64, contiguous and
            finite. A tensor on the device if the method solves the pairs there; None if the method does not need it.
        prepared: what `Matching.prepare` returned for x and for y; None if it has not been called.
        on_device: whether to solve on the device, as decided for the whole workload; None leaves it to the method.
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
        """Return both sets of images.

        Raises:
            TokensNeededError: only affinities are known.
        """
        if self.x is None or self.y is None:
            raise TokensNeededError("the tokens of both images are needed, but only their affinity was given")
        return self.x, self.y

    def affinities(self) -> np.ndarray:
        """Return the affinities in main memory, (B, S, T).

        Raises:
            MatchingError: they were not computed because the method declares that it does not need them.
        """
        if self.affinity is None:
            raise MatchingError("affinities are needed: the method must declare needs_affinity = True")
        return self.affinity.cpu().numpy() if isinstance(self.affinity, Tensor) else self.affinity

    def prepared_by(self, method: Matching) -> tuple[Any, Any]:
        """Return what a method prepared for x and for y; prepare it now if that has not been done.

        Raises:
            TokensNeededError: only affinities are known.
        """
        if self.prepared is not None:
            return self.prepared
        x, y = self.images()
        return method.prepare(x), method.prepare(y)

    @cached_property
    def aligned_entries(self) -> np.ndarray:
        """Affinities of equal locations, (B, min(S, T)), in main memory.

        Raises:
            MatchingError: no affinities were computed.
        """
        given = self.affinities() if self.affinity is None else self.affinity
        on_diagonal = given.diagonal(0, 1, 2)
        return np.ascontiguousarray(on_diagonal.cpu().numpy() if isinstance(on_diagonal, Tensor) else on_diagonal)

    @property
    def aligned_sums(self) -> np.ndarray:
        """Sums of the affinities of equal locations, (B,), float64.

        Every method uses these sums, so that values agree with those of the identity to the last digit.
        """
        return self.aligned_entries.sum(axis=1, dtype=np.float64)

    def scales(self) -> np.ndarray:
        """Products of the image norms |x||y|, (B,), which bound every matched inner product; 0 without tokens."""
        if self.x is None or self.y is None:
            return np.zeros(len(self))
        return self.x.image_norms[self.rows] * self.y.image_norms[self.columns]

    def part(self, start: int, stop: int) -> Pairs:
        """Return the pairs from `start` to `stop`."""
        return self if stop - start == len(self) else self.selected(slice(start, stop))

    def selected(self, index: slice | np.ndarray) -> Pairs:
        """Return the pairs that a slice or a mask (B,) selects."""
        affinity = self.affinity
        if isinstance(affinity, Tensor):
            on_device = index if isinstance(index, slice) else torch.from_numpy(index).to(affinity.device)
            affinity = affinity[on_device]
        elif affinity is not None:
            affinity = affinity[index]
        return replace(self, rows=self.rows[index], columns=self.columns[index], affinity=affinity)

    def reversed(self) -> Pairs:
        """Return the same pairs with the roles of x and y exchanged."""
        turned = self.affinity
        if turned is not None:
            turned = turned.mT.contiguous() if isinstance(turned, Tensor) else np.ascontiguousarray(turned.mT)
        prepared = None if self.prepared is None else (self.prepared[1], self.prepared[0])
        return Pairs(self.columns, self.rows, self.y, self.x, turned, prepared, self.on_device)


@dataclass(frozen=True, eq=False)
class Solution:
    """The matchings of B pairs.

    Attributes:
        values: matched inner products, (B,), float64.
        permutations: (B, S), integers, -1 for unmatched locations; None for scores.
        bounds: upper bounds on the value of any matching of the pair, (B,), float64; NaN where unknown.
        solvers: for each pair, the name of the solver that produced it.
    """

    values: np.ndarray
    permutations: np.ndarray | None
    bounds: np.ndarray
    solvers: Sequence[str]

    @classmethod
    def uncertified(cls, values: np.ndarray, permutations: np.ndarray | None, solver: str) -> Solution:
        """Build a solution without bounds, all of it by one solver."""
        return cls(values, permutations, np.full(len(values), np.nan), [solver] * len(values))

    @classmethod
    def joined(cls, parts: Sequence[Solution]) -> Solution:
        """Join the solutions of consecutive parts into one."""
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
    """A matching method: a small frozen object that carries its own options.

    A subclass overrides `permutation` if it reads one affinity at a time, and `solve` otherwise. It may also override
    `products` if all pairs at once are cheaper than one by one. `prepare` computes and returns what a method needs once
    per image; `solve` finds it in its `Pairs`. The rest of the project never checks the name of a method; it reads
    these class attributes instead.

    Attributes:
        name: the name of the method, for users and in results.
        is_identity: pairs equal locations, so that products are those of whole images (paper, equation 3).
        exact: reaches the optimum of the assignment (paper, equation 4).
        symmetric: gives equal values for (x, y) and (y, x). Otherwise both directions are solved; matchings keep the
            larger value, scores the mean.
        needs_affinity: reads the full affinity (paper, equation 5); otherwise the method works on tokens.
        growth: time per pair grows as S to this power; used for estimates only.
        at_once: `products` computes all pairs of two sets of images at once; otherwise they are solved one by one.
        one_to_one: pairs every location of the smaller image with a location of its own, so that norms are preserved,
            every kernel applies, and bounds hold. False for scores.
        precision: precision of the tokens that are multiplied: "float32" (or their own, if wider) or "float16".
        renewed: earlier versions gave other results under the same name, so that their unfinished runs are not
            continued.
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
    renewed: bool = False

    def __repr__(self) -> str:
        # Stores identify the method by this text, so it must not contain a memory address.
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in vars(self).items())})"

    def prepare(self, images: Locations) -> Any:  # noqa: B027 - most methods need nothing
        """Compute what all pairs of these images share; `solve` reads it through `pairs.prepared_by(self)`.

        Called in one thread, before several threads solve pairs.
        """

    def on_device(self, device: torch.device, dtype: torch.dtype, locations: int, pairs: int) -> bool:
        """Decide whether to solve this many pairs on the device that holds the tokens; affinities then stay there.

        Do not call this for a part of the work; ask a `Workload`, which decides for all of it.

        Args:
            device: device of the tokens.
            dtype: dtype of the tokens.
            locations: number of locations of the larger image.
            pairs: number of pairs of the whole workload.
        """
        return False

    def reaches_identity(self, rows: int, columns: int) -> bool:
        """Whether every value is at least that of equal locations, for images of `rows` and `columns` locations."""
        return self.exact

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Bytes needed to solve one pair beyond its affinity, (rows, columns) with `itemsize` bytes per entry."""
        return 0

    def permutation(self, affinity: np.ndarray) -> np.ndarray:
        """Match the locations of one pair.

        Args:
            affinity: inner products of all pairs of locations, (S, T), float32 or float64, finite.

        Returns:
            The partner of each row, (S,), integer, -1 for unmatched rows. No column appears twice.
        """
        raise NotImplementedError(f"{type(self).__name__} must override permutation or solve")

    def solve(self, pairs: Pairs) -> Solution:
        """Match pairs. Several threads may call this at once."""
        affinities = pairs.affinities()
        permutations = np.stack([self.permutation(affinity) for affinity in affinities])
        values = certificate.matched_sums(affinities, permutations)
        if self.reaches_identity(*affinities.shape[1:]):
            certificate.prefer_identity(pairs.aligned_sums, affinities.shape[2], permutations, values)
        return Solution.uncertified(values, permutations, self.name)

    def products(self, x: Locations, y: Locations) -> np.ndarray:
        """Matched inner products of all pairs of two sets of images, (N, M), float64; needs `at_once`."""
        raise NotImplementedError(f"{self.name} solves pairs one by one")


def solve_both_ways(method: Matching, pairs: Pairs) -> Solution:
    """Solve pairs, in both directions if the method is not symmetric.

    Raises:
        MatchingError: the method returned a bound below its own value.
    """
    solution = method.solve(pairs) if method.symmetric else _from_both_sides(method, pairs)
    bounds = certificate.bounds_above(
        solution.bounds, solution.values, partial(_rounding, pairs, solution), method.name
    )
    return solution if bounds is solution.bounds else replace(solution, bounds=bounds)


def _rounding(pairs: Pairs, solution: Solution, k: int) -> float:
    """How far rounding alone can push the bound of pair k below its value."""
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
    """Invert permutations (..., S) of x into permutations (..., count) of y, with -1 for unmatched locations."""
    partners = np.full((*permutations.shape[:-1], count + 1), -1, permutations.dtype)
    # Unmatched locations write into one extra column, which is dropped.
    rows = np.broadcast_to(np.arange(permutations.shape[-1]), permutations.shape)
    np.put_along_axis(partners, np.where(permutations < 0, count, permutations), rows, axis=-1)
    return partners[..., :count]
