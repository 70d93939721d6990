"""How differently a classifier answers two images: the Jensen-Shannon divergence of its class probabilities."""

from __future__ import annotations

import numpy as np
from scipy.special import entr, softmax

from rsm_probe.arrays import real_array
from rsm_probe.errors import ComparisonError

# Bytes of mixed probabilities that are held at a time.
_BLOCK_BYTES = 64 * 2**20
# What rounding to float32, or half precision of the classifier, leaves of a sum of probabilities.
_ROUNDING = 1e-3


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Class probabilities by the softmax of logits of any size.

    Args:
        logits: shape (N, K), or (N, Q, K) of a classifier that answers Q questions.

    Returns:
        The same shape, float64; the last axis sums to 1.

    Raises:
        ComparisonError: another shape, a single class, values that are not finite, or values that are probabilities
            already.
    """
    values = real_array(logits, "logits", ComparisonError).astype(np.float64)
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise ComparisonError(f"logits have shape (images, classes), found {values.shape}")
    if values.shape[-1] == 1:
        raise ComparisonError("a classifier of a single class is always certain: there is nothing to compare")
    if not np.isfinite(values).all():
        raise ComparisonError(f"logits of image {int(np.argwhere(~np.isfinite(values))[0, 0])} are not finite")
    if (values >= 0).all() and np.allclose(values.sum(axis=-1), 1.0, rtol=0, atol=_ROUNDING):
        raise ComparisonError(
            "these are probabilities (none is negative, and they sum to 1), and no logits: the softmax was taken "
            "already; give the classifier without it"
        )
    return np.asarray(softmax(values, axis=-1))


def jensen_shannon(p: np.ndarray, q: np.ndarray | None = None, *, block_bytes: int = _BLOCK_BYTES) -> np.ndarray:
    """Jensen-Shannon divergence of all pairs of class probabilities, in nats (paper, equations 13-15).

    It is the entropy of the mean of two distributions less the mean of their entropies, which is the same as the mean
    of their divergences from their mean, and needs one logarithm where that needs two.

    Args:
        p: probabilities (N, K), or (N, Q, K) of Q questions, over which the divergence is averaged.
        q: probabilities (M, K) or (M, Q, K); None for the pairs within p.
        block_bytes: memory for the pairs computed at once.

    Returns:
        Shape (N, M), in [0, log 2]; 0 for equal distributions; symmetric where q is None.

    Raises:
        ComparisonError: other shapes, negative values, or rows that do not sum to 1.
    """
    first, second = _distributions(p, "p"), None if q is None else _distributions(q, "q")
    other = first if second is None else second
    if first.shape[1:] != other.shape[1:]:
        raise ComparisonError(f"p holds {first.shape[1:]} questions and classes, and q {other.shape[1:]}")
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
    """Probabilities (N, Q, K)."""
    array = real_array(values, name, ComparisonError).astype(np.float64)
    array = array[:, None] if array.ndim == 2 else array
    if array.ndim != 3 or 0 in array.shape:
        raise ComparisonError(f"{name} must hold probabilities (images, classes), found shape {np.shape(values)}")
    sums = array.sum(axis=2)
    if not ((array >= 0).all() and np.allclose(sums, 1.0, rtol=0, atol=_ROUNDING)):
        bad = int(np.argmax((array < 0).any(axis=(1, 2)) | ~(np.abs(sums - 1) <= _ROUNDING).all(axis=1)))
        raise ComparisonError(f"{name} must hold probabilities that sum to 1; image {bad} does not")
    return array / sums[:, :, None]
