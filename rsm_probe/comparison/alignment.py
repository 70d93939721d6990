"""Centred kernel alignment (CKA) between two RSMs or within any number of them.

HSIC is an inner product of centred matrices. An estimator therefore turns each RSM into one row of numbers, and a
single matrix product of such rows gives the values of all pairs of RSMs. Mini-batch CKA divides sums of HSIC over
batches. Each batch is multiplied by the divisor of its estimator, so that it counts by its number of pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsm_probe.comparison.inputs import CONSTANT, holds_nan, in_range, known_pairs, stack_rsms
from rsm_probe.errors import ComparisonError, look_up

# Eigenvalues below this share of the largest are rounding noise. In graphs of N pairs they are above about 1 / N^3.
_SINGULAR = 1e-12


# Bytes of RSMs beyond which draws are not prepared for, because that takes twice as much.
LARGEST = 1 << 30


@dataclass(frozen=True)
class Estimator:
    """An estimator of HSIC from the RSMs of one set of images.

    - "unbiased": HSIC_1 of Song et al. (paper, reference 28), which omits the diagonals. Its mean is 0 for independent
      RSMs, so it can be negative. It uses the U-centred matrix: for i != j,
      `K_ij - r_i / (n-2) - r_j / (n-2) + s / ((n-1)(n-2))` with the row sums r and the total s of K without its
      diagonal; `HSIC_1 = <U(K), U(L)> / (n (n-3))`.
    - "biased": HSIC of Gretton et al. (paper, equation 1), `tr(K H L H) / (n-1)^2`. With few images, it makes CKA too
      large.

    Both centre an RSM by subtracting a matrix `a_i + a_j`, such that every row of `K - a_i - a_j` sums to 0 over the
    entries that the estimator uses.

    Attributes:
        name: name of the estimator, for users.
        measure: name of CKA by this estimator in `MEASURES`.
        fewest: smallest number of images.
        diagonal: whether the diagonal is used.
    """

    name: str
    measure: str
    fewest: int
    diagonal: bool

    def rows(self, rsms: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Turn RSMs into rows whose inner products are HSIC values.

        Args:
            rsms: stack of symmetric RSMs over the same images, (R, N, N). Missing pairs are NaN in all of them.
            weights: how often each image counts, (N,), whole numbers that sum to N, as in a bootstrap sample. Pairs of
                an image with its own copies are omitted. Default: each image once.

        Returns:
            Shape (R, P) with P <= N (N + 1) / 2, float64, without the pairs of images that do not count or are missing.
            The row of a constant RSM is exactly zero, and that of any RSM if a draw leaves too few known pairs.

        Raises:
            ComparisonError: fewer images than the estimator needs, too few distinct ones under the weights, or too few
                known pairs.
        """
        rsms = np.asarray(rsms, dtype=np.float64)
        count = rsms.shape[-1]
        self.require_images(count, weights)
        if weights is None:
            weights = np.ones(count)
        else:
            drawn = np.flatnonzero(weights)
            rsms, weights = rsms[:, drawn[:, None], drawn], np.asarray(weights, dtype=np.float64)[drawn]
        if holds_nan(rsms):
            return self._rows_of_known(rsms, weights, count, drawn=len(weights) < count or bool((weights != 1).any()))
        offsets = self._offsets(self._sums(rsms, weights), weights)
        row, column = self.pairs(len(weights))
        scale = np.sqrt(self._pair_weights(weights) / self.divisor(count))
        raw = rsms[:, row, column]
        centred = (raw - offsets[:, row] - offsets[:, column]) * scale
        raw *= scale
        centred[(centred**2).sum(axis=1) <= CONSTANT * (raw**2).sum(axis=1)] = 0.0
        return centred

    def _sums(self, rsms: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Weighted sums of the rows of RSMs over the entries that the estimator uses, (R, N)."""
        # Sum without the diagonal: subtracting a large diagonal from the full sum would lose digits.
        sums = np.where(np.eye(len(weights), dtype=bool), 0.0, rsms) @ weights
        return sums + np.diagonal(rsms, axis1=1, axis2=2) if self.diagonal else sums

    def _offsets(self, sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The `a_i` that centre RSMs with these sums of rows, (R, N)."""
        slack = self._slack(weights)
        share = weights / slack
        return (sums - ((sums @ share) / (1 + share.sum()))[:, None]) / slack

    def _pair_weights(self, weights: np.ndarray) -> np.ndarray:
        """How often each entry that `rows` takes counts, (P,)."""
        row, column = self.pairs(len(weights))
        return np.where(row == column, weights[row], 2 * weights[row] * weights[column])

    def over_draws(self, a: np.ndarray, b: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Prepare to compute CKA between two stacks of RSMs in many draws of images.

        Centred entries are orthogonal to every `a_i + a_j`, so the HSIC of K and L is the weighted inner product of
        K and L minus `2 sum_i w_i r_i b_i`, with the row sums r of K and the `b_i` that centre L: products of matrices
        that are the same for all draws.

        Args:
            a: RSMs (A, N, N).
            b: RSMs over the same images, (B, N, N).

        Returns:
            A function of weights (N,), see `rows`, that computes the values (A, B); NaN for constant RSMs.
        """
        sides = [a] if b is a else [a, b]
        if any(holds_nan(side) for side in sides) or max(side.nbytes for side in sides) > LARGEST:
            return lambda weights: cosines(*(self.rows(side, weights) for side in (a, b)))
        count = a.shape[-1]
        row, column = self.pairs(count)
        prepared = []
        for side in sides:
            rsms = np.array(side, dtype=np.float64)
            sizes = (rsms[:, row, column] ** 2).mean(axis=1)
            once = np.ones(count)
            offsets = self._offsets(self._sums(rsms, once), once)  # centred once, so that little is left to cancel
            rsms -= offsets[:, :, None] + offsets[:, None, :]
            if not self.diagonal:
                rsms[:, np.arange(count), np.arange(count)] = 0.0
            entries = rsms[:, row, column]
            prepared.append((rsms, entries, entries**2, sizes))

        def values(weights: np.ndarray) -> np.ndarray:
            self.require_images(count, weights)
            weights = np.asarray(weights, dtype=np.float64)
            pair_weights = self._pair_weights(weights)
            parts = []
            for rsms, entries, squares, sizes in prepared:
                sums = (rsms.reshape(-1, count) @ weights).reshape(-1, count)
                if self.diagonal:  # an image and itself count once, not as often as two of its copies
                    sums += np.diagonal(rsms, axis1=1, axis2=2) * (1 - weights)
                offsets = self._offsets(sums, weights)
                own = squares @ pair_weights - 2 * (sums * offsets) @ weights
                parts.append(
                    (entries, sums, offsets, np.where(own > CONSTANT * sizes * pair_weights.sum(), own, np.nan))
                )
            (entries, sums, _, own), (others, _, offsets, own_b) = parts[0], parts[-1]
            hsics = entries @ (others * pair_weights).T - 2 * (sums * weights) @ offsets.T
            return hsics / np.sqrt(own[:, None] * own_b)

        return values

    def _rows_of_known(self, rsms: np.ndarray, weights: np.ndarray, count: int, *, drawn: bool) -> np.ndarray:
        """`rows` where pairs are missing: subtract the `a_i + a_j` that fit the known entries best (least squares).

        Every row of what is left then sums to 0 over its known entries, which defines the centring where all are known,
        too. For independent images and pairs that are missing at random, the estimate of HSIC stays unbiased: in the
        projection P that fits and subtracts, `E <P K, P L> = rank(P) HSIC`, since P is 0 on every `a_i + a_j`.
        """
        row, column = self.pairs(len(weights))
        known = ~np.isnan(rsms[:, row, column]).any(axis=0)
        row, column = row[known], column[known]
        counts = np.where(row == column, weights[row], 2 * weights[row] * weights[column])
        normal = np.zeros((len(weights), len(weights)))
        for one, other in ((row, row), (column, column), (row, column), (column, row)):
            np.add.at(normal, (one, other), counts)
        eigenvalues, vectors = np.linalg.eigh(normal)
        nonzero = eigenvalues > _SINGULAR * eigenvalues.max(initial=0.0)
        remaining = len(row) - int(nonzero.sum())  # the rank of the projection P
        if remaining < len(self.pairs(self.fewest)[0]) - self.fewest:
            if drawn:
                return np.zeros((len(rsms), 1))
            others = int((row != column).sum())
            raise ComparisonError(
                f"{others} pairs of images are known in all RSMs, too few for {self.name} CKA; compare fewer RSMs at "
                f"once"
            )
        inverse = (vectors[:, nonzero] / eigenvalues[nonzero]) @ vectors[:, nonzero].T
        raw = rsms[:, row, column]
        centred, sums = raw.copy(), np.empty((len(rsms), len(weights)))
        for _ in range(2):  # the second time, rounding is subtracted
            for number, values in enumerate(centred * counts):
                sums[number] = np.bincount(row, values, len(weights)) + np.bincount(column, values, len(weights))
            offsets = sums @ inverse
            centred -= offsets[:, row] + offsets[:, column]
        scale = np.sqrt(counts / (self.divisor(count) if self.diagonal or drawn else 2.0 * remaining))
        centred, raw = centred * scale, raw * scale
        centred[(centred**2).sum(axis=1) <= CONSTANT * (raw**2).sum(axis=1)] = 0.0
        return centred

    def pairs(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Row and column numbers of the entries of an RSM of `count` images that `rows` takes, (P,) each."""
        return np.triu_indices(count, 0 if self.diagonal else 1)

    def require_images(self, count: int, weights: np.ndarray | None = None) -> None:
        """Refuse too few images.

        Args:
            count: number of images.
            weights: how often each image counts, (N,); see `rows`.

        Raises:
            ComparisonError: fewer images than the estimator needs, or too few distinct ones under the weights.
        """
        if count < self.fewest:
            raise ComparisonError(
                f"{self.name} CKA needs at least {self.fewest} images in a batch, found {count}; use larger batches"
            )
        if weights is not None:
            drawn = weights > 0
            if (self._slack(weights)[drawn] <= 0).any() or drawn.sum() < self.fewest:
                raise ComparisonError(f"too few different images are left for {self.name} CKA")

    def _slack(self, weights: np.ndarray) -> np.ndarray:
        # Row i must sum to 0: (sum of w - 2 w_i + 2 own) a_i + sum of w_j a_j = its weighted sum.
        return weights.sum() - 2 * weights + (2.0 if self.diagonal else 0.0)

    def divisor(self, count: int) -> float:
        """The number that HSIC divides sums over `count` images by, which is also the weight of such a batch."""
        return float((count - 1) ** 2 if self.diagonal else count * (count - 3))


ESTIMATORS = {
    estimator.name: estimator
    for estimator in (
        Estimator("unbiased", measure="cka", fewest=4, diagonal=False),
        Estimator("biased", measure="cka-biased", fewest=2, diagonal=True),
    )
}


def get_estimator(estimator: str | Estimator) -> Estimator:
    """Look up an estimator by name.

    Raises:
        ComparisonError: unknown name; the message lists the known ones.
    """
    return (
        estimator if isinstance(estimator, Estimator) else look_up(estimator, ESTIMATORS, "estimator", ComparisonError)
    )


def hsic(
    k: Any,
    l: Any,  # noqa: E741 (the field's letter)
    estimator: str | Estimator = "unbiased",
    *,
    skip_missing: bool = False,
) -> float:
    """Compute the Hilbert-Schmidt independence criterion (HSIC) between two RSMs (paper, equation 1).

    Args:
        k: symmetric array (N, N), or an `RSM`.
        l: a second RSM over the same images.
        estimator: "unbiased" (HSIC_1: 0 on average for independent RSMs; at least 4 images) or "biased" (equation 1).
        skip_missing: leave out pairs of images that are NaN in one of the RSMs; for the unbiased estimator, which stays
            unbiased if they are missing at random.

    Returns:
        HSIC, in the units of one RSM times those of the other.

    Raises:
        ComparisonError: different shapes or images, an asymmetric matrix, non-finite values, or too few images.
    """
    estimator = get_estimator(estimator)
    stack = stack_rsms([k, l], ["first", "second"], skip_missing=skip_missing)
    if estimator.diagonal and known_pairs(stack) is not None:
        raise ComparisonError(
            "biased HSIC is not defined where pairs are missing (its CKA is); use estimator='unbiased'"
        )
    rows = estimator.rows(stack)
    return float(rows[0] @ rows[1])


def cka(
    k: Any,
    l: Any,  # noqa: E741 (the field's letter)
    estimator: str | Estimator = "unbiased",
    *,
    skip_missing: bool = False,
) -> float:
    """Compute the centred kernel alignment between two RSMs (paper, equation 2).

    CKA is invariant to positive scaling and shifts of either RSM, and to a common permutation of the images.

    Args:
        k: symmetric array (N, N), or an `RSM`; image ids of two `RSM`s must agree (`cka(*k.align(l))` makes them).
        l: a second RSM over the same images.
        estimator: "unbiased" (at least 4 images; may leave [0, 1] slightly) or "biased" (in [0, 1] for positive
            semi-definite RSMs; close to 1 for any RSMs of few images and many features).
        skip_missing: leave out pairs of images that are NaN in one of the RSMs; the others are centred by least
            squares, as in rsatoolbox's `cosine_cov`, which equals "biased".

    Returns:
        CKA, in [-1, 1] up to what the unbiased estimator leaves.

    Example:
        >>> import numpy as np, rsm_probe
        >>> features = np.random.default_rng(0).normal(size=(20, 5))    # 20 images
        >>> k = features @ features.T
        >>> round(rsm_probe.cka(k, 3 * k + 1), 6)    # scale and shift do not matter
        1.0

    Raises:
        ComparisonError: different shapes or images, an asymmetric matrix, non-finite values, too few images or known
            pairs, or a constant RSM, for which CKA is undefined.
    """
    stack = in_range(stack_rsms([k, l], ["first", "second"], skip_missing=skip_missing))
    rows = get_estimator(estimator).rows(stack)
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
        hsics: HSIC of all pairs of R RSMs, (R, R), up to a positive factor.

    Returns:
        Shape (R, R); NaN in the rows and columns of RSMs whose HSIC with themselves is not positive.
    """
    own = np.diagonal(hsics)
    scale = np.sqrt(np.where(own > 0, own, np.nan))
    grid = hsics / (scale[:, None] * scale[None, :])
    # The diagonal is 1 by definition, but the division may be off by the last bit.
    np.fill_diagonal(grid, np.where(own > 0, 1.0, np.nan))
    return grid


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute cosines between rows (A, P) and rows (B, P); NaN if a row is 0."""
    return unit_rows(a) @ unit_rows(b).T


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Scale rows (R, P) to norm 1; NaN if a row is 0."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, np.nan)
