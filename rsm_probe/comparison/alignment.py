"""Centred kernel alignment between RSMs, for one pair and for any number at once.

HSIC of either kind is an inner product of centred matrices. An estimator therefore turns each RSM into one row of
numbers; a single matrix product of such rows gives all values between any number of RSMs. Mini-batch CKA divides sums
of these values over batches, each times what its estimator divided it by, so that a batch counts by its pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from rsm_probe.comparison.inputs import of_size_one, stack_rsms
from rsm_probe.errors import ComparisonError, look_up

# A centred RSM whose squared norm is below this share of the RSM's own is what float32 leaves of a constant one.
_CONSTANT = 1e-14


@dataclass(frozen=True)
class Estimator(ABC):
    """A way to estimate HSIC from RSMs of one set of images.

    An RSM is centred by taking from it the matrix `a_i + a_j` that leaves every row with sum 0, over the entries that
    the estimator counts: `K - a_i - a_j`.
    """

    name: ClassVar[str]
    fewest: ClassVar[int]
    # Whether the similarity of an image with itself counts.
    _diagonal: ClassVar[bool]

    def rows(self, rsms: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Rows whose inner products are HSIC values.

        Args:
            rsms: stack of symmetric RSMs over the same images, shape (R, N, N).
            weights: how often each image counts, shape (N,), whole numbers that sum to N (a bootstrap sample); pairs of
                an image with its own copies are left out. Once each where left out.

        Returns:
            Shape (R, N * (N + 1) / 2) or fewer columns, float64. The row of a constant RSM is exactly zero.

        Raises:
            ComparisonError: fewer images than the estimator needs; weights that leave too few different ones.
        """
        rsms = np.asarray(rsms, dtype=np.float64)
        count = rsms.shape[-1]
        if count < self.fewest:
            raise ComparisonError(
                f"{self.name} CKA needs at least {self.fewest} images in a batch, found {count}; use larger batches"
            )
        weights = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
        own = 1.0 if self._diagonal else 0.0
        # Row i must vanish: (sum of w - 2 w_i + 2 own) a_i + sum of w_j a_j = its weighted sum.
        slack = weights.sum() - 2 * weights + 2 * own
        if (slack[weights > 0] <= 0).any() or (weights > 0).sum() < self.fewest:
            raise ComparisonError(f"too few different images are left for {self.name} CKA")
        share = np.where(weights > 0, weights / np.where(weights > 0, slack, 1.0), 0.0)
        # Summed without the diagonal, not subtracted from the whole: a large diagonal would take the digits.
        others = np.where(np.eye(count, dtype=bool), 0.0, rsms)
        sums = others @ weights + own * np.diagonal(rsms, axis1=1, axis2=2)
        total = (sums @ share) / (1 + share.sum())
        parts = (sums - total[:, None]) / np.where(weights > 0, slack, 1.0)

        first, second = np.triu_indices(count, 0 if self._diagonal else 1)
        counted = np.where(first == second, weights[first], 2 * weights[first] * weights[second])
        scale = np.sqrt(counted / self.divisor(count))
        raw = rsms[:, first, second]
        centred = (raw - parts[:, first] - parts[:, second]) * scale
        raw *= scale
        centred[(centred**2).sum(axis=1) <= _CONSTANT * (raw**2).sum(axis=1)] = 0.0
        return centred

    @staticmethod
    @abstractmethod
    def divisor(count: int) -> float:
        """What HSIC divides a sum over pairs of images by: the weight of a batch of so many images in a sum."""


@dataclass(frozen=True)
class Unbiased(Estimator):
    """HSIC_1 of Song et al. (paper, reference 28): diagonals left out; its mean is 0 for independent RSMs.

    Uses the U-centred matrix: for i != j, `K_ij - r_i / (n-2) - r_j / (n-2) + s / ((n-1)(n-2))` with row sums r and
    total s of K without its diagonal; `HSIC_1 = <U(K), U(L)> / (n (n-3))`. It can be negative.
    """

    name: ClassVar[str] = "unbiased"
    fewest: ClassVar[int] = 4
    _diagonal: ClassVar[bool] = False

    @staticmethod
    def divisor(count: int) -> float:
        """N (N-3)."""
        return float(count * (count - 3))


@dataclass(frozen=True)
class Biased(Estimator):
    """HSIC of Gretton et al. (paper, equation 1): `tr(K H L H) / (n-1)^2`. Grows towards 1 with few images."""

    name: ClassVar[str] = "biased"
    fewest: ClassVar[int] = 2
    _diagonal: ClassVar[bool] = True

    @staticmethod
    def divisor(count: int) -> float:
        """(N-1)^2."""
        return float((count - 1) ** 2)


_ESTIMATORS: dict[str, Estimator] = {estimator.name: estimator for estimator in (Unbiased(), Biased())}


def estimator_names() -> list[str]:
    """All names that `get_estimator` knows."""
    return list(_ESTIMATORS)


def get_estimator(estimator: str | Estimator) -> Estimator:
    """An estimator from its name.

    Raises:
        ComparisonError: unknown name; the message holds the known ones.
    """
    if isinstance(estimator, Estimator):
        return estimator
    return look_up(estimator, _ESTIMATORS, "estimator", ComparisonError)


def hsic(k: Any, l: Any, estimator: str | Estimator = "unbiased") -> float:  # noqa: E741 (the field's letter)
    """Hilbert-Schmidt independence criterion between two RSMs.

    Args:
        k: symmetric array (N, N), or an `RSM`.
        l: the same over the same images.
        estimator: "unbiased" (HSIC_1; 0 on average for independent RSMs, at least 4 images) or "biased" (equation 1).

    Raises:
        ComparisonError: other shapes or images, no symmetry, values that are not finite, too few images.
    """
    rows = get_estimator(estimator).rows(stack_rsms([k, l], ["first", "second"]))
    return float(rows[0] @ rows[1])


def cka(k: Any, l: Any, estimator: str | Estimator = "unbiased") -> float:  # noqa: E741 (the field's letter)
    """Centred kernel alignment between two RSMs (paper, equation 2).

    Invariant to positive scaling and shifts of either RSM and to one permutation of the images of both.

    Args:
        k: symmetric array (N, N), or an `RSM`; of RSMs, the image ids must agree.
        l: the same over the same images.
        estimator: "unbiased" (at least 4 images; may leave [0, 1] slightly) or "biased" (in [0, 1] for positive
            semi-definite RSMs, near 1 for few images and many features, whatever they are).

    Raises:
        ComparisonError: other shapes or images, no symmetry, values that are not finite, too few images, or an
            RSM whose HSIC with itself is not above 0 (a constant RSM), which leaves CKA undefined.
    """
    rows = get_estimator(estimator).rows(of_size_one(stack_rsms([k, l], ["first", "second"])))
    own = (rows**2).sum(axis=1)
    for name, value in zip(("first", "second"), own, strict=True):
        if not value > 0:
            raise ComparisonError(
                f"the {name} RSM is constant over all pairs of images, up to 1e-7 of its size, so its CKA is undefined"
            )
    return float(rows[0] @ rows[1] / np.sqrt(own[0] * own[1]))


def cka_grid(hsics: np.ndarray) -> np.ndarray:
    """All CKA values from all HSIC values, or from their sums over mini-batches.

    Args:
        hsics: shape (R, R), HSIC of every RSM with every other, times any positive number.

    Returns:
        Shape (R, R); NaN in the rows and columns of RSMs whose HSIC with themselves is not above 0.
    """
    own = np.diagonal(hsics)
    scale = np.sqrt(np.where(own > 0, own, np.nan))
    grid = hsics / (scale[:, None] * scale[None, :])
    # The diagonal is 1 by definition; division leaves it off by the last bit.
    np.fill_diagonal(grid, np.where(own > 0, 1.0, np.nan))
    return grid
