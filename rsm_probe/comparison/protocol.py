"""The interface of measures: take two stacks of RSMs, return all values between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from rsm_probe.comparison.alignment import cosines
from rsm_probe.comparison.batch_values import BatchMeans, BatchValues
from rsm_probe.comparison.inputs import holds_nan, in_range, known_pairs
from rsm_probe.errors import ComparisonError

if TYPE_CHECKING:
    from rsm_probe.comparison.certified import CertifiedSums

# Transformations that leave a value unchanged. Of the similarities in an RSM: multiply all by a positive number
# ("scale"), add a number ("shift"), apply an increasing function ("monotone"), add a number per image ("additive"),
# reorder the images of both RSMs ("images"). Of feature vectors: rotate or reflect all of them ("rotation"), scale
# them, shift them by a vector, apply an invertible linear map ("linear map").
Invariance = Literal["scale", "shift", "monotone", "additive", "images", "rotation", "linear map"]


@dataclass(frozen=True)
class Properties:
    """Facts about a measure, as listed in the documentation.

    Attributes:
        kind: "similarity" if larger values mean more alike, "distance" if they mean less alike.
        values: range of the values.
        invariances: transformations that leave values unchanged.
        source: the paper that introduced the measure.
    """

    kind: Literal["similarity", "distance"]
    values: str
    invariances: tuple[Invariance, ...]
    source: str


class Measure(ABC):
    """A measure that compares RSMs over the same images."""

    name: ClassVar[str]
    properties: ClassVar[Properties]
    fewest: ClassVar[int] = 2
    # Whether images may count several times, as in a bootstrap sample.
    weighted: ClassVar[bool] = False
    # Whether pairs of images may be missing, which the RSMs then hold as NaN.
    skips_missing: ClassVar[bool] = False
    # What to average over subjects to get the RSM that is most similar to all of them: rows of length 1, or ranks of
    # similarities; None if no such average is known. Noise ceilings follow from it.
    averages: ClassVar[Literal["rows", "ranks"] | None] = None

    def ready(self, rsms: np.ndarray) -> np.ndarray:
        """Precompute what repeated calls of `grid` on the RSMs (R, N, N) share, without changing values."""
        return rsms

    def over_draws(self, a: np.ndarray, b: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Prepare to compute the values between two stacks of RSMs in many draws of images.

        Args:
            a: see `grid`.
            b: see `grid`.

        Returns:
            A function of weights (N,) that computes `grid(a, b, weights)`, up to rounding.
        """
        a, b = self.ready(a), self.ready(b)
        return lambda weights: self.grid(a, b, weights)

    def grid(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Compute all values between two stacks of RSMs.

        Args:
            a: symmetric RSMs, (A, N, N), finite but for missing pairs, which are NaN.
            b: as `a`, over the same images, (B, N, N). A pair that any RSM misses counts for none.
            weights: how often each image counts, (N,); see `Estimator.rows`.

        Returns:
            Shape (A, B), float64; NaN where a value is undefined, for example for constant RSMs.

        Raises:
            ComparisonError: too few images or known pairs, or weights or missing pairs for a measure that does not
                support them.
        """
        self.require_images(a.shape[-1], weights)
        if (known := known_pairs(a) if b is a else known_pairs(a, b)) is None:
            return self._grid(a, b, weights)
        if not self.skips_missing:
            raise self._no_missing()
        rows = np.where(known, a, np.nan)
        return self._grid(rows, rows if b is a else np.where(known, b, np.nan), weights)

    def _no_missing(self) -> ComparisonError:
        return ComparisonError(
            f"{self.name} is not defined where pairs of images are missing; use CKA or a correlation (cka, "
            "rsa-spearman, ...), or take images whose pairs are all known: RSM.subset"
        )

    def require_images(self, count: int, weights: np.ndarray | None = None) -> None:
        """Refuse images for which the measure is not defined.

        Args:
            count: number of images.
            weights: how often each image counts, (N,).

        Raises:
            ComparisonError: too few images, too few different ones under the weights, or weights for a measure that
                does not support them.
        """
        if count < self.fewest:
            raise ComparisonError(f"{self.name} needs at least {self.fewest} images, found {count}")
        if weights is not None and not self.weighted:
            raise ComparisonError(
                f"{self.name} cannot count an image more than once, as a bootstrap does; CKA and the correlations can"
            )
        if weights is not None and (weights > 0).sum() < self.fewest:
            raise ComparisonError(f"too few different images are left for {self.name}")

    @abstractmethod
    def _grid(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None) -> np.ndarray: ...

    def over_batches(self, samples: int, rsms: int) -> BatchValues:
        """Begin to combine the values of several mini-batches, in several samples of their images.

        Args:
            samples: number of samples.
            rsms: number of RSMs, which are compared among themselves.

        Returns:
            Means over the mini-batches, weighted by their images.
        """
        return BatchMeans(samples, rsms, self.grid)

    def certified(self) -> CertifiedSums | None:
        """Begin the sums from which intervals for exact matching follow; None if none are known for this measure."""
        return None


class RowMeasure(Measure):
    """A measure that is the cosine between two rows of numbers, one per RSM: a grid is one matrix product."""

    weighted = True
    skips_missing = True
    averages: ClassVar[Literal["rows", "ranks"] | None] = "rows"

    @abstractmethod
    def rows(self, rsms: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Turn each RSM into one row, (R, P), exactly 0 for constant RSMs.

        Pairs that are missing are NaN in all RSMs; rows that hold NaN say that the measure cannot leave them out.
        """

    def pairs(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Row and column numbers of the entries of an RSM of `count` images that `rows` takes, (P,) each."""
        return np.triu_indices(count, 1)

    def _grid(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        rows = self.rows(in_range(a), weights)
        columns = rows if b is a else self.rows(in_range(b), weights)
        if holds_nan(rows):
            raise self._no_missing()
        return cosines(rows, columns)
