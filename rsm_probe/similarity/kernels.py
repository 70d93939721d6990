"""Kernels from matched inner products: one matching per pair gives every kernel (paper, equations 6-8).

A permutation keeps norms, so with `g = <x, P y>` and squared norms `n`: linear `g`, cosine `g / sqrt(n m)`, RBF
`exp(-(n + m - 2 g) / (2 sigma^2))`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import numpy as np

from rsm_probe.checks import brief
from rsm_probe.errors import ComparisonError, look_up

# What rounding leaves of a distance of 0, relative to the norms that it is the difference of: affinities are float32.
_ROUNDING = float(np.finfo(np.float32).eps)


class Kernel(ABC):
    """A similarity of two images given their matched inner product and their squared norms; it grows with the product.

    Attributes:
        name: how users and results call it.
        needs_norms: whether it relates the product to norms, which bound the product of matched locations only.
    """

    name: ClassVar[str]
    needs_norms: ClassVar[bool] = True

    @property
    def needs_width(self) -> bool:
        """Whether it takes a width from the distances of the pairs at hand."""
        return False

    @property
    def ordering(self) -> Kernel:
        """A kernel that ranks pairs as this one does, and tells apart those that it may round to the same value."""
        return self

    def of_ordering(self, values: np.ndarray) -> np.ndarray:
        """This kernel's similarities, of any shape, from those of its `ordering`."""
        return values

    @abstractmethod
    def __call__(self, products: np.ndarray, norms_x: np.ndarray, norms_y: np.ndarray, *, same: bool) -> np.ndarray:
        """Evaluate the kernel on a block of pairs.

        Args:
            products: matched inner products g, shape (N, M), float64.
            norms_x: squared norms, shape (N,).
            norms_y: squared norms, shape (M,).
            same: whether rows and columns are the same images, so that the diagonal holds self-similarities.

        Returns:
            Shape (N, M), float64.
        """


@dataclass(frozen=True)
class Linear(Kernel):
    """The inner product itself (equation 7); unbounded."""

    name: ClassVar[str] = "linear"
    needs_norms: ClassVar[bool] = False

    def __call__(self, products: np.ndarray, norms_x: np.ndarray, norms_y: np.ndarray, *, same: bool) -> np.ndarray:
        """Return the products."""
        return products.copy()


@dataclass(frozen=True)
class Cosine(Kernel):
    """Cosine similarity in [-1, 1] (equation 8); 0 where an image's representation is all zero."""

    name: ClassVar[str] = "cosine"

    def __call__(self, products: np.ndarray, norms_x: np.ndarray, norms_y: np.ndarray, *, same: bool) -> np.ndarray:
        """Divide by both norms."""
        scale = np.sqrt(norms_x)[:, None] * np.sqrt(norms_y)[None, :]
        # Float32 affinities can exceed the product of the norms in the last digit.
        return np.clip(np.divide(products, scale, out=np.zeros_like(products), where=scale > 0), -1.0, 1.0)


@dataclass(frozen=True)
class RBF(Kernel):
    """Radial basis function in [0, 1] (equation 6).

    Attributes:
        sigma2: the squared width; None for the median squared distance over the pairs at hand (without the diagonal
            where rows and columns are the same images). Distances below the resolution of float32 count as 0. If that
            median is 0, the limit is taken: 1 at distance 0, else 0.
    """

    name: ClassVar[str] = "rbf"
    sigma2: float | None = None

    def __post_init__(self) -> None:
        width = self.sigma2
        if width is None:
            return
        if isinstance(width, bool) or not isinstance(width, Real) or not 0 < width < math.inf:
            raise ComparisonError(f"sigma2 of the RBF kernel must be a number above 0, found {brief(width)}")

    def __call__(self, products: np.ndarray, norms_x: np.ndarray, norms_y: np.ndarray, *, same: bool) -> np.ndarray:
        """Turn products into squared distances, clamped at 0, and those into similarities."""
        distances = squared_distances(products, norms_x, norms_y)
        if self.sigma2 is not None:
            return self.of_distances(distances)
        others = distances[~np.eye(len(distances), dtype=bool)] if same else distances.ravel()
        median = float(np.median(others)) if others.size else 0.0
        return RBF(median).of_distances(distances) if median else (distances == 0.0).astype(np.float64)

    @property
    def needs_width(self) -> bool:
        """Whether no width was given."""
        return self.sigma2 is None

    @property
    def ordering(self) -> Kernel:
        """Closeness, in which far images still differ."""
        return Closeness()

    def of_ordering(self, values: np.ndarray) -> np.ndarray:
        """Similarities of squared distances below 0, given a width."""
        return self.of_distances(-values)

    def of_distances(self, distances: np.ndarray) -> np.ndarray:
        """Similarities of squared distances, given a width."""
        assert self.sigma2 is not None
        with np.errstate(over="ignore"):  # however far, exp(-infinity) is 0
            return np.exp(-distances / (2.0 * self.sigma2))


@dataclass(frozen=True)
class Closeness(Kernel):
    """The squared distance below 0: in the order of every RBF kernel, where narrow ones only say 0."""

    name: ClassVar[str] = "closeness"

    def __call__(self, products: np.ndarray, norms_x: np.ndarray, norms_y: np.ndarray, *, same: bool) -> np.ndarray:
        """Turn products into squared distances, clamped at 0, below 0."""
        return -squared_distances(products, norms_x, norms_y)


def squared_distances(products: np.ndarray, norms_x: np.ndarray, norms_y: np.ndarray) -> np.ndarray:
    """`n + m - 2 g` (N, M); what is below the resolution of float32 counts as 0."""
    scale = norms_x[:, None] + norms_y[None, :]
    distances = scale - 2.0 * products
    distances[distances <= _ROUNDING * scale] = 0.0
    return distances


_KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (Linear(), Cosine(), RBF())}


def check_kernel(kernel: Kernel, matching: str, one_to_one: bool) -> None:
    """Refuse kernels of norms for scores, which pair no locations and whose values norms do not bound.

    Raises:
        ComparisonError: the kernel does not apply.
    """
    if kernel.needs_norms and not one_to_one:
        raise ComparisonError(
            f"{matching} is a score and pairs no locations, so the {kernel.name} kernel does not apply; "
            f"use kernel='linear'"
        )


def kernel_names() -> list[str]:
    """All names that `get_kernel` knows."""
    return list(_KERNELS)


def get_kernel(kernel: str | Kernel) -> Kernel:
    """A kernel from its name, or a kernel object with its options as it is.

    Raises:
        ComparisonError: unknown name; the message holds the known ones.
    """
    if isinstance(kernel, Kernel):
        return kernel
    return look_up(kernel, _KERNELS, "kernel", ComparisonError)
