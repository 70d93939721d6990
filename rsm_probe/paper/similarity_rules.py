"""The ways in which studies compare two images: matchings, and the baselines that stand beside them in every table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from rsm_probe.errors import MatchingError, nearest
from rsm_probe.matching.matching import Matching
from rsm_probe.matching.methods.identity import Identity
from rsm_probe.matching.methods.scores import LateInteraction
from rsm_probe.matching.registry import get_matching, matching_names
from rsm_probe.pairs.compute import rsm
from rsm_probe.similarity.kernels import RBF, Kernel, Linear, get_kernel

# The mean over locations of each image, compared by the kernel: what a global average pooling sees.
POOLED = "pooled"
# What the paper calls semantic and spatio-semantic RSMs in tables: permutation-invariant, and not.
SEMANTIC = ("optimal", "batch-optimal")
_TITLES = {"identity": "none", "optimal": "PI", "batch-optimal": "PI (Batch-Optimal)"}


@dataclass(frozen=True)
class Way:
    """How one number comes of two images.

    Attributes:
        name: of the matching, or "pooled".
        matching: pairs locations.
        kernel: turns the product of what is paired into a similarity.
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
        """What products are called that several kernels share."""
        return f"{self.name}-unit" if self.per_location else self.name


def way(name: str, kernel: str, sigma2: float | None = None) -> Way | None:
    """A way by the names of matching and kernel; None where the two do not go together.

    Late interaction under the cosine kernel is the mean, over locations, of the cosine with the best answer; under an
    RBF kernel it is nothing.

    Args:
        name: a matching, or "pooled".
        kernel: see `get_kernel`.
        sigma2: squared width of an RBF kernel; None for the median of the squared distances at hand.

    Raises:
        MatchingError: unknown matching.
        ComparisonError: unknown kernel.
    """
    chosen = RBF(sigma2) if kernel == "rbf" and sigma2 is not None else get_kernel(kernel)
    if name == POOLED:
        return Way(name, Identity(), chosen, pooled=True)
    _, method = get_matching(name)
    if method.one_to_one or not chosen.needs_norms:
        return Way(name, method, chosen)
    if isinstance(method, LateInteraction) and chosen.name == "cosine":
        return Way(name, LateInteraction(unit_length=True), Linear(), per_location=True)
    return None


def require_usable(methods: Iterable[Matching]) -> None:
    """Tries methods on two tiny images: one whose package is missing is refused before anything else is computed.

    Raises:
        MatchingError: a method cannot be used here.
    """
    tokens = torch.eye(4)[None].repeat(2, 1, 1)
    for method in methods:
        rsm(tokens, None, method, "linear", grid=(2, 2), workers=1)


def title(name: str) -> str:
    """What tables call a way."""
    return _TITLES.get(name, name)


def known_way(name: str) -> str:
    """The name, if it is one of a matching or "pooled".

    Raises:
        MatchingError: it is none.
    """
    names = [*matching_names(), POOLED]
    if name not in names:
        raise MatchingError(f"unknown matching {name!r}{nearest(name, names)} (known: {', '.join(names)})")
    return name


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
    found = np.empty_like(products)
    for i in range(0, len(products), tile):
        for j in range(0, products.shape[1], tile):
            rows, columns = slice(i, i + tile), slice(j, j + tile)
            parts = norms[0][rows], norms[1][columns]
            found[rows, columns] = kernel(products[rows, columns], *parts, same=same and i == j)
    return found
