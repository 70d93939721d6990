"""Measures that compare RSMs, by name, and functions that compare two RSMs.

Klabunde et al. (paper, reference 10; section 3.3) survey the family. A new measure is one class and one line in
`MEASURES`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import numpy as np

from rsm_probe.checks import brief
from rsm_probe.comparison.alignment import ESTIMATORS
from rsm_probe.comparison.batch_values import HsicSums
from rsm_probe.comparison.certified import CertifiedSums
from rsm_probe.comparison.correlations import CosineRSA, KendallRSA, PearsonRSA, SpearmanRSA
from rsm_probe.comparison.inputs import stack_rsms
from rsm_probe.comparison.protocol import Invariance, Measure, Properties, RowMeasure
from rsm_probe.errors import ComparisonError, look_up

# Spreads and eigenvalues below this share of an RSM's size are rounding noise.
_CONSTANT = 1e-12
_CKA_INVARIANCES: tuple[Invariance, ...] = ("scale", "shift", "additive", "images")


class CKA(RowMeasure):
    """Centred kernel alignment (paper, equation 2) with the unbiased estimator of HSIC."""

    estimator = ESTIMATORS["unbiased"]
    name = estimator.measure
    properties = Properties(
        "similarity", "[-1, 1], 0 on average for unrelated RSMs", _CKA_INVARIANCES, "Song et al. 2012"
    )

    def rows(self, rsms: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Centre the entries; see `Estimator.rows`."""
        return self.estimator.rows(rsms, weights)

    def require_images(self, count: int, weights: np.ndarray | None = None) -> None:
        """Refuse images for which the estimator is not defined; see `Estimator.require_images`."""
        self.estimator.require_images(count, weights)

    def over_batches(self, samples: int, rsms: int) -> HsicSums:
        """Sum HSICs over mini-batches, each weighted by its pairs of images."""
        return HsicSums(samples, rsms, self.estimator)

    def certified(self) -> CertifiedSums | None:
        """Sums for CKA by this estimator; None for a subclass with rows of its own."""
        return CertifiedSums(self.estimator) if type(self).rows is CKA.rows else None


class BiasedCKA(CKA):
    """`CKA` with the biased estimator of HSIC."""

    estimator = ESTIMATORS["biased"]
    name = estimator.measure
    properties = Properties(
        "similarity", "[-1, 1]; [0, 1] of positive semi-definite RSMs", _CKA_INVARIANCES, "Kornblith et al. 2019"
    )


class NormDifference(Measure):
    """Frobenius norm of the difference of two RSMs, diagonals included (Klabunde et al. 2023)."""

    name = "norm-difference"
    properties = Properties("distance", "[0, inf)", ("images",), "Klabunde et al. 2023")

    def _grid(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        from scipy.spatial.distance import cdist

        return cdist(a.reshape(len(a), -1), b.reshape(len(b), -1))


class Bures(Measure):
    """Bures similarity of centred RSMs (Tang et al. 2020): the nuclear norm of `K^(1/2) L^(1/2)`.

    Negative eigenvalues, which semantic RSMs may have, count as 0; see `negative_share` for their weight.
    """

    name = "bures"
    properties = Properties("similarity", "[0, inf)", ("additive", "shift", "images"), "Tang et al. 2020")

    def _grid(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        return self._nuclear_norms([_root(rsm) for rsm in a], [_root(rsm) for rsm in b])

    def _nuclear_norms(self, first: list[np.ndarray], second: list[np.ndarray]) -> np.ndarray:
        from scipy.linalg import svdvals

        return np.array([[float(svdvals(x.T @ y).sum()) if x.size and y.size else 0.0 for y in second] for x in first])


class NormalisedBures(Bures):
    """`Bures` divided by the square roots of the traces: the cosine of the Procrustes angle (Harvey et al. 2024)."""

    name = "bures-normalised"
    properties = Properties(
        "similarity", "[0, 1]", ("scale", "additive", "shift", "images"), "Tang et al. 2020; Harvey et al. 2024"
    )

    def _nuclear_norms(self, first: list[np.ndarray], second: list[np.ndarray]) -> np.ndarray:
        x, y = ([float(np.linalg.norm(root)) for root in roots] for roots in (first, second))
        scale = np.outer(x, y)
        return super()._nuclear_norms(first, second) / np.where(scale > 0, scale, np.nan)


@dataclass(frozen=True)
class _Neighbours(Measure):
    """A comparison of each image's nearest neighbours, averaged over images.

    An image is not its own neighbour. Ties go to the image that comes first, so a different order of the images can
    change the value if there are ties.

    Attributes:
        neighbours: number of neighbours, fewer than images.
    """

    neighbours: int = 10

    def require_images(self, count: int, weights: np.ndarray | None = None) -> None:
        """Refuse fewer images than neighbours, and all weights; see `Measure.require_images`."""
        super().require_images(count, weights)
        if (
            isinstance(self.neighbours, bool)
            or not isinstance(self.neighbours, Integral)
            or not 0 < self.neighbours < count
        ):
            raise ComparisonError(
                f"{self.name} needs between 1 and {count - 1} neighbours for {count} images, found "
                f"{brief(self.neighbours)}"
            )

    def _grid(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        spreads = [np.ptp(stack[:, ~np.eye(stack.shape[-1], dtype=bool)], axis=1) for stack in (a, b)]
        flat = [s <= _CONSTANT * np.abs(stack).max(axis=(1, 2)) for s, stack in zip(spreads, (a, b), strict=True)]
        overlaps = self._overlaps(self._ranks(a), self._ranks(b))
        return np.where(flat[0][:, None] | flat[1][None, :], np.nan, overlaps)

    def _ranks(self, rsms: np.ndarray) -> np.ndarray:
        """Ranks (R, N, N): 1 for the nearest image up to `neighbours`, 0 for images farther away."""
        count = rsms.shape[-1]
        others = np.where(np.eye(count, dtype=bool), -np.inf, rsms)
        order = np.argsort(-others, axis=2, kind="stable")[:, :, : self.neighbours]
        ranks = np.zeros(rsms.shape, dtype=np.int32)
        np.put_along_axis(ranks, order, np.arange(1, self.neighbours + 1, dtype=np.int32), axis=2)
        return ranks

    @abstractmethod
    def _overlaps(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Compute all values between ranks (A, N, N) and ranks (B, N, N)."""


class NeighbourJaccard(_Neighbours):
    """Overlap of nearest neighbours: intersection over union, averaged over images (Klabunde et al. 2023)."""

    name = "knn-jaccard"
    properties = Properties("similarity", "[0, 1]", ("scale", "shift", "monotone", "images"), "Klabunde et al. 2023")

    def _overlaps(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        shared = np.einsum("aij,bij->abi", first > 0, second > 0, dtype=np.float64, optimize=True)
        return (shared / (2 * self.neighbours - shared)).mean(axis=2)


class NeighbourRank(_Neighbours):
    """Agreement of the ranks of shared nearest neighbours, averaged over images (Wang et al. 2020); 0 if none are."""

    name = "knn-rank"
    properties = Properties("similarity", "[0, 1]", ("scale", "shift", "monotone", "images"), "Wang et al. 2020")

    def _overlaps(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        most = np.concatenate([[1.0], np.cumsum(1 / np.arange(1, self.neighbours + 1))])
        grid = np.empty((len(first), len(second)))
        for i, j in np.ndindex(grid.shape):
            x, y = first[i].astype(np.float64), second[j].astype(np.float64)
            both = (x > 0) & (y > 0)
            terms = 2 / ((1 + np.abs(x - y)) * np.where(both, x + y, 1.0)) * both
            grid[i, j] = (terms.sum(axis=1) / most[both.sum(axis=1)]).mean()
        return grid


def _root(rsm: np.ndarray) -> np.ndarray:
    """A matrix X (N, rank) such that X X^T is the positive part of the centred RSM."""
    values, vectors = _spectrum(rsm)
    positive = values > _CONSTANT * max(np.abs(rsm).max(initial=0.0) * len(rsm), np.abs(values).max(initial=0.0))
    return vectors[:, positive] * np.sqrt(values[positive])


def _spectrum(rsm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    means = rsm.mean(axis=0)
    centred = rsm - means[:, None] - means[None, :] + means.mean()
    return np.linalg.eigh((centred + centred.T) / 2)


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        *(CKA(), BiasedCKA(), PearsonRSA(), SpearmanRSA(), KendallRSA(), CosineRSA(), Bures(), NormalisedBures()),
        *(NormDifference(), NeighbourJaccard(), NeighbourRank()),
    )
}


def get_measure(measure: str | Measure) -> Measure:
    """Look up a measure by name.

    Raises:
        ComparisonError: unknown name; the message lists the known ones.
    """
    return measure if isinstance(measure, Measure) else look_up(measure, MEASURES, "measure", ComparisonError)


def rsa(k: Any, l: Any, correlation: Literal["spearman", "pearson", "kendall", "cosine"] = "spearman") -> float:  # noqa: E741
    """Correlate the off-diagonal entries of two RSMs (RSA; Kriegeskorte et al. 2008).

    Args:
        k: symmetric array (N, N), or an `RSM`; image ids of two `RSM`s must agree.
        l: a second RSM over the same images.
        correlation: "spearman", "pearson", "kendall" (tau-a) or "cosine".

    Raises:
        ComparisonError: different shapes or images, an asymmetric matrix, non-finite values, fewer than 3 images, or a
            constant RSM, for which a correlation is undefined.
    """
    return _value(f"rsa-{correlation}", k, l)


def bures(k: Any, l: Any, normalised: bool = True) -> float:  # noqa: E741
    """Compute the Bures similarity of two RSMs after centring (Tang et al. 2020); see `Bures` and `negative_share`.

    Raises:
        ComparisonError: as `rsa`; if normalised, also an RSM without variance.
    """
    return _value("bures-normalised" if normalised else "bures", k, l)


def norm_difference(k: Any, l: Any) -> float:  # noqa: E741
    """Compute the Frobenius norm of the difference of two RSMs (Klabunde et al. 2023).

    Raises:
        ComparisonError: different shapes or images, an asymmetric matrix, or non-finite values.
    """
    return _value("norm-difference", k, l)


def neighbour_overlap(k: Any, l: Any, neighbours: int = 10, ranked: bool = False) -> float:  # noqa: E741
    """Measure how far two RSMs agree on the nearest neighbours of each image (Klabunde et al. 2023).

    Args:
        k: symmetric array (N, N), or an `RSM`.
        l: a second RSM over the same images.
        neighbours: number of neighbours, fewer than N.
        ranked: compare ranks (`NeighbourRank`) instead of sets (`NeighbourJaccard`).

    Raises:
        ComparisonError: as `norm_difference`; or `neighbours` out of range.
    """
    return _value(NeighbourRank(neighbours) if ranked else NeighbourJaccard(neighbours), k, l)


def negative_share(rsm: Any) -> float:
    """Compute the share of negative eigenvalues in the summed magnitudes of all eigenvalues, after centring.

    The result lies in [0, 1] and is 0 for positive semi-definite RSMs. `bures` ignores this part of an RSM.

    Raises:
        ComparisonError: the RSM is not a symmetric, finite matrix.
    """
    values, _ = _spectrum(stack_rsms([rsm], ["given"])[0])
    total = np.abs(values).sum()
    # Eigenvalues below 0 only by rounding do not count.
    return float(np.abs(values[values < -_CONSTANT * total]).sum() / total) if total > 0 else 0.0


def _value(measure: str | Measure, k: Any, l: Any) -> float:  # noqa: E741
    measure = get_measure(measure)
    stack = stack_rsms([k, l], ["first", "second"])
    value = float(measure.grid(stack[:1], stack[1:])[0, 0])
    if np.isnan(value):
        which = "first" if np.isnan(measure.grid(stack[:1], stack[:1])[0, 0]) else "second"
        raise ComparisonError(
            f"the {which} RSM is constant over all pairs of images once it is centred (for Bures, or has no positive "
            f"eigenvalue), so {measure.name} is undefined"
        )
    return value
