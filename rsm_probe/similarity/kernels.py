"""Kernels of matched inner products: one matching per pair gives every kernel (paper, equations 6-8).

A permutation preserves norms. With `g = <x, P y>` and the squared norms `n` and `m`, the linear kernel is `g`, the
cosine kernel `g / sqrt(n m)`, and the RBF kernel `exp(-(n + m - 2 g) / (2 sigma^2))`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rsm_probe.checks import require_number
from rsm_probe.errors import ComparisonError, look_up

# Rounding error of a squared distance of 0, relative to the norms: affinities are float32.
_ROUNDING = float(np.finfo(np.float32).eps)


class Kernel(ABC):
    """A similarity of two images as a function of their matched inner product and squared norms.

    It must increase with the product.

    Attributes:
        name: the name of the kernel, for users and in results.
        needs_norms: uses the norms, which bound the products of matchings but not of scores.
    """

    name: ClassVar[str]
    needs_norms: ClassVar[bool] = True

    @property
    def needs_width(self) -> bool:
        """Whether the kernel takes its width from the distances between the images at hand."""
        return False

    @property
    def ordering(self) -> Kernel:
        """A kernel that ranks pairs as this one does, but separates pairs that this one may round to the same value."""
        return self

    def of_ordering(self, values: np.ndarray) -> np.ndarray:
        """Convert similarities under `ordering`, of any shape, to similarities under this kernel."""
        return values

    def at_width_of(self, products: np.ndarray, norms_x: np.ndarray, norms_y: np.ndarray, *, same: bool) -> Kernel:
        """The kernel with the width that it takes from these pairs, (N, M); arguments as in a call.

        Raises:
            ComparisonError: a kernel that takes a width does not say which.
        """
        if self.needs_width:
            raise ComparisonError(
                f"kernel {self.name!r} takes its width from the pairs at hand and does not say which, so bounds of its "
                f"similarities are unknown; override at_width_of in {type(self).__name__}"
            )
        return self

    @abstractmethod
    def __call__(self, products: np.ndarray, norms_x: np.ndarray, norms_y: np.ndarray, *, same: bool) -> np.ndarray:
        """Evaluate the kernel on a block of pairs.

        Args:
            products: matched inner products g, (N, M), float64.
            norms_x: squared norms n, (N,).
            norms_y: squared norms m, (M,).
            same: whether rows and columns are the same images, so that the diagonal holds self-similarities.

        Returns:
            Shape (N, M), float64.
        """


@dataclass(frozen=True)
class Linear(Kernel):
    """The inner product itself (paper, equation 7); unbounded."""

    name: ClassVar[str] = "linear"
    needs_norms: ClassVar[bool] = False

    def __call__(self, products: np.ndarray, norms_x: np.ndarray, norms_y: np.ndarray, *, same: bool) -> np.ndarray:
        """Return the products."""
        return products.copy()


@dataclass(frozen=True)
class Cosine(Kernel):
    """Cosine similarity in [-1, 1] (paper, equation 8); 0 if a representation is all zero."""

    name: ClassVar[str] = "cosine"

    def __call__(self, products: np.ndarray, norms_x: np.ndarray, norms_y: np.ndarray, *, same: bool) -> np.ndarray:
        """Divide by both norms."""
        scale = np.sqrt(norms_x)[:, None] * np.sqrt(norms_y)[None, :]
        # With float32 affinities, a product can exceed the product of the norms in the last digit.
        return np.clip(np.divide(products, scale, out=np.zeros_like(products), where=scale > 0), -1.0, 1.0)


@dataclass(frozen=True)
class RBF(Kernel):
    """Radial basis function in [0, 1] (paper, equation 6).

    Attributes:
        sigma2: the squared width. None uses the median squared distance over the pairs at hand, without the diagonal if
            rows and columns are the same images. Distances below the resolution of float32 count as 0. If the median is
            0, the kernel is its limit: 1 at distance 0, otherwise 0.
    """

    name: ClassVar[str] = "rbf"
    sigma2: float | None = None

    def __post_init__(self) -> None:
        if self.sigma2 is not None:
            require_number(self.sigma2, "sigma2 of the RBF kernel", ComparisonError, above=0)

    def __call__(self, products: np.ndarray, norms_x: np.ndarray, norms_y: np.ndarray, *, same: bool) -> np.ndarray:
        """Turn products into squared distances, clamped at 0, and these into similarities."""
        distances = squared_distances(products, norms_x, norms_y)
        return self._of_median(distances, same).of_distances(distances)

    def at_width_of(self, products: np.ndarray, norms_x: np.ndarray, norms_y: np.ndarray, *, same: bool) -> Kernel:
        """The kernel with the median squared distance as its width, unless one was given."""
        return self._of_median(squared_distances(products, norms_x, norms_y), same)

    def _of_median(self, distances: np.ndarray, same: bool) -> RBF:
        if self.sigma2 is not None:
            return self
        others = distances[~np.eye(len(distances), dtype=bool)] if same else distances.ravel()
        median = float(np.median(others)) if others.size else 0.0
        return RBF(median) if median else NarrowRBF()

    @property
    def needs_width(self) -> bool:
        """Whether no width was given."""
        return self.sigma2 is None

    @property
    def ordering(self) -> Kernel:
        """`Closeness`, which still separates distant images."""
        return Closeness()

    def of_ordering(self, values: np.ndarray) -> np.ndarray:
        """Convert negated squared distances to similarities; needs a width."""
        return self.of_distances(-values)

    def of_distances(self, distances: np.ndarray) -> np.ndarray:
        """Convert squared distances, of any shape, to similarities; needs a width."""
        assert self.sigma2 is not None
        with np.errstate(over="ignore"):  # exp(-infinity) is 0, as it should be
            return np.exp(-distances / (2.0 * self.sigma2))


@dataclass(frozen=True)
class NarrowRBF(RBF):
    """The limit of RBF kernels whose width goes to 0: 1 at distance 0, otherwise 0."""

    @property
    def needs_width(self) -> bool:
        """Never: its width is 0."""
        return False

    def _of_median(self, distances: np.ndarray, same: bool) -> RBF:
        return self

    def of_distances(self, distances: np.ndarray) -> np.ndarray:
        """Tell distances of 0 from others."""
        return (distances == 0.0).astype(np.float64)


@dataclass(frozen=True)
class Closeness(Kernel):
    """The negated squared distance. It orders pairs as every RBF kernel does, but never underflows to 0."""

    name: ClassVar[str] = "closeness"

    def __call__(self, products: np.ndarray, norms_x: np.ndarray, norms_y: np.ndarray, *, same: bool) -> np.ndarray:
        """Turn products into negated squared distances, clamped at 0."""
        return -squared_distances(products, norms_x, norms_y)


def squared_distances(products: np.ndarray, norms_x: np.ndarray, norms_y: np.ndarray) -> np.ndarray:
    """Squared distances `n + m - 2 g` (N, M); values below the resolution of float32 become 0."""
    scale = norms_x[:, None] + norms_y[None, :]
    distances = scale - 2.0 * products
    distances[distances <= _ROUNDING * scale] = 0.0
    return distances


def highest_similarities(
    kernel: Kernel, products: np.ndarray, bounds: np.ndarray, norms_x: np.ndarray, norms_y: np.ndarray, *, same: bool
) -> np.ndarray:
    """The largest similarities that upper bounds of products allow, at the width of the products themselves.

    No matching exceeds the product of the norms, which counts where it is below a bound.

    Args:
        kernel: the kernel.
        products: matched inner products, (N, M).
        bounds: their upper bounds, (N, M); infinity where unknown.
        norms_x: as for a kernel, as the next two.
        norms_y: see there.
        same: see there.

    Returns:
        Shape (N, M), float64; no entry is below the similarity of its product.

    Raises:
        ComparisonError: see `Kernel.at_width_of`; or the kernel falls as the product grows.
    """
    limits = np.sqrt(norms_x)[:, None] * np.sqrt(norms_y)[None, :]
    fixed = kernel.at_width_of(products, norms_x, norms_y, same=same)
    lowest = fixed(products, norms_x, norms_y, same=same)
    highest = fixed(np.maximum(products, np.minimum(bounds, limits)), norms_x, norms_y, same=same)
    if (below := highest < lowest - _ROUNDING * np.abs(lowest)).any():
        row, column = np.argwhere(below)[0]
        raise ComparisonError(
            f"kernel {kernel.name!r} is not increasing: it falls from {lowest[row, column]:.6g} to "
            f"{highest[row, column]:.6g} as the product of images {row} and {column} grows, so bounds do not hold"
        )
    return np.maximum(lowest, highest)


_KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (Linear(), Cosine(), RBF())}


def check_kernel(kernel: Kernel, matching: str, one_to_one: bool) -> None:
    """Refuse kernels of norms for scores, which pair no locations and are not bounded by norms.

    Raises:
        ComparisonError: the kernel does not apply.
    """
    if kernel.needs_norms and not one_to_one:
        raise ComparisonError(
            f"{matching} is a score and pairs no locations, so the {kernel.name} kernel does not apply; "
            f"use kernel='linear'"
        )


def kernel_names() -> list[str]:
    """List all names that `get_kernel` accepts."""
    return list(_KERNELS)


def get_kernel(kernel: str | Kernel) -> Kernel:
    """Look up a kernel by name; return kernel objects as they are.

    Raises:
        ComparisonError: unknown name; the message lists the known ones.
    """
    if isinstance(kernel, Kernel):
        return kernel
    return look_up(kernel, _KERNELS, "kernel", ComparisonError)
