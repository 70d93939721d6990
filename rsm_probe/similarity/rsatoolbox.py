"""Conversion of RSMs to and from the distances of rsatoolbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from rsm_probe.checks import require_whole
from rsm_probe.errors import ComparisonError


def to_rdms(
    similarities: np.ndarray, ids: Sequence[str], measure: str | None, descriptors: Mapping[str, Sequence[str]]
) -> Any:
    """Convert RSMs to an `rsatoolbox.rdm.RDMs` of squared distances `k_ii + k_jj - 2 k_ij`.

    rsatoolbox's `cosine_cov` of two such RDMs equals biased linear CKA. Image names become the pattern descriptor
    `image`. RSMs made from distances (by `from_rsatoolbox` or `kind="distance"`) are converted back to these distances.

    Args:
        similarities: (K, N, N).
        ids: N names of images.
        measure: name of the distances, or None.
        descriptors: further facts about the RSMs, each with K values.

    Raises:
        ComparisonError: rsatoolbox is not installed.
    """
    try:
        from rsatoolbox import rdm
    except ImportError as error:
        raise ComparisonError("rsatoolbox is not installed; pip install 'rsm-probe[brains]'") from error
    own = np.diagonal(similarities, axis1=1, axis2=2)
    squared = own[:, :, None] + own[:, None, :] - 2 * similarities
    first, second = np.triu_indices(len(ids), 1)
    return rdm.RDMs(
        squared[:, first, second],
        dissimilarity_measure=measure,
        rdm_descriptors={key: list(values) for key, values in descriptors.items()},
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
    _require_rdms(rdms)
    require_whole(index, "index", -(count := len(rdms.get_matrices())), ComparisonError)
    if index >= count:
        raise ComparisonError(f"there are {count} matrices, and none has index {index}")
    matrices, names, measure = _all_of_rdms(rdms, descriptor)
    return matrices[index], names, measure


def named_rdms(
    rdms: Any, descriptor: str | None, names: str | None, dimension: str
) -> tuple[np.ndarray, list[str] | None, str | None, list[str] | None]:
    """Return all matrices of distances with their names.

    Args:
        rdms: K matrices of distances, an `rsatoolbox.rdm.RDMs`.
        descriptor: see `one_of_rdms`.
        names: the RDM descriptor that names the matrices; None for that called `dimension` if there is one.
        dimension: what the matrices belong to.

    Returns:
        The distances (K, N, N); N names of images, or None; the dissimilarity measure, or None; K names, or None.

    Raises:
        ComparisonError: as `one_of_rdms`, or no such RDM descriptor.
    """
    matrices, ids, measure = _all_of_rdms(rdms, descriptor)
    known = [str(name) for name in rdms.rdm_descriptors if name != "index"]
    if names is not None and names not in rdms.rdm_descriptors:
        raise ComparisonError(f"no RDM descriptor {names!r} (there are: {', '.join(known) or 'none'})")
    matrix_names = rdms.rdm_descriptors.get(names or dimension)
    return matrices, ids, measure, None if matrix_names is None else [str(name) for name in matrix_names]


def _require_rdms(rdms: Any) -> None:
    if not hasattr(rdms, "get_matrices"):
        raise ComparisonError(
            f"expected rsatoolbox.rdm.RDMs, found {type(rdms).__name__}; for a plain matrix of distances, use "
            "RSM.from_array(d, ids, kind='distance')"
        )


def _all_of_rdms(rdms: Any, descriptor: str | None) -> tuple[np.ndarray, list[str] | None, str | None]:
    _require_rdms(rdms)
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
    measure = rdms.dissimilarity_measure
    return np.asarray(rdms.get_matrices(), dtype=np.float64), names, None if measure is None else str(measure)
