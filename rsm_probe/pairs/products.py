"""Results for all pairs of two sides: matched inner products, bounds and permutations, filled in block by block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rsm_probe.matching.matching import Matching, Solution, inverted
from rsm_probe.pairs.sides import Side


@dataclass(frozen=True, eq=False)
class MatchedProducts:
    """Results for all pairs of two sets of images under one method.

    Attributes:
        products: matched inner products (N, M), float64.
        bounds: upper bounds of any matching (N, M), float64; infinity where a method proves nothing; None where not
            asked for.
        norms_x: |x_i|^2 (N,), float64.
        norms_y: |y_j|^2 (M,), float64.
        permutations: (N, M, S), partners in y of the locations of x, -1 where there is none; None where not asked for.
    """

    products: np.ndarray
    bounds: np.ndarray | None
    norms_x: np.ndarray
    norms_y: np.ndarray
    permutations: np.ndarray | None

    @property
    def gap(self) -> np.ndarray | None:
        """Bounds minus products (N, M), in float32 and rounded up, as stores keep them; None without bounds."""
        if self.bounds is None:
            return None
        exact = self.bounds - self.products
        with np.errstate(over="ignore"):  # infinity is an upper bound, too
            rounded = exact.astype(np.float32)
        return np.where(rounded < exact, np.nextafter(rounded, np.float32(np.inf)), rounded)

    def transposed(self, locations: int) -> MatchedProducts:
        """The same pairs with rows and columns exchanged; `locations` is T."""
        bounds = None if self.bounds is None else self.bounds.T
        turned = None if self.permutations is None else inverted(self.permutations.transpose(1, 0, 2), locations)
        return MatchedProducts(self.products.T, bounds, self.norms_y, self.norms_x, turned)


def permutation_dtype(locations: int) -> np.dtype:
    """The smallest integer type that can number the locations of an image."""
    return np.dtype(np.int16 if locations <= np.iinfo(np.int16).max else np.int32)


class ProductMatrix:
    """A matrix over all pairs that blocks of solved pairs fill, in any order and from any thread.

    Args:
        x: the images in the rows.
        y: the images in the columns; x itself for the pairs within x, of which those below the diagonal are solved.
        method: solves them.
        products: of all pairs, where known at once; solutions then only add permutations.
        bounds: whether to keep bounds.
        permutations: whether to keep the matched locations.
    """

    def __init__(
        self, x: Side, y: Side, method: Matching, products: np.ndarray | None, bounds: bool, permutations: bool
    ) -> None:
        self._units = x.units, y.units
        self._norms, self._within, self._one_to_one = (x.squared_norms, y.squared_norms), y is x, method.one_to_one
        self._locations, shape = x.locations.count, (len(x), len(y))
        self._solved = products is None
        self._products = np.zeros(shape) if products is None else products
        self._bounds = np.full(shape, np.inf) if bounds else None
        self._permutations = np.full((*shape, self._locations), -1, np.int32) if permutations else None
        if bounds and products is not None and self._locations == y.locations.count == 1 and self._one_to_one:
            self._bounds = products.copy()  # of one location on both sides, there is one matching

    def fill(self, rows: np.ndarray, columns: np.ndarray, solution: Solution) -> None:
        """Store solved pairs (B,)."""
        if self._solved:
            self._products[rows, columns] = solution.values
            if self._bounds is not None:
                # Rounding may leave a bound a digit below the value of its pair.
                bounds = np.maximum(solution.bounds, solution.values)
                self._bounds[rows, columns] = np.where(np.isnan(solution.bounds), np.inf, bounds)
        if self._permutations is not None and solution.permutations is not None:
            self._permutations[rows, columns] = solution.permutations

    def pair_equal_locations(self, partners: np.ndarray) -> None:
        """Store the partners (S,) of the identity for all pairs."""
        if self._permutations is not None:
            self._permutations[:] = partners

    def completed(self) -> MatchedProducts:
        """Results in the unit of the representations; within one set of images, both halves and the diagonal."""
        products, bounds = (self._mirrored(part) for part in (self._products, self._bounds))
        assert products is not None
        permutations = self._permutations
        if permutations is not None and self._within:
            permutations[np.diag_indices(len(permutations))] = np.arange(self._locations)
            rows, columns = np.triu_indices(len(permutations), 1)
            permutations[rows, columns] = inverted(permutations[columns, rows], self._locations)
        return MatchedProducts(products, bounds, *self._norms, permutations)

    def _mirrored(self, values: np.ndarray | None) -> np.ndarray | None:
        """Values in the unit of the representations; an image matches itself location by location."""
        if values is None:
            return None
        if self._within:
            values = np.tril(values) + np.tril(values, -1).T
        values = values * (self._units[0][:, None] * self._units[1])
        if self._within and self._one_to_one:
            np.fill_diagonal(values, self._norms[0])
        return values
