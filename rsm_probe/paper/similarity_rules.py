"""The rules by which experiments compare two images: matchings and baselines."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.errors import MatchingError, look_up
from rsm_probe.matching import Identity, LateInteraction, Matching, Translation, get_matching, matching_names
from rsm_probe.similarity.kernels import Kernel, Linear, get_kernel

# Baselines that compare one vector per image -> the kind of vector, as in `rsm_probe.forward.token_kinds`.
CLASS_TOKEN = "class-token"
VECTORS = {"pooled": "mean", "max": "max", "gem": "gem", CLASS_TOKEN: "class"}
# The matchings of semantic (permutation-invariant) RSMs; the identity gives spatio-semantic RSMs.
SEMANTIC = ("optimal", "batch-optimal")
_TITLES = {
    "identity": "none",
    "optimal": "PI",
    "batch-optimal": "PI (Batch-Optimal)",
    "rewindowed": "PI (rewindowed)",
    "pooled": "average pooling",
    "max": "max pooling",
    "gem": "GeM pooling",
    CLASS_TOKEN: "class token",
    "late-interaction": "late interaction",
}


@dataclass(frozen=True)
class SimilarityRule:
    """How to compute the similarity of two images.

    Attributes:
        name: name of the matching, or of the baseline.
        matching: the matching of locations; the identity for vectors.
        kernel: turns the matched product into a similarity.
        vector: the kind of the one vector per image that is compared instead of the locations; "" for locations.
        per_location: whether to divide the product by the number of locations.
    """

    name: str
    matching: Matching
    kernel: Kernel
    vector: str = ""
    per_location: bool = False

    @property
    def products_name(self) -> str:
        """The name under which products are stored; kernels with the same products share it."""
        return f"{self.name}-unit" if self.per_location else self.name

    def applies_to(self, layer: CapturedLayer) -> bool:
        """Whether a layer has the tokens that are compared."""
        return self.vector != VECTORS[CLASS_TOKEN] or layer.has_class_token


def similarity_rule(name: str, kernel: str) -> SimilarityRule | None:
    """Make the rule for a matching and a kernel.

    Late interaction under the cosine kernel is the mean, over locations, of the cosine with the most similar location
    of the second image. It is undefined under an RBF kernel.

    Baselines compare one vector per image: "pooled", the mean over locations (global average pooling); "max", the
    maximum over locations of each channel; "gem", the generalised mean ((1/S) sum z^3)^(1/3) of values that are raised
    to 1e-6 first (Radenovic et al., 2019); or "class-token", the first token beside the locations. Negative values do
    not count in GeM pooling: in a layer that ends without a ReLU (linear bottlenecks, transformer blocks), it ignores
    all that is below 0.

    Args:
        name: name of a matching, or of a baseline.
        kernel: name of a kernel; see `get_kernel`.

    Returns:
        The rule; None if matching and kernel cannot be combined.

    Raises:
        MatchingError: unknown matching.
        ComparisonError: unknown kernel.
    """
    similarity = get_kernel(kernel)
    if name in VECTORS:
        return SimilarityRule(name, Identity(), similarity, vector=VECTORS[name])
    _, method = get_matching(name)
    if method.one_to_one or not similarity.needs_norms:
        return SimilarityRule(name, method, similarity)
    if isinstance(method, LateInteraction) and similarity.name == "cosine":
        return SimilarityRule(name, LateInteraction(unit_length=True), Linear(), per_location=True)
    return None


def known_rule(name: str) -> str:
    """Return the name under which results have a matching, which may have options, or a baseline.

    Raises:
        MatchingError: the name is unknown.
    """
    if "(" in name:
        return get_matching(name)[0]
    return look_up(name, {name: name for name in (*matching_names(), *VECTORS)}, "matching", MatchingError)


def matching_title(name: str) -> str:
    """The title of a matching or baseline in tables."""
    title, options = _TITLES.get(_method(name), _method(name)), name.partition("(")[2].removesuffix(")")
    return f"{title}, {options}" if options else title


def semantic_matching(names: Collection[str]) -> str | None:
    """The matching whose semantic RSM is compared with all others: "optimal", else the first that is semantic.

    Returns:
        Its name; None if no matching is permutation-invariant and one to one.
    """
    by_preference = sorted(names, key=lambda name: (name != "optimal", _method(name) != "optimal"))
    return next((name for name in by_preference if _is_semantic(name)), None)


def is_shown_as_semantic(name: str) -> bool:
    """Whether tables have the gain of a matching over the identity, and figures show it beside the identity."""
    return _method(name) in SEMANTIC


def _method(name: str) -> str:
    """The name of a matching without its options."""
    return name.partition("(")[0]


def _is_semantic(name: str) -> bool:
    if name in VECTORS:
        return False
    _, method = get_matching(name)
    return method.one_to_one and not method.is_identity and not isinstance(method, Translation)


def shown_matchings(names: Collection[str]) -> list[str]:
    """The matchings that figures of RSMs and neighbours show side by side: at most two, without baselines."""
    semantic: Collection[str | None] = [name for name in names if is_shown_as_semantic(name)] or [
        semantic_matching(names)
    ]
    return [name for name in names if name == "identity" or name in semantic][:2]


def in_tiles(
    kernel: Kernel, products: np.ndarray, norms: tuple[np.ndarray, np.ndarray], same: bool, tile: int | None
) -> np.ndarray:
    """Apply a kernel to tiles of pairs separately, so that an RBF kernel chooses its width for each tile.

    The paper computes its RSMs in tiles of 100 x 100 images (appendix D.1). It notes that this is not optimal for the
    RBF kernel, because similarities in different tiles then have different scales.

    Args:
        kernel: the kernel of the RSM.
        products: matched inner products (N, M).
        norms: squared norms (N,) and (M,).
        same: whether rows and columns are the same images.
        tile: images per side of a tile; None for all pairs at once.

    Returns:
        Similarities (N, M).
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
