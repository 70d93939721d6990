"""Measures that compare each image's nearest neighbours in two RSMs.

In what follows, `S_K(i)` are the `k` images most similar to image `i` in an RSM `K`, without `i` itself; among equally
similar ones, those that come first.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from rsm_probe.checks import brief, require_flag
from rsm_probe.comparison.alignment import ESTIMATORS, cosines
from rsm_probe.comparison.inputs import CONSTANT, in_range
from rsm_probe.comparison.protocol import Measure, Properties
from rsm_probe.errors import ComparisonError

# Spreads below this share of an RSM's size are rounding noise.
_SPREAD = 1e-12


@dataclass(frozen=True)
class _Neighbours(Measure):
    """A comparison of each image's nearest neighbours.

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

    def _ranks(self, rsms: np.ndarray) -> np.ndarray:
        """Ranks (R, N, N): 1 for the nearest image up to `neighbours`, 0 for images farther away."""
        count = rsms.shape[-1]
        others = np.where(np.eye(count, dtype=bool), -np.inf, rsms)
        order = np.argsort(-others, axis=2, kind="stable")[:, :, : self.neighbours]
        ranks = np.zeros(rsms.shape, dtype=np.int32)
        np.put_along_axis(ranks, order, np.arange(1, self.neighbours + 1, dtype=np.int32), axis=2)
        return ranks


class _Overlap(_Neighbours):
    """A comparison of the sets or ranks of nearest neighbours alone, image by image."""

    def _grid(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        spreads = [np.ptp(stack[:, ~np.eye(stack.shape[-1], dtype=bool)], axis=1) for stack in (a, b)]
        flat = [s <= _SPREAD * np.abs(stack).max(axis=(1, 2)) for s, stack in zip(spreads, (a, b), strict=True)]
        overlaps = self._overlaps(self._ranks(a), self._ranks(b))
        return np.where(flat[0][:, None] | flat[1][None, :], np.nan, overlaps)

    @abstractmethod
    def _overlaps(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Compute all values between ranks (A, N, N) and ranks (B, N, N)."""


class NeighbourJaccard(_Overlap):
    """Overlap of nearest neighbours: intersection over union, averaged over images (Klabunde et al. 2023)."""

    name = "knn-jaccard"
    properties = Properties("similarity", "[0, 1]", ("scale", "shift", "monotone", "images"), "Klabunde et al. 2023")

    def _overlaps(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        shared = np.einsum("aij,bij->abi", first > 0, second > 0, dtype=np.float64, optimize=True)
        return (shared / (2 * self.neighbours - shared)).mean(axis=2)


class NeighbourRank(_Overlap):
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


class MutualNeighbours(_Overlap):
    """Mutual k-nearest neighbours: the share of common neighbours, averaged over images (Huh et al. 2024, equation 11).

    `m = 1 / (N k) sum_i |S_K(i) & S_L(i)|`. For unrelated RSMs it is `k / (N - 1)` on average, and for `k = N - 1` it
    is always 1. `NeighbourJaccard` divides the common neighbours of an image by those in either set instead of by `k`:
    an image with share `m` has Jaccard overlap `m / (2 - m)`, which is smaller unless it is 0 or 1.
    """

    name = "mutual-knn"
    properties = Properties(
        "similarity", "[0, 1]", ("scale", "shift", "monotone", "images"), "Huh et al. 2024, equation 11"
    )

    def _overlaps(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        x, y = ((ranks > 0).reshape(len(ranks), -1).astype(np.float64) for ranks in (first, second))
        return x @ y.T / (first.shape[-1] * self.neighbours)


@dataclass(frozen=True)
class CKNNA(_Neighbours):
    """Centred kernel nearest-neighbour alignment: CKA over common neighbours (Huh et al. 2024, equations 16 to 18).

    `CKNNA(K, L) = A(K, L) / sqrt(A(K, K) A(L, L))` with `A(K, L) = sum_i sum_j a_ij U(K)_ij U(L)_ij`, where `a_ij` is 1
    if `j` is in both `S_K(i)` and `S_L(i)`, and 0 otherwise. It is a cosine, so it lies in [-1, 1].

    `U` centres an RSM as the unbiased estimator of HSIC does, without its diagonal (see `Estimator`). With `k = N - 1`,
    CKNNA is therefore unbiased CKA, as the paper says of this limit. The paper writes the centring as the mean of a row
    alone (equation 12), which does not give CKA there.

    The code that the authors published sets all entries to 0 but those of common neighbours, and then computes the
    unbiased HSIC of what is left. Use `masked_first=True` to compare with published values. It has three flaws: values
    depend on a shift of the RSM, so that RSMs made of distances (`-d / 2`, where 0 means most alike) have no useful
    value; `(K, L)` and `(L, K)` differ slightly; and an RSM may have a negative alignment with itself, which makes its
    values NaN. The constant `1e-6` that the code adds to the denominator is left out, as it depends on units.

    Attributes:
        neighbours: number of neighbours `k`, fewer than images.
        masked_first: see above.
    """

    masked_first: bool = False
    name = "cknna"
    properties = Properties("similarity", "[-1, 1]", ("scale", "shift", "images"), "Huh et al. 2024, equations 16-18")
    fewest = 4

    def __post_init__(self) -> None:
        require_flag(self.masked_first, "masked_first", ComparisonError)

    def _grid(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        x = in_range(a)
        y = x if b is a else in_range(b)
        if self.masked_first:
            return self._masked_first(x, y)
        rows = self._rows(x)
        return cosines(rows, rows if y is x else self._rows(y))

    def _rows(self, rsms: np.ndarray) -> np.ndarray:
        """Centred similarities of neighbours, 0 elsewhere, (R, N (N - 1)): the product of two rows is `A`."""
        estimator = ESTIMATORS["unbiased"]
        centred = estimator.rows(rsms)
        first, second = estimator.pairs(rsms.shape[-1])
        near = self._ranks(rsms) > 0
        # Being a neighbour is not symmetric: each pair of images occurs in both directions.
        rows = np.concatenate([centred * near[:, first, second], centred * near[:, second, first]], axis=1)
        rows[(rows**2).sum(axis=1) <= CONSTANT * (centred**2).sum(axis=1)] = 0.0
        return rows

    def _masked_first(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Equation 18 by the published code: HSIC_1 (Song et al. 2012, equation 5) of masked RSMs."""
        near = [self._ranks(rsms) > 0 for rsms in (a, b)]
        own = [
            np.array(
                [_hsic_of_common(k[None], k[None], m[None], m[None])[0, 0] for k, m in zip(rsms, mask, strict=True)]
            )
            for rsms, mask in zip((a, b), near, strict=True)
        ]
        x, y = (np.where(values > 0, values, np.nan) for values in own)
        return _hsic_of_common(a, b, *near) / np.sqrt(x)[:, None] / np.sqrt(y)[None, :]


def _hsic_of_common(a: np.ndarray, b: np.ndarray, near_a: np.ndarray, near_b: np.ndarray) -> np.ndarray:
    """HSIC_1, times N (N - 3), of RSMs (A, N, N) and (B, N, N) that are 0 except at common neighbours, (A, B)."""
    count = a.shape[-1]
    x, y = a * near_a, b * near_b
    # tr(K L): an entry counts if both images are common neighbours of each other.
    traces = np.einsum("aij,bij->ab", x * near_a.swapaxes(1, 2), y * near_b.swapaxes(1, 2), optimize=True)
    columns = np.einsum("aij,bij->abj", x, near_b.astype(np.float64), optimize=True)
    rows = np.einsum("aij,bij->abi", near_a.astype(np.float64), y, optimize=True)
    sums = columns.sum(axis=2) * rows.sum(axis=2)
    return traces + sums / ((count - 1) * (count - 2)) - 2 * (columns * rows).sum(axis=2) / (count - 2)
