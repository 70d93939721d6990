"""Measures that compare RSMs, by name, and functions that compare two RSMs.

Klabunde et al. (paper, reference 10; section 3.3) survey the family. A new measure is one class and one line in
`MEASURES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rsm_probe.checks import require_number
from rsm_probe.comparison.alignment import ESTIMATORS, Estimator
from rsm_probe.comparison.batch_values import HsicSums
from rsm_probe.comparison.certified import CertifiedSums
from rsm_probe.comparison.correlations import CosineRSA, KendallRSA, PearsonRSA, SpearmanRSA
from rsm_probe.comparison.inputs import in_range, stack_rsms
from rsm_probe.comparison.neighbour_measures import CKNNA, MutualNeighbours, NeighbourJaccard, NeighbourRank
from rsm_probe.comparison.protocol import Invariance, Measure, Properties, RowMeasure
from rsm_probe.errors import ComparisonError, look_up

# Eigenvalues below this share of an RSM's size are rounding noise.
_CONSTANT = 1e-12
# Rounding of K_ii + K_jj - 2 K_ij, in units of |K_ii| + |K_jj|.
_ROUNDING = 8 * np.finfo(np.float64).eps
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

    def pairs(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Name the entries of an RSM that `rows` takes; see `Estimator.pairs`."""
        return self.estimator.pairs(count)

    def over_draws(self, a: np.ndarray, b: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Prepare for many draws of images; see `Estimator.over_draws`."""
        return self.estimator.over_draws(in_range(a), in_range(b))

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


@dataclass(frozen=True)
class DistanceCorrelation(CKA):
    """Bias-corrected distance correlation, squared (Székely & Rizzo 2014).

    `R(K, L) = <U(A), U(B)> / (|U(A)| |U(B)|)` with powers of the distances that belong to an RSM,
    `A_ij = (K_ii + K_jj - 2 K_ij)^(exponent / 2)`, and alike `B` of `L`. `U` centres them without their diagonals, as
    in unbiased CKA. `R` estimates the square of the distance correlation. No root is taken of it, because it may be
    negative; it is 0 on average for unrelated RSMs.

    - A linear RSM holds inner products of features, so that `exponent=1` takes Euclidean distances: the statistic of
      the paper.
    - An RSM made of distances `d` holds `-d / 2`, so that `A = d^(exponent / 2)`. If `d` are squared Euclidean
      distances, `exponent=1` is the statistic of the paper. `exponent=2` takes distances of any kind as they are.
    - `exponent=2` is unbiased CKA. Only for smaller exponents does 0 imply independent variables.

    Kernels have no squared distances below 0. Noisy estimates of distances may; these count as 0.

    Attributes:
        exponent: power of the distances, in (0, 2].
    """

    exponent: float = 1.0
    name = "distance-correlation"
    properties = Properties(
        "similarity", "[-1, 1], 0 on average for unrelated RSMs", _CKA_INVARIANCES, "Székely & Rizzo 2014"
    )

    def __post_init__(self) -> None:
        require_number(self.exponent, "exponent", ComparisonError, above=0.0, most=2.0)

    def rows(self, rsms: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Centre the distances (R, N, N) of RSMs; see `Estimator.rows`."""
        return self.estimator.rows(self._distances(rsms), weights)

    def over_draws(self, a: np.ndarray, b: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Take the distances once for all draws; see `Measure.over_draws`."""
        return self.estimator.over_draws(self._distances(a), self._distances(b))

    def over_batches(self, samples: int, rsms: int) -> HsicSums:
        """Sum distance covariances over mini-batches, each weighted by its pairs of images."""
        return _DistanceSums(samples, rsms, self.estimator, self._distances)

    def _distances(self, rsms: np.ndarray) -> np.ndarray:
        own = np.diagonal(np.asarray(rsms, dtype=np.float64), axis1=1, axis2=2)
        both = own[:, :, None] + own[:, None, :]
        squared = both - 2 * rsms
        # What rounding leaves of equal images, whose root would be large.
        sizes = np.abs(own)[:, :, None] + np.abs(own)[:, None, :]
        squared[squared <= _ROUNDING * sizes] = 0.0
        return squared ** (self.exponent / 2)


class _DistanceSums(HsicSums):
    """Sums of distance covariances: HSICs of the distances of RSMs.

    Args:
        samples: see `BatchValues`.
        rsms: see `BatchValues`.
        estimator: see `HsicSums`.
        distances: turns RSMs (R, N, N) into distances.
    """

    def __init__(
        self, samples: int, rsms: int, estimator: Estimator, distances: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        super().__init__(samples, rsms, estimator)
        self._distances = distances

    def scaled(self, rsms: np.ndarray) -> np.ndarray:
        """Take the distances of the next mini-batch, and scale them; see `HsicSums.scaled`."""
        return super().scaled(self._distances(rsms))


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
        *(NormDifference(), NeighbourJaccard(), NeighbourRank(), MutualNeighbours(), CKNNA(), DistanceCorrelation()),
    )
}


def get_measure(measure: str | Measure) -> Measure:
    """Look up a measure by name.

    Raises:
        ComparisonError: unknown name; the message lists the known ones.
    """
    return measure if isinstance(measure, Measure) else look_up(measure, MEASURES, "measure", ComparisonError)


def require_one_kind(rsms: Sequence[Any], names: Sequence[str], measure: Measure) -> None:
    """Refuse similarities beside distances where it matters that distances are held as `-d / 2`.

    Args:
        rsms: `RSM`s, or arrays of similarities.
        names: their names, for the message.
        measure: what is to compare them.

    Raises:
        ComparisonError: see above.
    """
    if {"shift", "additive"} & set(measure.properties.invariances):
        return
    first: dict[str, str] = {}
    for name, rsm in zip(names, rsms, strict=True):
        first.setdefault(getattr(rsm, "kind", "similarity"), name)
    if len(first) > 1:
        raise ComparisonError(
            f"{measure.name} depends on where 0 is, so it cannot compare similarities ({first['similarity']}) with "
            f"distances ({first['distance']}); convert one of them, as by rsm.to_distances('squared euclidean'), or "
            "use a correlation or CKA"
        )


def rsa(
    k: Any,
    l: Any,  # noqa: E741
    correlation: Literal["spearman", "pearson", "kendall", "cosine"] = "spearman",
    *,
    skip_missing: bool = False,
) -> float:
    """Correlate the off-diagonal entries of two RSMs (RSA; Kriegeskorte et al. 2008).

    Args:
        k: symmetric array (N, N), or an `RSM`; image ids of two `RSM`s must agree.
        l: a second RSM over the same images.
        correlation: "spearman", "pearson", "kendall" (tau-a) or "cosine".
        skip_missing: leave out pairs of images that are NaN in one of the RSMs.

    Raises:
        ComparisonError: different shapes or images, an asymmetric matrix, non-finite values, fewer than 3 images, a
            constant RSM, for which a correlation is undefined, or the cosine of similarities and distances.
    """
    return _value(f"rsa-{correlation}", k, l, skip_missing=skip_missing)


def bures(k: Any, l: Any, normalised: bool = True) -> float:  # noqa: E741
    """Compute the Bures similarity of two RSMs after centring (Tang et al. 2020); see `Bures` and `negative_share`.

    Raises:
        ComparisonError: as `rsa`; if normalised, also an RSM without variance.
    """
    return _value("bures-normalised" if normalised else "bures", k, l)


def norm_difference(k: Any, l: Any) -> float:  # noqa: E741
    """Compute the Frobenius norm of the difference of two RSMs (Klabunde et al. 2023).

    Raises:
        ComparisonError: different shapes or images, an asymmetric matrix, non-finite values, or similarities beside
            distances.
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


def mutual_neighbours(k: Any, l: Any, neighbours: int = 10) -> float:  # noqa: E741
    """Compute the mutual k-nearest-neighbour alignment of two RSMs (Huh et al. 2024); see `MutualNeighbours`.

    Args:
        k: symmetric array (N, N), or an `RSM`; image ids of two `RSM`s must agree.
        l: a second RSM over the same images.
        neighbours: number of neighbours, from 1 to N - 1.

    Returns:
        The share of common neighbours, in [0, 1]; `neighbours / (N - 1)` on average for unrelated RSMs.

    Example:
        >>> import numpy as np
        >>> from rsm_probe.comparison import mutual_neighbours
        >>> x, y = np.array([0, 1, 3, 7]), np.array([0, 1, 5, 7])    # the third image moves towards the fourth
        >>> mutual_neighbours(-abs(x[:, None] - x), -abs(y[:, None] - y), neighbours=1)
        0.75

    Raises:
        ComparisonError: as `norm_difference`; `neighbours` out of range; or a constant RSM.
    """
    return _value(MutualNeighbours(neighbours), k, l)


def cknna(k: Any, l: Any, neighbours: int = 10, masked_first: bool = False) -> float:  # noqa: E741
    """Compute the centred kernel nearest-neighbour alignment of two RSMs (Huh et al. 2024); see `CKNNA`.

    Args:
        k: symmetric array (N, N), or an `RSM`; image ids of two `RSM`s must agree.
        l: a second RSM over the same images.
        neighbours: number of neighbours, from 1 to N - 1, for which CKNNA is unbiased CKA.
        masked_first: compute what the published code does instead of the published equations.

    Returns:
        CKNNA, in [-1, 1]; 1 if RSMs agree up to scale and shift.

    Example:
        >>> import numpy as np
        >>> from rsm_probe.comparison import cka, cknna
        >>> x, y = np.random.default_rng(0).normal(size=(2, 30, 5))
        >>> k, l = x @ x.T, (x + y) @ (x + y).T
        >>> round(cknna(k, 2 * k + 1), 6), 0 < cknna(k, l) < 1, bool(np.isclose(cknna(k, l, 29), cka(k, l)))
        (1.0, True, True)

    Raises:
        ComparisonError: as `norm_difference`; fewer than 4 images, `neighbours` out of range, or an RSM that is
            constant once it is centred.
    """
    return _value(CKNNA(neighbours, masked_first), k, l)


def distance_correlation(k: Any, l: Any, exponent: float = 1.0) -> float:  # noqa: E741
    """Compute the bias-corrected, squared distance correlation (Székely & Rizzo 2014); see `DistanceCorrelation`.

    Args:
        k: symmetric array (N, N), or an `RSM`; image ids of two `RSM`s must agree.
        l: a second RSM over the same images.
        exponent: power of the distances, in (0, 2].

    Returns:
        The estimate of the squared distance correlation, in [-1, 1].

    Example:
        >>> import numpy as np
        >>> from rsm_probe.comparison import cka, distance_correlation
        >>> x = np.linspace(-1, 1, 21)[:, None]
        >>> y = x**2    # depends on x, but not linearly
        >>> round(cka(x @ x.T, y @ y.T), 2), round(distance_correlation(x @ x.T, y @ y.T), 2)
        (-0.09, 0.12)

    Raises:
        ComparisonError: as `norm_difference`; fewer than 4 images, `exponent` out of range, or an RSM whose distances
            are constant once they are centred.
    """
    return _value(DistanceCorrelation(exponent), k, l)


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


def _value(measure: str | Measure, k: Any, l: Any, *, skip_missing: bool = False) -> float:  # noqa: E741
    measure = get_measure(measure)
    require_one_kind([k, l], ["first", "second"], measure)
    stack = stack_rsms([k, l], ["first", "second"], skip_missing=skip_missing)
    value = float(measure.grid(stack[:1], stack[1:])[0, 0])
    if np.isnan(value):
        which = "first" if np.isnan(measure.grid(stack[:1], stack[:1])[0, 0]) else "second"
        raise ComparisonError(
            f"the {which} RSM is constant over all pairs of images once it is centred (for Bures, or has no positive "
            f"eigenvalue; for CKNNA with masked_first, or has no positive alignment with itself), so {measure.name} is "
            "undefined"
        )
    return value
