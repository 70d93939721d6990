"""Earlier measures, which compare features instead of RSMs of locations.

They take one feature vector per image, so tokens must be pooled or sampled first: with more features (S * C) than
images, any two representations correlate perfectly.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from rsm_probe.checks import require_number
from rsm_probe.comparison.alignment import cka
from rsm_probe.comparison.features.inputs import finite_array
from rsm_probe.errors import ComparisonError


def linear_cka(x: Any, y: Any, estimator: str = "unbiased") -> float:
    """Compute CKA of linear RSMs of features (Kornblith et al. 2019); equals `cka(x @ x.T, y @ y.T)`.

    Args:
        x: features (N, P).
        y: features (N, Q) of the same images in the same order.
        estimator: "unbiased" or "biased".

    Raises:
        ComparisonError: wrong shapes, non-finite values, too few images, or constant features.
    """
    x, y = _centred(x, y)
    return cka(x @ x.T, y @ y.T, estimator)


def canonical_correlations(x: Any, y: Any) -> np.ndarray:
    """Compute the canonical correlations of two representations (Hotelling 1936), largest first.

    Args:
        x: features (N, P).
        y: features (N, Q) of the same images in the same order.

    Returns:
        Shape (min of the ranks,), in [0, 1].

    Raises:
        ComparisonError: as `linear_cka`.
    """
    x, y = _centred(x, y)
    return _canonical(_basis(x)[0], _basis(y)[0])[0]


def svcca(x: Any, y: Any, variance: float = 0.99) -> float:
    """Average the canonical correlations of the leading principal components (Raghu et al. 2017).

    Args:
        x: features (N, P), with N well above the number of components; see `pooled` and `sampled`.
        y: features (N, Q) of the same images in the same order.
        variance: share of the variance that the components explain, in (0, 1].

    Raises:
        ComparisonError: as `linear_cka`; or `variance` out of range.
    """
    require_number(variance, "variance", ComparisonError, above=0.0, most=1.0)
    x, y = _centred(x, y)
    return float(_canonical(_basis(x, variance)[0], _basis(y, variance)[0])[0].mean())


def pwcca(x: Any, y: Any) -> float:
    """Average canonical correlations, weighted by how much of `x` their directions explain (Morcos et al. 2018).

    Not symmetric in x and y.

    Args:
        x: features (N, P), with N well above P + Q; see `pooled` and `sampled`.
        y: features (N, Q) of the same images in the same order.

    Raises:
        ComparisonError: as `linear_cka`.
    """
    x, y = _centred(x, y)
    basis = _basis(x)[0]
    correlations, directions = _canonical(basis, _basis(y)[0])
    weights = np.abs((basis @ directions).T @ x).sum(axis=1)
    return float(weights @ correlations / weights.sum())


def procrustes(x: Any, y: Any, normalised: bool = True) -> float:
    """Compute the distance after the best rotation or reflection (Williams et al. 2021).

    Args:
        x: features (N, P).
        y: features (N, Q) of the same images in the same order; the narrower array is padded with zeros.
        normalised: scale both to norm 1 after centring; the distance then lies in [0, sqrt(2)].

    Raises:
        ComparisonError: as `linear_cka`.
    """
    x, y = _centred(x, y, any_size=normalised)
    if normalised:
        x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    # Rotate to principal axes, of which there are at most as many as images.
    bases = _basis(x), _basis(y)
    width = max(len(scale) for _, scale in bases)
    first, second = (np.pad(basis * scale, ((0, 0), (0, width - len(scale)))) for basis, scale in bases)
    left, _, right = np.linalg.svd(first.T @ second)
    # Take the norm of the difference itself; norms and a trace would lose half the digits of small distances.
    return float(np.linalg.norm(first @ (left @ right) - second))


def _centred(x: Any, y: Any, any_size: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Subtract the mean over images; unless units matter, rescale features whose squares would overflow."""
    arrays = []
    for name, values in (("first", x), ("second", y)):
        array = finite_array(values, f"the {name} features", "(N, C)")
        largest = np.abs(array).max()
        if any_size and largest and not 1e-100 < largest < 1e100:
            array = array / largest
        centred = array - array.mean(axis=0)
        # Features that vary only by rounding are constant.
        if np.linalg.norm(centred) <= 1e-12 * np.linalg.norm(array):
            raise ComparisonError(f"the {name} features are the same for all images, so they compare with nothing")
        arrays.append(centred)
    if len(arrays[0]) != len(arrays[1]):
        raise ComparisonError(f"the features hold {len(arrays[0])} and {len(arrays[1])} images; they must be the same")
    return arrays[0], arrays[1]


def _basis(centred: np.ndarray, variance: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal columns (N, K) that span the features, and their singular values (K,) above rounding noise."""
    basis, scale, _ = np.linalg.svd(centred, full_matrices=False)
    rank = int((scale > scale[0] * max(centred.shape) * np.finfo(np.float64).eps).sum())
    if variance < 1:
        shares = np.cumsum(scale**2) / (scale**2).sum()
        rank = min(rank, int(np.searchsorted(shares, variance) + 1))
    return basis[:, :rank], scale[:rank]


def _canonical(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Canonical correlations between the spans of two bases, and their directions in the first span."""
    count = min(x.shape[1], y.shape[1])
    # Centring removes one dimension. Two subspaces whose dimensions exceed the rest must overlap.
    forced = x.shape[1] + y.shape[1] - (len(x) - 1)
    if forced > 0:
        warnings.warn(
            f"{min(forced, count)} of {count} canonical correlations are 1 whatever the representations, because "
            f"{x.shape[1]} and {y.shape[1]} dimensions share {len(x)} samples; take more, or fewer features",
            stacklevel=3,
        )
    directions, correlations, _ = np.linalg.svd(x.T @ y)
    return np.clip(correlations[:count], 0.0, 1.0), directions[:, :count]
