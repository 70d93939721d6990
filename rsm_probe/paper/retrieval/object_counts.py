"""Similarity of two images by the objects in them: the ground truth for retrieval."""

from __future__ import annotations

import numpy as np

from rsm_probe.arrays import real_array
from rsm_probe.errors import ComparisonError

# Bytes of counts compared at a time.
_BLOCK_BYTES = 64 * 2**20


def count_f1(query: np.ndarray, database: np.ndarray, *, block_bytes: int = _BLOCK_BYTES) -> np.ndarray:
    """F1 score of the objects in two images, matched class by class (paper, equations 9-12).

    An object of the query with a counterpart of its class in the database image is a true positive; the remaining
    objects of the query are false negatives, and those of the database image false positives.

    Args:
        query: object counts by class of each query, shape (N, K), not negative.
        database: object counts by class of each database image, shape (M, K), not negative.
        block_bytes: memory for the counts compared at once.

    Returns:
        Shape (N, M), in [0, 1]; 1 for two images without objects.

    Raises:
        ComparisonError: the shapes do not fit, or counts are negative or not finite.
    """
    shared, size_q, size_d = _shared(*_counts(query, database), block_bytes=block_bytes)
    # 2 TP + FN + FP is the number of objects in both images.
    both = size_q[:, None] + size_d[None, :]
    return np.divide(2 * shared, both, out=np.ones_like(shared), where=both > 0)


def class_iou(query: np.ndarray, database: np.ndarray) -> np.ndarray:
    """Intersection over union of the sets of classes present in two images (paper, appendix D.4).

    Args:
        query: object counts (or presence) by class of each query, shape (N, K), not negative.
        database: the same for each database image, shape (M, K).

    Returns:
        Shape (N, M), in [0, 1]; 1 for two images without objects.

    Raises:
        ComparisonError: the shapes do not fit, or counts are negative or not finite.
    """
    shared, size_q, size_d = _shared(*(part > 0 for part in _counts(query, database)))
    union = size_q[:, None] + size_d[None, :] - shared
    return np.divide(shared, union, out=np.ones_like(shared), where=union > 0)


SCORES = {"f1": count_f1, "iou": class_iou}


def _counts(query: np.ndarray, database: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Check counts and convert them to float64, (N, K) and (M, K)."""
    first, second = (
        real_array(part, name, ComparisonError).astype(np.float64)
        for part, name in ((query, "query"), (database, "database"))
    )
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ComparisonError(
            f"counts must have shapes (N, classes) and (M, classes) with the same classes, found {first.shape} and "
            f"{second.shape}"
        )
    if not all(((part >= 0) & np.isfinite(part)).all() for part in (first, second)):
        raise ComparisonError("counts of objects must not be negative, infinite or NaN")
    return first, second


def _shared(
    query: np.ndarray, database: np.ndarray, *, block_bytes: int = _BLOCK_BYTES
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The number of objects that two images share, and the number in each query and each database image."""
    first, second = (part.astype(np.float64, copy=False) for part in (query, database))
    shared = np.empty((len(first), len(second)))
    step = max(1, block_bytes // (8 * max(1, second.size)))
    for start in range(0, len(first), step):
        shared[start : start + step] = np.minimum(first[start : start + step, None], second[None]).sum(axis=2)
    return shared, first.sum(axis=1), second.sum(axis=1)
