"""Centred kernel alignment between RSMs, for one pair and for any number at once.

HSIC of either kind is an inner product of centred matrices. An estimator therefore turns each RSM into one row of
numbers; a single matrix product of such rows gives all values between any number of RSMs, and rows of one mini-batch
after another add up to the sums that mini-batch CKA divides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from rsm_probe.errors import ComparisonError, nearest

# A centred RSM whose squared norm is below this share of the RSM's own is rounding noise: it is constant.
_CONSTANT = 1e-14


class Estimator(ABC):
    """A way to estimate HSIC from RSMs of one set of images."""

    name: ClassVar[str]
    fewest: ClassVar[int]

    def rows(self, rsms: np.ndarray) -> np.ndarray:
        """Rows whose inner products are HSIC values.

        Args:
            rsms: stack of symmetric RSMs over the same images, shape (R, N, N).

        Returns:
            Shape (R, N * (N + 1) / 2) or fewer columns, float64. The row of a constant RSM is exactly zero.

        Raises:
            ComparisonError: fewer images than the estimator needs.
        """
        count = rsms.shape[-1]
        if count < self.fewest:
            raise ComparisonError(
                f"{self.name} CKA needs at least {self.fewest} images in a batch, found {count}; use larger batches"
            )
        raw, centred = self._flatten(np.asarray(rsms, dtype=np.float64))
        centred[(centred**2).sum(axis=1) <= _CONSTANT * (raw**2).sum(axis=1)] = 0.0
        return centred

    @abstractmethod
    def _flatten(self, rsms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The entries that count, as they are and centred, weighted so that products of centred rows are HSIC."""


@dataclass(frozen=True)
class Unbiased(Estimator):
    """HSIC_1 of Song et al. (paper, reference 28): diagonals left out; its mean is 0 for independent RSMs.

    Uses the U-centred matrix: for i != j, `K_ij - r_i / (n-2) - r_j / (n-2) + s / ((n-1)(n-2))` with row sums r and
    total s of K without its diagonal; `HSIC_1 = <U(K), U(L)> / (n (n-3))`. It can be negative.
    """

    name: ClassVar[str] = "unbiased"
    fewest: ClassVar[int] = 4

    def _flatten(self, rsms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n = rsms.shape[-1]
        rows, columns = np.triu_indices(n, 1)
        # Summed without the diagonal, not subtracted from the whole: a large diagonal would take the digits.
        sums = np.where(np.eye(n, dtype=bool), 0.0, rsms).sum(axis=2)
        means = sums / (n - 2)
        total = sums.sum(axis=1, keepdims=True) / ((n - 1) * (n - 2))
        weight = np.sqrt(2.0 / (n * (n - 3)))
        raw = rsms[:, rows, columns]
        return raw * weight, (raw - means[:, rows] - means[:, columns] + total) * weight


@dataclass(frozen=True)
class Biased(Estimator):
    """HSIC of Gretton et al. (paper, equation 1): `tr(K H L H) / (n-1)^2`. Grows towards 1 with few images."""

    name: ClassVar[str] = "biased"
    fewest: ClassVar[int] = 2

    def _flatten(self, rsms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n = rsms.shape[-1]
        rows, columns = np.triu_indices(n)
        means = rsms.mean(axis=2)
        weight = np.sqrt(np.where(rows == columns, 1.0, 2.0)) / (n - 1)
        raw = rsms[:, rows, columns]
        centred = raw - means[:, rows] - means[:, columns] + means.mean(axis=1, keepdims=True)
        return raw * weight, centred * weight


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
    if not isinstance(estimator, str) or estimator not in _ESTIMATORS:
        known = ", ".join(_ESTIMATORS)
        raise ComparisonError(f"unknown estimator {estimator!r}{nearest(str(estimator), _ESTIMATORS)} (known: {known})")
    return _ESTIMATORS[estimator]


def hsic(k: Any, l: Any, estimator: str | Estimator = "unbiased") -> float:  # noqa: E741 (the field's letter)
    """Hilbert-Schmidt independence criterion between two RSMs.

    Args:
        k: symmetric array (N, N), or an `RSM`.
        l: the same over the same images.
        estimator: "unbiased" (HSIC_1; 0 on average for independent RSMs, at least 4 images) or "biased" (equation 1).

    Raises:
        ComparisonError: other shapes or images, no symmetry, values that are not finite, too few images.
    """
    rows = get_estimator(estimator).rows(_stack(k, l))
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
    chosen = get_estimator(estimator)
    rows = chosen.rows(_stack(k, l))
    own = (rows**2).sum(axis=1)
    for name, value in zip(("first", "second"), own, strict=True):
        if not value > 0:
            raise ComparisonError(f"the {name} RSM is constant over all pairs of images, so its CKA is undefined")
    return float(rows[0] @ rows[1] / np.sqrt(own[0] * own[1]))


def cka_grid(hsics: np.ndarray) -> np.ndarray:
    """All CKA values from all HSIC values, or from their sums over mini-batches.

    Args:
        hsics: shape (R, R), HSIC of every RSM with every other.

    Returns:
        Shape (R, R); NaN in the rows and columns of RSMs whose HSIC with themselves is not above 0.
    """
    own = np.diagonal(hsics)
    scale = np.sqrt(np.where(own > 0, own, np.nan))
    grid = hsics / (scale[:, None] * scale[None, :])
    # The diagonal is 1 by definition; division leaves it off by the last bit.
    np.fill_diagonal(grid, np.where(own > 0, 1.0, np.nan))
    return grid


def _stack(k: Any, l: Any) -> np.ndarray:  # noqa: E741
    ids = [getattr(rsm, "ids", None) for rsm in (k, l)]
    if ids[0] is not None and ids[1] is not None and ids[0] != ids[1]:
        pairs = enumerate(zip(ids[0], ids[1], strict=False))
        differing = next((place for place, (a, b) in pairs if a != b), min(len(ids[0]), len(ids[1])))
        raise ComparisonError(f"the two RSMs hold different images or another order, first at position {differing}")
    arrays = [np.asarray(rsm, dtype=np.float64) for rsm in (k, l)]
    for name, array in zip(("first", "second"), arrays, strict=True):
        if array.ndim != 2 or array.shape[0] != array.shape[1]:
            raise ComparisonError(f"the {name} RSM has shape {array.shape}; CKA compares square matrices (N, N)")
        if not np.isfinite(array).all():
            row, column = np.argwhere(~np.isfinite(array))[0]
            raise ComparisonError(f"the {name} RSM holds {array[row, column]} for images {row} and {column}")
        if not np.allclose(array, array.T, rtol=1e-6, atol=1e-9 * np.abs(array).max()):
            raise ComparisonError(f"the {name} RSM is not symmetric; CKA compares images of one set among themselves")
    if arrays[0].shape != arrays[1].shape:
        raise ComparisonError(f"the RSMs hold {len(arrays[0])} and {len(arrays[1])} images; CKA needs the same images")
    return np.stack(arrays)
