"""Conversion of RSMs to and from the distances of rsatoolbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from rsm_probe.checks import require_whole
from rsm_probe.errors import ComparisonError


def to_rdms(similarities: np.ndarray, ids: Sequence[str], measure: str | None, attributes: Mapping[str, Any]) -> Any:
    """Convert an RSM to an `rsatoolbox.rdm.RDMs` with one matrix of squared distances `k_ii + k_jj - 2 k_ij`.

    rsatoolbox's `cosine_cov` of two such RDMs equals biased linear CKA. Image names become the pattern descriptor
    `image`. RSMs made from distances (by `from_rsatoolbox` or `kind="distance"`) are converted back to these distances.

    Args:
        similarities: (N, N).
        ids: N names of images.
        measure: name of the distances, or None.
        attributes: further facts about the RSM.

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


def one_of_rdms(rdms: Any, index: int, descriptor: str | None) -> tuple[np.ndarray, list[str] | None, str | None]:
    """Return one matrix of distances, the names of its images, and the name of the distances.

    `RSM` stores distances as similarities `-d / 2`, without centring. Every comparison then equals that of the
    distances: correlations use the off-diagonal entries as they are, and CKA and Bures centre for themselves (Torgerson
    1952). For squared Euclidean distances, `-d_ij / 2` is the inner product of two patterns minus half of each squared
    norm.

    Args:
        rdms: one or more matrices of distances, an `rsatoolbox.rdm.RDMs`.
        index: index of the matrix.
        descriptor: the pattern descriptor that names the images; None for `image` if there is one.

    Returns:
        The distances (N, N); N names, or None if nothing names the images; the dissimilarity measure, or None if
        unknown.

    Raises:
        ComparisonError: not RDMs, no such matrix or descriptor, or non-finite distances.
    """
    if not hasattr(rdms, "get_matrices"):
        raise ComparisonError(
            f"expected rsatoolbox.rdm.RDMs, found {type(rdms).__name__}; for a plain matrix of distances, use "
            "RSM.from_array(d, ids, kind='distance')"
        )
    matrices = rdms.get_matrices()
    require_whole(index, "index", -len(matrices), ComparisonError)
    if index >= len(matrices):
        raise ComparisonError(f"there are {len(matrices)} matrices, and none has index {index}")
    known = [str(name) for name in rdms.pattern_descriptors if name != "index"]
    # Do not invent names: they would agree with those of any other RSM, whatever the order of its images.
    if (descriptor or "image") not in rdms.pattern_descriptors and (descriptor is not None or known):
        raise ComparisonError(
            f"no pattern descriptor {descriptor or 'image'!r} names the images; give descriptor= (there are: "
            f"{', '.join(known) or 'none'})"
        )
    names = rdms.pattern_descriptors.get(descriptor or "image")
    if names is not None:
        names = [str(name) if isinstance(name, Integral) else name for name in names]
    return np.asarray(matrices[index], dtype=np.float64), names, rdms.dissimilarity_measure
