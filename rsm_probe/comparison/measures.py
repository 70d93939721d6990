"""Ways to compare RSMs, each from two stacks of RSMs to all values between them.

The survey of Klabunde et al. (paper, reference 10; section 3.3) names the family. A new measure is a class and one line
in `MEASURES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, Literal

import numpy as np

from rsm_probe.checks import brief
from rsm_probe.comparison.alignment import Biased, Estimator, Unbiased
from rsm_probe.comparison.correlations import CosineRSA, KendallRSA, PearsonRSA, SpearmanRSA
from rsm_probe.comparison.inputs import stack_rsms
from rsm_probe.comparison.protocol import About, Invariance, Measure, RowMeasure
from rsm_probe.errors import ComparisonError, look_up

# A trace below this share of the RSM's size is rounding noise: the RSM is constant.
_CONSTANT = 1e-12
_CKA_INVARIANCES: tuple[Invariance, ...] = ("scale", "shift", "additive", "images")


class CKA(RowMeasure):
    """Centred kernel alignment (paper, equation 2), by the unbiased estimator of HSIC."""

    name = "cka"
    estimator: ClassVar[Estimator] = Unbiased()
    about = About("similarity", "[-1, 1], 0 on average for unrelated RSMs", _CKA_INVARIANCES, "Song et al. 2012")

    def rows(self, rsms: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Centred entries."""
        return self.estimator.rows(rsms, weights)


class BiasedCKA(CKA):
    """`CKA` by the biased estimator of HSIC."""

    name = "cka-biased"
    about = About(
        "similarity", "[-1, 1]; [0, 1] of positive semi-definite RSMs", _CKA_INVARIANCES, "Kornblith et al. 2019"
    )
    estimator: ClassVar[Estimator] = Biased()


class NormDifference(Measure):
    """Frobenius norm of the difference of the RSMs, diagonals included."""

    name = "norm-difference"
    about = About("distance", "[0, inf)", ("images",), "Klabunde et al. 2023")

    def _grid(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        from scipy.spatial.distance import cdist

        return cdist(a.reshape(len(a), -1), b.reshape(len(b), -1))


class Bures(Measure):
    """Bures similarity of centred RSMs: the nuclear norm of `K^(1/2) L^(1/2)`.

    Negative eigenvalues, as semantic RSMs may have, count as 0; `negative_share` says how much that leaves out.
    """

    name = "bures"
    about = About("similarity", "[0, inf)", ("additive", "shift", "images"), "Tang et al. 2020")

    def _grid(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        return self._compared([_root(rsm) for rsm in a], [_root(rsm) for rsm in b])

    def _compared(self, first: list[np.ndarray], second: list[np.ndarray]) -> np.ndarray:
        from scipy.linalg import svdvals

        return np.array([[float(svdvals(x.T @ y).sum()) if x.size and y.size else 0.0 for y in second] for x in first])


class NormalisedBures(Bures):
    """`Bures`, divided by the root of the traces: the cosine of the Procrustes angle between representations."""

    name = "bures-normalised"
    about = About(
        "similarity", "[0, 1]", ("scale", "additive", "shift", "images"), "Tang et al. 2020; Harvey et al. 2024"
    )

    def _compared(self, first: list[np.ndarray], second: list[np.ndarray]) -> np.ndarray:
        norms = [np.array([np.linalg.norm(root) for root in roots]) for roots in (first, second)]
        scale = np.outer(norms[0], norms[1])
        return super()._compared(first, second) / np.where(scale > 0, scale, np.nan)


@dataclass(frozen=True)
class NeighbourJaccard(Measure):
    """Share of nearest neighbours that two RSMs agree on: intersection over union, averaged over images.

    An image is no neighbour of its own. Of equally similar ones, the earlier in the order of the images is the nearer,
    so that a new order of the images can change values where there are ties.
    """

    neighbours: int = 10

    name = "knn-jaccard"
    about = About("similarity", "[0, 1]", ("scale", "shift", "monotone", "images"), "Klabunde et al. 2023")

    def _grid(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        first, second = (_ranked(stack, self.neighbours, self.name) > 0 for stack in (a, b))
        shared = np.einsum("aij,bij->abi", first, second, dtype=np.float64, optimize=True)
        return _where_ordered((shared / (2 * self.neighbours - shared)).mean(axis=2), a, b)


@dataclass(frozen=True)
class NeighbourRank(Measure):
    """How alike two RSMs rank the nearest neighbours that they share, averaged over images; 0 where they share none."""

    neighbours: int = 10

    name = "knn-rank"
    about = About("similarity", "[0, 1]", ("scale", "shift", "monotone", "images"), "Wang et al. 2020")

    def _grid(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        first, second = (_ranked(stack, self.neighbours, self.name) for stack in (a, b))
        most = np.concatenate([[1.0], np.cumsum(1 / np.arange(1, self.neighbours + 1))])
        grid = np.empty((len(a), len(b)))
        for i, j in np.ndindex(grid.shape):
            x, y = first[i].astype(np.float64), second[j].astype(np.float64)
            both = (x > 0) & (y > 0)
            terms = 2 / ((1 + np.abs(x - y)) * np.where(both, x + y, 1.0)) * both
            grid[i, j] = (terms.sum(axis=1) / most[both.sum(axis=1)]).mean()
        return _where_ordered(grid, a, b)


def _root(rsm: np.ndarray) -> np.ndarray:
    """A matrix X with X X^T = the centred RSM, without its negative part: shape (N, rank)."""
    values, vectors = _spectrum(rsm)
    positive = values > _CONSTANT * max(np.abs(rsm).max(initial=0.0) * len(rsm), np.abs(values).max(initial=0.0))
    return vectors[:, positive] * np.sqrt(values[positive])


def _spectrum(rsm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    means = rsm.mean(axis=0)
    centred = rsm - means[:, None] - means[None, :] + means.mean()
    return np.linalg.eigh((centred + centred.T) / 2)


def _where_ordered(grid: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A grid with NaN for RSMs in which all images are equally near."""
    spreads = [np.ptp(stack[:, ~np.eye(stack.shape[-1], dtype=bool)], axis=1) for stack in (a, b)]
    flat = [s <= _CONSTANT * np.abs(stack).max(axis=(1, 2)) for s, stack in zip(spreads, (a, b), strict=True)]
    return np.where(flat[0][:, None] | flat[1][None, :], np.nan, grid)


def _ranked(rsms: np.ndarray, neighbours: int, name: str) -> np.ndarray:
    """Per image, 1 for the nearest other image up to `neighbours`, 0 for those that are farther: (R, N, N)."""
    count = rsms.shape[-1]
    if isinstance(neighbours, bool) or not isinstance(neighbours, Integral) or not 0 < neighbours < count:
        raise ComparisonError(
            f"{name} needs between 1 and {count - 1} neighbours for {count} images, found {brief(neighbours)}"
        )
    others = np.where(np.eye(count, dtype=bool), -np.inf, rsms)
    order = np.argsort(-others, axis=2, kind="stable")[:, :, :neighbours]
    ranks = np.zeros(rsms.shape, dtype=np.int32)
    np.put_along_axis(ranks, order, np.arange(1, neighbours + 1, dtype=np.int32), axis=2)
    return ranks


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        *(CKA(), BiasedCKA(), PearsonRSA(), SpearmanRSA(), KendallRSA(), CosineRSA(), Bures(), NormalisedBures()),
        *(NormDifference(), NeighbourJaccard(), NeighbourRank()),
    )
}


def get_measure(measure: str | Measure) -> Measure:
    """A measure from its name.

    Raises:
        ComparisonError: unknown name; the message holds the known ones.
    """
    if isinstance(measure, Measure):
        return measure
    return look_up(measure, MEASURES, "measure", ComparisonError)


def rsa(k: Any, l: Any, correlation: Literal["spearman", "pearson", "kendall", "cosine"] = "spearman") -> float:  # noqa: E741
    """Correlation of the similarities that two RSMs give to pairs of different images.

    Args:
        k: symmetric array (N, N), or an `RSM`; of RSMs, the image ids must agree.
        l: the same over the same images.
        correlation: "spearman", "pearson", "kendall" (tau-a) or "cosine".

    Raises:
        ComparisonError: other shapes or images, no symmetry, values that are not finite, fewer than 3 images, or an RSM
            that is constant, which leaves a correlation undefined.
    """
    return _value(f"rsa-{correlation}", k, l)


def bures(k: Any, l: Any, normalised: bool = True) -> float:  # noqa: E741
    """Bures similarity of two RSMs, after centring; see `Bures` and, for what is left out, `negative_share`.

    Raises:
        ComparisonError: as `rsa`; normalised, an RSM without variance.
    """
    return _value("bures-normalised" if normalised else "bures", k, l)


def norm_difference(k: Any, l: Any) -> float:  # noqa: E741
    """Frobenius norm of the difference of two RSMs.

    Raises:
        ComparisonError: other shapes or images, no symmetry, values that are not finite.
    """
    return _value("norm-difference", k, l)


def neighbour_overlap(k: Any, l: Any, neighbours: int = 10, ranked: bool = False) -> float:  # noqa: E741
    """How far two RSMs agree on each image's nearest neighbours.

    Args:
        k: symmetric array (N, N), or an `RSM`.
        l: the same over the same images.
        neighbours: how many, fewer than N.
        ranked: compare their ranks (`NeighbourRank`) instead of the sets (`NeighbourJaccard`).

    Raises:
        ComparisonError: as `norm_difference`; neighbours out of range.
    """
    return _value(NeighbourRank(neighbours) if ranked else NeighbourJaccard(neighbours), k, l)


def negative_share(rsm: Any) -> float:
    """Share of an RSM's negative eigenvalues in the sum of all their magnitudes, after centring: in [0, 1].

    0 for positive semi-definite RSMs; it is what `bures` leaves out.

    Raises:
        ComparisonError: no symmetric, finite matrix.
    """
    values, _ = _spectrum(stack_rsms([rsm], ["given"])[0])
    total = np.abs(values).sum()
    # Below 0 by rounding alone is not below 0.
    return float(np.abs(values[values < -_CONSTANT * total]).sum() / total) if total > 0 else 0.0


def _value(measure: str | Measure, k: Any, l: Any) -> float:  # noqa: E741
    measure = get_measure(measure)
    stack = stack_rsms([k, l], ["first", "second"])
    value = float(measure.grid(stack[:1], stack[1:])[0, 0])
    if np.isnan(value):
        own = [np.isnan(measure.grid(part, part)[0, 0]) for part in (stack[:1], stack[1:])]
        which = "first" if own[0] else "second"
        raise ComparisonError(
            f"the {which} RSM is constant over all pairs of images once it is centred (for Bures, or has no positive "
            f"eigenvalue), so {measure.name} is undefined"
        )
    return value
