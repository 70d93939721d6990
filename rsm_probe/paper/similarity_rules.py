"""The rules by which experiments compare two images: matchings, and the baselines beside them in every table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from rsm_probe.errors import MatchingError, look_up
from rsm_probe.matching.matching import Matching
from rsm_probe.matching.methods.identity import Identity
from rsm_probe.matching.methods.scores import LateInteraction
from rsm_probe.matching.registry import get_matching, matching_names
from rsm_probe.similarity.kernels import Kernel, Linear, get_kernel

# The mean over locations of each image, compared by the kernel: what a global average pooling sees.
POOLED = "pooled"
# The matchings of semantic RSMs, which are permutation-invariant; the identity gives spatio-semantic ones.
SEMANTIC = ("optimal", "batch-optimal")
_TITLES = {"identity": "none", "optimal": "PI", "batch-optimal": "PI (Batch-Optimal)"}


@dataclass(frozen=True)
class SimilarityRule:
    """How two images become one number.

    Attributes:
        name: of the matching, or "pooled".
        matching: pairs locations.
        kernel: turns the product of paired locations into a similarity.
        pooled: whether the means over locations are compared instead of the locations.
        per_location: whether the product is divided by the number of locations.
    """

    name: str
    matching: Matching
    kernel: Kernel
    pooled: bool = False
    per_location: bool = False

    @property
    def products_name(self) -> str:
        """The name of products that several kernels share."""
        return f"{self.name}-unit" if self.per_location else self.name


def similarity_rule(name: str, kernel: str) -> SimilarityRule | None:
    """A rule by the names of matching and kernel; None where the two do not go together.

    Late interaction under the cosine kernel is the mean, over locations, of the cosine with the best answer; under an
    RBF kernel it is undefined.

    Args:
        name: a matching, or "pooled".
        kernel: see `get_kernel`.

    Raises:
        MatchingError: unknown matching.
        ComparisonError: unknown kernel.
    """
    similarity = get_kernel(kernel)
    if name == POOLED:
        return SimilarityRule(name, Identity(), similarity, pooled=True)
    _, method = get_matching(name)
    if method.one_to_one or not similarity.needs_norms:
        return SimilarityRule(name, method, similarity)
    if isinstance(method, LateInteraction) and similarity.name == "cosine":
        return SimilarityRule(name, LateInteraction(unit_length=True), Linear(), per_location=True)
    return None


def known_rule(name: str) -> str:
    """The name, if it is one of a matching or "pooled".

    Raises:
        MatchingError: it is neither.
    """
    return look_up(name, {name: name for name in (*matching_names(), POOLED)}, "matching", MatchingError)


def matching_title(name: str) -> str:
    """What tables call a matching or a baseline."""
    return _TITLES.get(name, name)


def shown_matchings(names: Iterable[str]) -> list[str]:
    """The matchings whose RSMs and neighbours figures show side by side: at most two, without the baselines."""
    return [name for name in names if name == "identity" or name in SEMANTIC][:2]


def in_tiles(
    kernel: Kernel, products: np.ndarray, norms: tuple[np.ndarray, np.ndarray], same: bool, tile: int | None
) -> np.ndarray:
    """A kernel over tiles of pairs, each by itself, so that an RBF kernel takes its width from each of them.

    The paper computes its RSMs in tiles of 100 x 100 images (appendix D.1) and says that this is not optimal for the
    RBF kernel: similarities of different tiles are then measured in different units.

    Args:
        kernel: of the RSM.
        products: matched inner products (N, M).
        norms: squared norms (N,) and (M,).
        same: whether rows and columns are the same images.
        tile: images on each side; None for all pairs at once.
    """
    if tile is None:
        return kernel(products, *norms, same=same)
    values = np.empty_like(products)
    for i in range(0, len(products), tile):
        for j in range(0, products.shape[1], tile):
            rows, columns = slice(i, i + tile), slice(j, j + tile)
            parts = norms[0][rows], norms[1][columns]
            values[rows, columns] = kernel(products[rows, columns], *parts, same=same and i == j)
    return values
