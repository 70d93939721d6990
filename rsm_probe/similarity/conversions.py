"""Distances from similarities, and similarities from distances: the formulas, with their sources."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rsm_probe.errors import ComparisonError, look_up

# Rounding of affinities in float32, relative to self-similarities.
_ROUNDING = 1e-6
# What `to_distances` can make.
DISTANCES = ("squared euclidean", "euclidean", "cosine")
FORMULAS = ("inner products", "one minus")
# Name of distances -> the formula that gives similarities. The names are those of rsatoolbox where it has one.
FORMULA_OF = {
    "squared euclidean": "inner products",
    "euclidean": "inner products",
    "squared mahalanobis": "inner products",
    "mahalanobis": "inner products",
    "crossnobis": "inner products",
    "correlation": "one minus",
    "cosine": "one minus",
}
# Distances that are squared before they are centred.
_ROOTS = ("euclidean", "mahalanobis")


def distances_from(similarities: np.ndarray, dissimilarity: str, ids: Sequence[str]) -> np.ndarray:
    """Compute distances from similarities `k`, whose diagonal holds the similarity of each image with itself.

    - "squared euclidean": `k_ii + k_jj - 2 k_ij` (Schoenberg 1935), for inner products `k` the squared distance of two
      patterns.
    - "euclidean": the square root of that.
    - "cosine": `1 - k_ij / sqrt(k_ii k_jj)`; 1 beside an image whose own similarity is 0.

    Args:
        similarities: (N, N); NaN for missing pairs.
        dissimilarity: see above.
        ids: N names of images, for messages.

    Returns:
        Shape (N, N), 0 on the diagonal.

    Raises:
        ComparisonError: an unknown name; or two images are more alike than each is to itself, so that no patterns have
            these similarities as inner products.
    """
    name = look_up(dissimilarity, {name: name for name in DISTANCES}, "distance", ComparisonError)
    own = np.diagonal(similarities)
    squared = own[:, None] + own[None, :] - 2 * similarities
    norms = np.sqrt(np.maximum(own[:, None] * own[None, :], 0.0))
    highest = norms if name == "cosine" else (own[:, None] + own[None, :]) / 2
    if (bad := (similarities > highest + _ROUNDING * np.abs(highest)) | (own < 0)).any():
        row, column = np.argwhere(bad)[0]
        raise ComparisonError(
            f"images {ids[row]} and {ids[column]} are more alike ({similarities[row, column]:.6g}) than each is to "
            f"itself ({own[row]:.6g} and {own[column]:.6g}), so {name} distances do not follow from these "
            "similarities; compute distances d in another way and give RSM.from_array(d, ids, kind='distance')"
        )
    if name == "cosine":
        cosines = np.where(np.isnan(similarities), np.nan, 0.0)
        squared = 1 - np.divide(similarities, norms, out=cosines, where=norms > 0)
    converted = np.sqrt(np.maximum(squared, 0.0)) if name == "euclidean" else squared
    np.fill_diagonal(converted, 0.0)
    return converted


def similarities_from(
    distances: np.ndarray, dissimilarity: str | None, formula: str | None, ids: Sequence[str]
) -> np.ndarray:
    """Compute similarities from distances `d`.

    - "inner products": `-H D H / 2` with the squared distances `D` and the centring matrix `H = I - 1 1^T / N`
      (Torgerson 1952; Gower 1966): inner products of patterns whose mean over the images was subtracted. Distances
      named "euclidean" or "mahalanobis" are squared first, all others are taken as squared distances.
    - "one minus": `1 - d`, which is the correlation for correlation distances and the cosine for cosine distances.

    Args:
        distances: (N, N); NaN for missing pairs.
        dissimilarity: name of the distances, which decides the formula if none is given.
        formula: see above.
        ids: N names of images, for messages.

    Returns:
        Shape (N, N).

    Raises:
        ComparisonError: an unknown formula; none is given and none is known for these distances; or inner products of
            distances of which some are missing.
    """
    formula = FORMULA_OF.get(str(dissimilarity)) if formula is None else formula
    if formula is None:
        raise ComparisonError(
            f"no formula is known for the distances {dissimilarity!r} (there is one for {', '.join(FORMULA_OF)}); say "
            "'inner products' if they are squared distances of patterns, or 'one minus' if 1 - d is a similarity"
        )
    if look_up(formula, {name: name for name in FORMULAS}, "formula", ComparisonError) == "one minus":
        return 1 - distances
    if (lost := np.isnan(distances)).any():
        row, column = np.argwhere(lost)[0]
        raise ComparisonError(
            f"{int(np.triu(lost).sum())} pairs of images are missing, first {ids[row]} and {ids[column]}, and inner "
            "products need all of them; take images whose pairs are known by subset, or compare the distances"
        )
    squared = distances**2 if dissimilarity in _ROOTS else distances
    means = squared.mean(axis=0)
    return -(squared - means[:, None] - means[None, :] + means.mean()) / 2
