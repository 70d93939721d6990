"""RSMs as the distances of rsatoolbox, and from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rsm_probe.errors import ComparisonError

if TYPE_CHECKING:
    from rsm_probe.similarity.rsm import RSM


def to_rsatoolbox(rsm: RSM) -> Any:
    """An RSM as an `rsatoolbox.rdm.RDMs` of one matrix of squared distances `k_ii + k_jj - 2 k_ij`.

    Biased linear CKA is rsatoolbox's `cosine_cov` of two of these. Names of images go into the pattern descriptor
    `image`.

    Raises:
        ComparisonError: rows and columns are different images; rsatoolbox is not installed.
    """
    try:
        from rsatoolbox import rdm
    except ImportError as error:
        raise ComparisonError("rsatoolbox is not installed; pip install rsatoolbox") from error
    if rsm.dataset.attrs.get("image_sets", 1) != 1:
        raise ComparisonError("rsatoolbox compares images of one set, and this RSM has other images in its columns")
    own = np.diagonal(rsm.values)
    distances = own[:, None] + own[None, :] - 2 * rsm.values
    return rdm.RDMs(
        distances[np.triu_indices(len(own), 1)][None],
        dissimilarity_measure="squared kernel distance",
        rdm_descriptors={key: [str(value)] for key, value in rsm.attributes.items()},
        pattern_descriptors={"image": rsm.ids},
    )


def similarities(rdms: Any, index: int, descriptor: str | None) -> tuple[np.ndarray, list[str] | None]:
    """One matrix of distances as similarities, by double centring: `-H D H / 2` (Torgerson 1952).

    For squared Euclidean distances these are the inner products of the centred patterns, which every CKA takes for
    those of the patterns themselves.

    Args:
        rdms: one or more matrices of distances, an `rsatoolbox.rdm.RDMs`.
        index: which of them.
        descriptor: the pattern descriptor that names the images; None for `image`, or where nothing names them.

    Returns:
        Shape (N, N), and N names, or None where nothing names the images.

    Raises:
        ComparisonError: no such matrix or descriptor; distances that are not finite.
    """
    matrices = rdms.get_matrices()
    if not -len(matrices) <= index < len(matrices):
        raise ComparisonError(f"there are {len(matrices)} matrices, and none has index {index}")
    distances = np.asarray(matrices[index], dtype=np.float64)
    if not np.isfinite(distances).all():
        row, column = np.argwhere(~np.isfinite(distances))[0]
        raise ComparisonError(f"the distance of images {row} and {column} is {distances[row, column]}")
    means = distances.mean(axis=0)
    values = -(distances - means[:, None] - means[None, :] + means.mean()) / 2
    known = [str(name) for name in rdms.pattern_descriptors if name != "index"]
    # Invented names would agree with those of any other RSM, whatever the order of its images.
    if (descriptor or "image") not in rdms.pattern_descriptors and (descriptor is not None or known):
        raise ComparisonError(
            f"no pattern descriptor {descriptor or 'image'!r} names the images; give descriptor= (there are: "
            f"{', '.join(known) or 'none'})"
        )
    names = rdms.pattern_descriptors.get(descriptor or "image")
    return (values + values.T) / 2, None if names is None else [str(name) for name in names]
