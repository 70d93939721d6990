"""Jensen-Shannon divergence between the class probabilities of images."""

from __future__ import annotations

import numpy as np
from scipy.special import entr, softmax

from rsm_probe.arrays import real_array
from rsm_probe.errors import ComparisonError

# Why a classifier has no correlations.
SAME_OUTPUTS = "the classifier gives the same output for all images, so correlations are undefined"
# Bytes of mixture probabilities held at a time.
_BLOCK_BYTES = 64 * 2**20
# Sums of probabilities may deviate by this much from 1, through rounding to float32 or half precision.
_ROUNDING = 1e-3


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Turn logits into class probabilities by a softmax, which is stable for logits of any size.

    Args:
        logits: shape (N, K), or (N, Q, K) for a classifier that answers Q questions.

    Returns:
        Probabilities of the same shape, float64; the last axis sums to 1.

    Raises:
        ComparisonError: the shape is wrong, there is only one class, values are not finite, or the values already are
            probabilities.
    """
    values = real_array(logits, "logits", ComparisonError).astype(np.float64)
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise ComparisonError(f"logits must have shape (images, classes), found {values.shape}")
    if values.shape[-1] == 1:
        raise ComparisonError("a classifier with a single class is always certain, so its outputs cannot be compared")
    if not np.isfinite(values).all():
        raise ComparisonError(f"logits of image {int(np.argwhere(~np.isfinite(values))[0, 0])} are not finite")
    if (values >= 0).all() and np.allclose(values.sum(axis=-1), 1.0, rtol=0, atol=_ROUNDING):
        raise ComparisonError(
            "these are probabilities rather than logits (none is negative, and they sum to 1); give the classifier "
            "without its softmax"
        )
    return np.asarray(softmax(values, axis=-1))


def jensen_shannon(p: np.ndarray, q: np.ndarray | None = None, *, block_bytes: int = _BLOCK_BYTES) -> np.ndarray:
    """Jensen-Shannon divergence of all pairs of class probabilities, in nats (paper, equations 13-15).

    It is computed as the entropy of the mean of two distributions minus the mean of their entropies. This equals the
    mean of their divergences from their mean, with one logarithm instead of two.

    Args:
        p: probabilities (N, K), or (N, Q, K) for Q questions, over which the divergence is averaged.
        q: probabilities (M, K) or (M, Q, K); None for all pairs within p.
        block_bytes: memory for the pairs that are computed at once.

    Returns:
        Shape (N, M), in [0, log 2]; 0 for equal distributions; symmetric if q is None.

    Raises:
        ComparisonError: the shapes do not fit, values are negative, or rows do not sum to 1.
    """
    first, second = _distributions(p, "p"), None if q is None else _distributions(q, "q")
    other = first if second is None else second
    if first.shape[1:] != other.shape[1:]:
        raise ComparisonError(f"p has {first.shape[1:]} questions and classes, but q has {other.shape[1:]}")
    questions = first.shape[1]
    entropy_p, entropy_q = (entr(part).sum(axis=(1, 2)) for part in (first, other))
    divergence = np.zeros((len(first), len(other)))
    step = max(1, block_bytes // (8 * other[0].size))
    for i in range(len(first)):
        begin = 0 if second is not None else i + 1
        for start in range(begin, len(other), step):
            part = slice(start, start + step)
            mixed = entr((first[i] + other[part]) / 2).sum(axis=(1, 2))
            divergence[i, part] = mixed - (entropy_p[i] + entropy_q[part]) / 2
    divergence = np.clip(divergence / questions, 0.0, np.log(2.0))
    return divergence + divergence.T if second is None else divergence


def _distributions(values: np.ndarray, name: str) -> np.ndarray:
    """Check probabilities, normalise them and return them as (N, Q, K)."""
    array = real_array(values, name, ComparisonError).astype(np.float64)
    array = array[:, None] if array.ndim == 2 else array
    if array.ndim != 3 or 0 in array.shape:
        raise ComparisonError(f"{name} must have shape (images, classes), found {np.shape(values)}")
    sums = array.sum(axis=2)
    if not ((array >= 0).all() and np.allclose(sums, 1.0, rtol=0, atol=_ROUNDING)):
        bad = int(np.argmax((array < 0).any(axis=(1, 2)) | ~(np.abs(sums - 1) <= _ROUNDING).all(axis=1)))
        raise ComparisonError(f"{name} must hold probabilities that sum to 1; image {bad} does not")
    return array / sums[:, :, None]
