"""Values over mini-batches of images, added one by one, in several samples of the images at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from rsm_probe.comparison.alignment import Estimator, cka_grid

# The exponent of an RSM that was 0 so far: below that of any number.
_NOTHING = -1100


class BatchValues(ABC):
    """Sums over mini-batches, from which the values between all RSMs follow.

    Args:
        samples: number of samples S of the images; the first holds all images as they are.
        rsms: number of RSMs R.

    Attributes:
        sums: shape (S, R, R), terms times weights.
        totals: shape (S,), weights.
    """

    def __init__(self, samples: int, rsms: int) -> None:
        self.sums = np.zeros((samples, rsms, rsms))
        self.totals = np.zeros(samples)

    def scaled(self, rsms: np.ndarray) -> np.ndarray:
        """Scale the RSMs (R, N, N) of the next mini-batch as its terms require."""
        return rsms

    @abstractmethod
    def weight(self, images: int) -> float:
        """The weight of a mini-batch, up to a factor."""

    @abstractmethod
    def terms(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Compute what a mini-batch adds, (R, R); arguments as those of `Measure.grid`."""

    def add(self, sample: int, terms: np.ndarray, weight: float) -> None:
        """Add the terms of a mini-batch to one sample."""
        self.sums[sample] += weight * terms
        self.totals[sample] += weight

    @abstractmethod
    def values(self, shuffled: bool = False) -> np.ndarray:
        """Turn the sums into values, once.

        Args:
            shuffled: the images of the columns are in another order than those of the rows, in all samples but the
                first.

        Returns:
            Shape (S, R, R); NaN where a value is undefined in one of the mini-batches of a sample.
        """


class BatchMeans(BatchValues):
    """Means of the values of mini-batches, each weighted by its images.

    Args:
        samples: see `BatchValues`.
        rsms: see `BatchValues`.
        grid: see `Measure.grid`.
    """

    def __init__(self, samples: int, rsms: int, grid: Callable[..., np.ndarray]) -> None:
        super().__init__(samples, rsms)
        self._grid = grid

    def weight(self, images: int) -> float:
        """The number of images."""
        return float(images)

    def terms(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Compute the values of one mini-batch."""
        return self._grid(a, b, weights)

    def values(self, shuffled: bool = False) -> np.ndarray:
        """Divide by the weights; see `BatchValues.values`."""
        self.sums /= self.totals[:, None, None]
        return self.sums


class HsicSums(BatchValues):
    """HSICs summed over mini-batches, each weighted by its pairs of images; CKA is a ratio of such sums.

    Each RSM is scaled by a power of two, so that squares neither overflow nor underflow; CKA keeps every digit.

    Args:
        samples: see `BatchValues`.
        rsms: see `BatchValues`.
        estimator: estimator of HSIC.
    """

    def __init__(self, samples: int, rsms: int, estimator: Estimator) -> None:
        super().__init__(samples, rsms)
        self._estimator = estimator
        self._exponents = np.full(rsms, _NOTHING)

    def scaled(self, rsms: np.ndarray) -> np.ndarray:
        """Scale each RSM so that its largest entry so far is at most 1, and the sums so far alike."""
        largest = np.abs(rsms).max(axis=(1, 2))
        exponents = np.maximum(self._exponents, np.where(largest > 0, np.frexp(largest)[1], _NOTHING))
        shift = self._exponents - exponents
        if shift.any():
            np.ldexp(self.sums, shift[:, None] + shift[None, :], out=self.sums)
        self._exponents = exponents
        return np.ldexp(rsms, -exponents[:, None, None])

    def weight(self, images: int) -> float:
        """The number that HSIC was divided by, about the number of pairs of images."""
        return self._estimator.divisor(images)

    def terms(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Compute the HSICs of one mini-batch."""
        rows = self._estimator.rows(a, weights)
        return rows @ (rows if b is a else self._estimator.rows(b, weights)).T

    def values(self, shuffled: bool = False) -> np.ndarray:
        """Divide by the HSICs of the RSMs with themselves; see `BatchValues.values`."""
        own = np.diagonal(self.sums[0]).copy()
        for sample, sums in enumerate(self.sums):
            if shuffled and sample:
                # A common order of the images leaves the HSIC of an RSM with itself as it is.
                scale = np.sqrt(np.where(own > 0, own, np.nan))
                sums /= scale[:, None] * scale[None, :]
            else:
                sums[:] = cka_grid(sums)
        return self.sums
