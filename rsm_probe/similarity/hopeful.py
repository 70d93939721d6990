"""Some queries against one image: only pairs that may be good enough are matched."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields

import numpy as np

from rsm_probe.matching.protocol import Locations, Matching, Pairs
from rsm_probe.similarity.affinity import affinity_block
from rsm_probe.similarity.executors import one_thread
from rsm_probe.similarity.kernels import Kernel
from rsm_probe.similarity.matched import solve_over

# What float32 affinities may add to a product, relative to the norms.
_ROUNDING = 1e-5


@dataclass
class Counts:
    """What was done. Seconds of affinities and matchings are summed over threads."""

    pairs: int = 0
    affinities: int = 0
    matchings: int = 0
    bound_seconds: float = 0.0
    affinity_seconds: float = 0.0
    matching_seconds: float = 0.0

    def add(self, other: Counts) -> None:
        """Adds what another count holds."""
        for part in fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))


@dataclass(frozen=True)
class Block:
    """Some images in memory, ready to be matched.

    Attributes:
        images: their tokens, centred, on the device, in a unit of their own.
        norms: |x|^2 (n,), in the unit of the representations.
        unit: what tokens are to be multiplied with.
    """

    images: Locations
    norms: np.ndarray
    unit: float


def rounded_up(products: np.ndarray, norms_x: np.ndarray, norms_y: np.ndarray) -> np.ndarray:
    """Bounds of exact products (N, M) as bounds of those that are computed, given squared norms."""
    return products + _ROUNDING * np.sqrt(norms_x)[:, None] * np.sqrt(norms_y)[None]


def match_hopeful(
    method: Matching, kernel: Kernel, block: Block, rows: np.ndarray, other: Block, column: int, least: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Counts]:
    """Matches queries with one image, unless each location's best answer adds up to too little.

    Args:
        method: any matching; called in several threads at once.
        kernel: what says how similar two images are.
        block: the queries.
        rows: those to match.
        other: a part of the database.
        column: the image in it.
        least: what a pair must reach, for every query of the block.

    Returns:
        The queries that were matched, their products, and what was done.
    """
    with one_thread():
        started = time.perf_counter()
        affinity, tried = None, len(rows)
        if method.needs_affinity:
            affinity = affinity_block(block.images.tokens, other.images.tokens, rows, column)
        if affinity is not None and method.one_to_one:
            answers = [affinity.max(axis=axis).sum(axis=1, dtype=np.float64) for axis in (1, 2)]
            norms = block.norms[rows], other.norms[[column]]
            bounds = rounded_up(np.minimum(*answers)[:, None] * (block.unit * other.unit), *norms)
            hopeful = kernel(bounds, *norms, same=False)[:, 0] >= least[rows]
            rows, affinity = rows[hopeful], affinity[hopeful]
        halfway = time.perf_counter()
        values = _products(method, block, rows, other, column, affinity) if len(rows) else np.empty(0)
        spent = halfway - started, time.perf_counter() - halfway
    return rows, values, Counts(0, tried, len(rows), 0.0, *spent)


def _products(
    method: Matching, block: Block, rows: np.ndarray, other: Block, column: int, affinity: np.ndarray | None
) -> np.ndarray:
    # Numba takes seconds to load, and whoever never matches should not wait for it.
    from rsm_probe.matching.loops import matched_product

    aligned = np.empty(len(rows))
    if affinity is not None:
        # One pair at a time: what two images add up to must not depend on who stands beside them in memory.
        same = np.arange(block.images.count)
        same = np.where(same < other.images.count, same, -1)
        y = other.images.on_cpu[column].numpy()
        aligned = np.array([matched_product(block.images.on_cpu[int(row)].numpy(), y, same) for row in rows])
    pairs = Pairs(rows, np.full(len(rows), column), block.images, other.images, affinity)
    return solve_over(method, pairs, aligned).values * (block.unit * other.unit)
