"""What every comparison of RSMs offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from rsm_probe.comparison.inputs import of_size_one
from rsm_probe.errors import ComparisonError

# What a value does not change under. Of RSMs: all similarities times a positive number, plus a number, or under an
# increasing function; plus a number for each image; and one new order of the images of both RSMs. Of representations:
# one rotation or mirroring of all feature vectors, times a positive number, plus a vector, any invertible linear map.
Invariance = Literal["scale", "shift", "monotone", "additive", "images", "rotation", "linear map"]


@dataclass(frozen=True)
class About:
    """What a measure is.

    Attributes:
        kind: whether more means more alike or less.
        values: the range of its values.
        invariances: what its values do not change under.
        source: where it is from.
    """

    kind: Literal["similarity", "distance"]
    values: str
    invariances: tuple[Invariance, ...]
    source: str


class Measure(ABC):
    """A comparison of RSMs over the same images."""

    name: ClassVar[str]
    about: ClassVar[About]
    fewest: ClassVar[int] = 2
    # Whether images may count more than once, as in a bootstrap sample.
    weighted: ClassVar[bool] = False

    def ready(self, rsms: np.ndarray) -> np.ndarray:
        """RSMs with what can be done once for many calls of `grid` on the same images done; values stay the same."""
        return rsms

    def grid(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """All values between two stacks.

        Args:
            a: symmetric, finite RSMs, shape (A, N, N).
            b: the same over the same images, shape (B, N, N).
            weights: how often each image counts, shape (N,); see `Estimator.rows`.

        Returns:
            Shape (A, B), float64; NaN where a value is undefined, such as for RSMs that are constant.

        Raises:
            ComparisonError: too few images, or weights for a measure that has none.
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


class RowMeasure(Measure):
    """A measure that is the cosine between rows of numbers, one for each RSM: one matrix product for a whole grid."""

    weighted = True

    @abstractmethod
    def rows(self, rsms: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """One row for each RSM, shape (R, P); exactly 0 where the RSM is constant."""

    def _grid(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        rows = self.rows(of_size_one(a), weights)
        return cosines(rows, rows if b is a else self.rows(of_size_one(b), weights))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines between rows (A, P) and rows (B, P); NaN where a row is 0."""
    first, second = _unit(a), _unit(b)
    return first @ second.T


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, np.nan)
