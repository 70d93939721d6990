"""RSMs as the distances of rsatoolbox, and from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from rsm_probe.checks import require_whole
from rsm_probe.errors import ComparisonError


def to_rdms(similarities: np.ndarray, ids: Sequence[str], measure: str, attributes: Mapping[str, Any]) -> Any:
    """An RSM as an `rsatoolbox.rdm.RDMs` of one matrix of squared distances `k_ii + k_jj - 2 k_ij`.

    Biased linear CKA is rsatoolbox's `cosine_cov` of two of these. Names of images go into the pattern descriptor
    `image`. Distances that `from_rsatoolbox` or `kind="distance"` made an RSM come back as they were.

    Args:
        similarities: shape (N, N).
        ids: N names of images.
        measure: what the distances are called.
        attributes: what else is known of the RSM.

    Raises:
        ComparisonError: rsatoolbox is not installed.
    """
    try:
        from rsatoolbox import rdm
    except ImportError as error:
        raise ComparisonError("rsatoolbox is not installed; pip install rsatoolbox") from error
    own = np.diagonal(similarities)
    squared = own[:, None] + own[None, :] - 2 * similarities
    return rdm.RDMs(
        squared[np.triu_indices(len(own), 1)][None],
        dissimilarity_measure=measure,
        rdm_descriptors={key: [str(value)] for key, value in attributes.items()},
        pattern_descriptors={"image": list(ids)},
    )


def distances(rdms: Any, index: int, descriptor: str | None) -> tuple[np.ndarray, list[str] | None, str | None]:
    """One matrix of distances, the names of its images, and what the distances are.

    As similarities, these become `-d / 2` without centring, which keeps every comparison what it is of the distances:
    correlations take pairs of different images as they stand, and CKA and Bures centre for themselves (Torgerson 1952):
    for squared Euclidean distances `-d_ij / 2` is the inner product of two patterns less half the squared norm of each.

    Args:
        rdms: one or more matrices of distances, an `rsatoolbox.rdm.RDMs`.
        index: which of them.
        descriptor: the pattern descriptor that names the images; None for `image`, or where nothing names them.

    Returns:
        Shape (N, N); N names, or None where nothing names the images; the dissimilarity measure, where it is known.

    Raises:
        ComparisonError: no RDMs, no such matrix or descriptor; distances that are not finite.
    """
    if not hasattr(rdms, "get_matrices"):
        raise ComparisonError(
            f"expected rsatoolbox.rdm.RDMs, found {type(rdms).__name__}; a matrix of distances is taken by "
            "RSM.from_array(d, ids, kind='distance')"
        )
    matrices = rdms.get_matrices()
    require_whole(index, "index", -len(matrices), ComparisonError)
    if index >= len(matrices):
        raise ComparisonError(f"there are {len(matrices)} matrices, and none has index {index}")
    known = [str(name) for name in rdms.pattern_descriptors if name != "index"]
    # Invented names would agree with those of any other RSM, whatever the order of its images.
    if (descriptor or "image") not in rdms.pattern_descriptors and (descriptor is not None or known):
        raise ComparisonError(
            f"no pattern descriptor {descriptor or 'image'!r} names the images; give descriptor= (there are: "
            f"{', '.join(known) or 'none'})"
        )
    names = rdms.pattern_descriptors.get(descriptor or "image")
    if names is not None:
        names = [str(name) if isinstance(name, Integral) else name for name in names]
    return np.asarray(matrices[index], dtype=np.float64), names, rdms.dissimilarity_measure
