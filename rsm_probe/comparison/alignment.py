"""Centred kernel alignment (CKA) between RSMs, for one pair and for any number at once.

HSIC is an inner product of centred matrices. An estimator therefore turns each RSM into one row of numbers, and a
single matrix product of such rows gives all values between any number of RSMs. Mini-batch CKA divides sums of these
values over batches, each multiplied by its estimator's divisor, so that a batch counts by its pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rsm_probe.comparison.inputs import CONSTANT, in_range, stack_rsms
from rsm_probe.errors import ComparisonError, look_up


@dataclass(frozen=True)
class Estimator:
    """A way to estimate HSIC from the RSMs of one set of images.

    - "unbiased": HSIC_1 of Song et al. (paper, reference 28), which leaves the diagonals out. Its mean is 0 for
      independent RSMs, and it can be negative. It uses the U-centred matrix: for i != j,
      `K_ij - r_i / (n-2) - r_j / (n-2) + s / ((n-1)(n-2))` with the row sums r and the total s of K without its
      diagonal; `HSIC_1 = <U(K), U(L)> / (n (n-3))`.
    - "biased": HSIC of Gretton et al. (paper, equation 1), `tr(K H L H) / (n-1)^2`. It grows towards 1 with few images.

    Both centre an RSM by subtracting the matrix `a_i + a_j` that leaves every row with sum 0, over the entries that
    they count: `K - a_i - a_j`.

    Attributes:
        name: what users call it.
        measure: name of CKA by this estimator in `MEASURES`.
        fewest: the smallest number of images.
        diagonal: whether the similarity of an image with itself counts.
    """

    name: str
    measure: str
    fewest: int
    diagonal: bool

    def rows(self, rsms: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Rows whose inner products are HSIC values.

        Args:
            rsms: stack of symmetric RSMs over the same images, shape (R, N, N).
            weights: how often each image counts, shape (N,), whole numbers that sum to N (a bootstrap sample); pairs of
                an image with its own copies are left out. Once each by default.

        Returns:
            Shape (R, N * (N + 1) / 2) or fewer columns, float64. The row of a constant RSM is exactly zero.

        Raises:
            ComparisonError: fewer images than the estimator needs, or weights that leave too few distinct ones.
        """
        rsms = np.asarray(rsms, dtype=np.float64)
        count = rsms.shape[-1]
        if count < self.fewest:
            raise ComparisonError(
                f"{self.name} CKA needs at least {self.fewest} images in a batch, found {count}; use larger batches"
            )
        weights = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
        own = 1.0 if self.diagonal else 0.0
        # Row i must vanish: (sum of w - 2 w_i + 2 own) a_i + sum of w_j a_j = its weighted sum.
        slack = weights.sum() - 2 * weights + 2 * own
        if (slack[weights > 0] <= 0).any() or (weights > 0).sum() < self.fewest:
            raise ComparisonError(f"too few different images are left for {self.name} CKA")
        share = np.where(weights > 0, weights / np.where(weights > 0, slack, 1.0), 0.0)
        # Summed without the diagonal: subtracting a large diagonal from the whole sum would lose digits.
        others = np.where(np.eye(count, dtype=bool), 0.0, rsms)
        sums = others @ weights + own * np.diagonal(rsms, axis1=1, axis2=2)
        total = (sums @ share) / (1 + share.sum())
        offsets = (sums - total[:, None]) / np.where(weights > 0, slack, 1.0)

        row, column = np.triu_indices(count, 0 if self.diagonal else 1)
        pair_weights = np.where(row == column, weights[row], 2 * weights[row] * weights[column])
        scale = np.sqrt(pair_weights / self.divisor(count))
        raw = rsms[:, row, column]
        centred = (raw - offsets[:, row] - offsets[:, column]) * scale
        raw *= scale
        centred[(centred**2).sum(axis=1) <= CONSTANT * (raw**2).sum(axis=1)] = 0.0
        return centred

    def divisor(self, count: int) -> float:
        """Number that HSIC divides a sum over pairs of `count` images by: the weight of such a batch in a sum."""
        return float((count - 1) ** 2 if self.diagonal else count * (count - 3))


ESTIMATORS = {
    estimator.name: estimator
    for estimator in (
        Estimator("unbiased", measure="cka", fewest=4, diagonal=False),
        Estimator("biased", measure="cka-biased", fewest=2, diagonal=True),
    )
}


def get_estimator(estimator: str | Estimator) -> Estimator:
    """Look an estimator up by its name.

    Raises:
        ComparisonError: unknown name; the message lists the known ones.
    """
    return (
        estimator if isinstance(estimator, Estimator) else look_up(estimator, ESTIMATORS, "estimator", ComparisonError)
    )


def hsic(k: Any, l: Any, estimator: str | Estimator = "unbiased") -> float:  # noqa: E741 (the field's letter)
    """Hilbert-Schmidt independence criterion between two RSMs.

    Args:
        k: symmetric array (N, N), or an `RSM`.
        l: the same over the same images.
        estimator: "unbiased" (HSIC_1; 0 on average for independent RSMs, at least 4 images) or "biased" (equation 1).

    Raises:
        ComparisonError: different shapes or images, no symmetry, values that are not finite, too few images.
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
        ComparisonError: different shapes or images, no symmetry, values that are not finite, too few images, or an
            RSM whose HSIC with itself is not above 0 (a constant RSM), which leaves CKA undefined.
    """
    rows = get_estimator(estimator).rows(in_range(stack_rsms([k, l], ["first", "second"])))
    own = (rows**2).sum(axis=1)
    for name, value in zip(("first", "second"), own, strict=True):
        if not value > 0:
            raise ComparisonError(
                f"the {name} RSM is constant over all pairs of images, up to 1e-7 of its size, so its CKA is undefined"
            )
    return float(rows[0] @ rows[1] / np.sqrt(own[0] * own[1]))


def cka_grid(hsics: np.ndarray) -> np.ndarray:
    """Compute all CKA values from all HSIC values, or from their sums over mini-batches.

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
