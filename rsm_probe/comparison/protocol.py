"""The interface of measures: two stacks of RSMs in, all values between them out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from rsm_probe.comparison.inputs import in_range
from rsm_probe.errors import ComparisonError

# Transformations that leave a value unchanged. Of RSMs: all similarities times a positive number, plus a number, or
# under an increasing function; plus a number for each image; and one new order of the images of both RSMs. Of
# representations: a rotation or reflection of all feature vectors, times a positive number, plus a vector, any
# invertible linear map.
Invariance = Literal["scale", "shift", "monotone", "additive", "images", "rotation", "linear map"]


@dataclass(frozen=True)
class Properties:
    """Facts about a measure, as the documentation lists them.

    Attributes:
        kind: whether larger values mean more alike or less.
        values: range of its values.
        invariances: transformations that leave its values unchanged.
        source: the paper that introduced it.
    """

    kind: Literal["similarity", "distance"]
    values: str
    invariances: tuple[Invariance, ...]
    source: str


class Measure(ABC):
    """A comparison of RSMs over the same images."""

    name: ClassVar[str]
    properties: ClassVar[Properties]
    fewest: ClassVar[int] = 2
    # Whether images may count more than once, as in a bootstrap sample.
    weighted: ClassVar[bool] = False
    # Whether values over several mini-batches follow from sums over them; see `summed_grid`.
    sums_over_batches: ClassVar[bool] = False

    def ready(self, rsms: np.ndarray) -> np.ndarray:
        """Do once what many calls of `grid` on the same images would repeat; values stay the same."""
        return rsms

    def grid(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Compute all values between two stacks.

        Args:
            a: symmetric, finite RSMs, shape (A, N, N).
            b: the same over the same images, shape (B, N, N).
            weights: how often each image counts, shape (N,); see `Estimator.rows`.

        Returns:
            Shape (A, B), float64; NaN where a value is undefined, for example for constant RSMs.

        Raises:
            ComparisonError: too few images, or weights for a measure that takes none.
        """
        if a.shape[-1] < self.fewest:
            raise ComparisonError(f"{self.name} needs at least {self.fewest} images, found {a.shape[-1]}")
        if weights is not None and not self.weighted:
            raise ComparisonError(
                f"{self.name} cannot count an image more than once, as a bootstrap does; CKA and the correlations can"
            )
        return self._grid(a, b, weights)

    @abstractmethod
    def _grid(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None) -> np.ndarray: ...

    def summed_grid(
        self, batches: Sequence[tuple[np.ndarray, np.ndarray]], weights: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Compute all values over several mini-batches of images, as `grid` does over one.

        Args:
            batches: two stacks of RSMs over the images of each batch.
            weights: for each batch, how often each of its images counts.

        Raises:
            NotImplementedError: the measure does not have `sums_over_batches`.
        """
        raise NotImplementedError


class RowMeasure(Measure):
    """A measure that is the cosine between rows of numbers, one per RSM: one matrix product for a whole grid."""

    weighted = True

    @abstractmethod
    def rows(self, rsms: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Turn each RSM into one row, shape (R, P); exactly 0 where the RSM is constant."""

    def _grid(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        rows = self.rows(in_range(a), weights)
        return cosines(rows, rows if b is a else self.rows(in_range(b), weights))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute cosines between rows (A, P) and rows (B, P); NaN where a row is 0."""
    return _unit(a) @ _unit(b).T


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, np.nan)
