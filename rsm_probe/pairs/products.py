"""Pairs of images -> matched inner products, for all who match: batches in memory, tiles on disk, candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from rsm_probe.errors import CostError, MatchingError
from rsm_probe.execution.amounts import format_bytes
from rsm_probe.execution.devices import in_halves
from rsm_probe.matching.matching import Locations, Matching, Pairs, Solution, inverted, solve_both_ways
from rsm_probe.matching.methods.identity import Identity, aligned_products, squared_norms
from rsm_probe.matching.registry import cheap_matchings
from rsm_probe.matching.scaling import each_rescaled
from rsm_probe.pairs.affinities import Block, served_alike

_Item = TypeVar("_Item")
# What rounding to float16 may hide of a gain, relative to the norms: (1 + 2^-11)^2 - 1 of each of the two products
# whose difference it is.
_HALF_PRECISION = 2e-3


def solve_over(method: Matching, pairs: Pairs, aligned: np.ndarray) -> Solution:
    """Solves pairs; values are the identity's float64 products plus what matching gains over them.

    So equal pairings give equal values to the last bit, and an exact method never falls below the identity. Where a
    device runs out of memory, it solves halves of the pairs.

    Args:
        method: any matching.
        pairs: B pairs with what the method needs.
        aligned: products of whole images, equal locations answering to each other (B,), in float64; not read for
            methods without affinity.
    """
    found = in_halves(lambda start, stop: solve_both_ways(method, pairs.part(start, stop)), len(pairs))
    solution = Solution.joined(list(found))
    if pairs.affinity is None or not (method.needs_affinity and method.one_to_one):
        return solution
    base, size = _aligned(pairs.affinity)
    # The same terms summed in another order differ in the last digits.
    noise = size * min(pairs.affinity.shape[1:]) * np.finfo(np.float64).eps
    gains = np.where(np.abs(solution.values - base) > noise, solution.values - base, 0.0)
    hidden = _HALF_PRECISION * pairs.scales() if method.precision == "float16" else 0.0
    bounds = aligned + np.maximum(solution.bounds - base + hidden, gains)
    return replace(solution, values=aligned + gains, bounds=bounds)


def _aligned(affinities: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Sums of what equal locations add up to, and of its magnitudes: (B,) both, in float64."""
    if isinstance(affinities, Tensor):
        on_device = affinities.diagonal(dim1=1, dim2=2)
        sums = torch.stack([part.sum(dim=1, dtype=torch.float64) for part in (on_device, on_device.abs())])
        first, second = sums.cpu().numpy()
        return first, second
    diagonals = np.diagonal(affinities, axis1=1, axis2=2)
    return diagonals.sum(axis=1, dtype=np.float64), np.abs(diagonals).sum(axis=1, dtype=np.float64)


def is_identity(method: Matching, x: Locations, y: Locations) -> bool:
    """Whether equal locations answer to each other; of one location on both sides there is nothing to choose."""
    return isinstance(method, Identity) or (x.count == y.count == 1 and method.one_to_one)


def affinity_bytes(method: Matching, x: Tensor, y: Tensor, memory: int) -> int:
    """Bytes of one affinity, if the method reads any.

    Raises:
        CostError: it exceeds the memory; the message names the methods that need none.
    """
    size = x.shape[1] * y.shape[1] * x.element_size() if method.needs_affinity else 0
    if size > memory:
        raise CostError(
            f"one affinity of {x.shape[1]} x {y.shape[1]} locations takes {format_bytes(size)}, above the memory "
            f"budget of {format_bytes(memory)}; raise memory=, or use a matching that needs no affinity: "
            f"{', '.join(cheap_matchings())}"
        )
    return size


@dataclass(frozen=True, eq=False)
class Tile:
    """What is known of all pairs of a block of images with another.

    Attributes:
        products: matched inner products (N, M), float64.
        bounds: what no matching exceeds (N, M), float64; infinity where a method proves nothing.
        norms_x: |x_i|^2 (N,), float64.
        norms_y: |y_j|^2 (M,), float64.
        permutations: (N, M, S), partners in y of the locations of x, -1 where there is none; None where not asked for.
    """

    products: np.ndarray
    bounds: np.ndarray
    norms_x: np.ndarray
    norms_y: np.ndarray
    permutations: np.ndarray | None

    def transposed(self, locations: int) -> Tile:
        """The same pairs with rows and columns exchanged; `locations` is T."""
        turned = self.permutations
        if turned is not None:
            turned = np.stack([[inverted(row, locations) for row in column] for column in turned.transpose(1, 0, 2)])
        return Tile(self.products.T, self.bounds.T, self.norms_y, self.norms_x, turned)


def match_tile(
    x: Tensor,
    y: Tensor | None,
    method: Matching,
    grids: tuple[tuple[int, ...] | None, tuple[int, ...] | None] = (None, None),
    permutations: bool = False,
    on_device: bool | None = None,
) -> Tile:
    """Matches every image of x with every image of y, in the calling thread.

    Args:
        x: tokens (N, S, C), finite.
        y: tokens (M, T, C), finite, on the same device; None for the pairs within x, each of which is matched once.
        method: any matching.
        grids: (H, W) of the locations of x and y, for methods that move along them.
        permutations: whether to say how locations were paired.
        on_device: whether the device solves them, for a tile of a larger work; None decides by this one.

    Raises:
        MatchingError: the method cannot work on these locations, or is a score of which permutations are asked.
    """
    if permutations and not method.one_to_one:
        raise MatchingError(f"{method.name} is a score, which pairs nothing: there are no permutations to keep")
    scaled_x, units_x = each_rescaled(x.contiguous())
    scaled_y, units_y = (scaled_x, units_x) if y is None else each_rescaled(y.contiguous())
    left = Locations(scaled_x, grids[0])
    right = left if y is None else Locations(scaled_y, grids[1])
    norms_x = squared_norms(scaled_x)
    norms_y = norms_x if y is None else squared_norms(scaled_y)
    products, bounds = np.zeros((len(left), len(right))), np.full((len(left), len(right)), np.inf)
    found = np.full((*products.shape, left.count), -1, np.int32) if permutations else None
    identity = is_identity(method, left, right)
    if identity or method.at_once:
        products = aligned_products(scaled_x, scaled_y) if identity else method.products(left, right)
        if identity and left.count == right.count == 1:
            bounds = products.copy()  # of one location on both sides, there is one matching
        if permutations:
            _solve_all(method, left, right, None, lambda pairs, solved: _keep(found, pairs, solved), on_device)
    else:
        aligned = aligned_products(scaled_x, scaled_y) if method.needs_affinity else None

        def take(pairs: Pairs, solved: Solution) -> None:
            places = pairs.rows, pairs.columns
            products[places] = solved.values
            # Rounding may leave a bound a digit below what was reached.
            bounds[places] = np.where(np.isnan(solved.bounds), np.inf, np.maximum(solved.bounds, solved.values))
            _keep(found, pairs, solved)

        _solve_all(method, left, right, aligned, take, on_device)
    tile = Tile(products, bounds, norms_x, norms_y, found)
    if y is None:
        tile = _mirrored(tile, method.one_to_one, left.count)
    units = units_x[:, None] * units_y
    return replace(
        tile,
        products=tile.products * units,
        bounds=tile.bounds * units,
        norms_x=norms_x * units_x**2,
        norms_y=norms_y * units_y**2,
    )


def _solve_all(
    method: Matching,
    x: Locations,
    y: Locations,
    aligned: np.ndarray | None,
    take: Callable[[Pairs, Solution], None],
    on_device: bool | None,
) -> None:
    """All pairs, or those below the diagonal where x is y, block by block of affinities."""
    method.prepare(x)
    method.prepare(y)
    pairs = len(x) * len(y) if y is not x else len(x) * (len(x) - 1) // 2
    ((source, _),) = served_alike({method.name: method}, x, y, pairs, on_device)
    blocks: Iterator[Block] = chain.from_iterable(
        source.start(*part) for part in source.all_pairs(diagonal=not method.one_to_one)
    )
    # A device computes the next block while a CPU matches this one. Where it matches itself, that only takes memory.
    if x.tokens.device.type != "cpu" and not source.on_device:
        blocks = _one_ahead(blocks)
    for block in blocks:
        places = block.rows, block.columns
        chosen = Pairs(*places, x, y, block.affinity())
        take(chosen, solve_over(method, chosen, block.rows if aligned is None else aligned[places]))
        del block, chosen  # or they would stay in memory until the next one is there


def _one_ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """Asks for the next item before it gives one away."""
    before = list(islice(items, 1))
    for item in items:
        yield before.pop()
        before.append(item)
    yield from before


def _keep(found: np.ndarray | None, pairs: Pairs, solved: Solution) -> None:
    if found is not None:
        found[pairs.rows, pairs.columns] = solved.permutations


def _mirrored(tile: Tile, one_to_one: bool, locations: int) -> Tile:
    """A tile of which the pairs below the diagonal are known, completed."""
    products, bounds = (np.tril(part) + np.tril(part, -1).T for part in (tile.products, tile.bounds))
    if one_to_one:  # an image matches itself location by location, and nothing exceeds that
        np.fill_diagonal(products, tile.norms_x)
        np.fill_diagonal(bounds, tile.norms_x)
    found = tile.permutations
    if found is not None:
        found[np.diag_indices(len(found))] = np.arange(locations)
        for i, j in zip(*np.triu_indices(len(found), 1), strict=True):
            found[i, j] = inverted(found[j, i], locations)
    return replace(tile, products=products, bounds=bounds, permutations=found)
