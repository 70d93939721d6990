"""Pairs of queries and images: only those that may be good enough are matched."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields

import numpy as np

from rsm_probe.matching.protocol import Locations, Matching, Pairs
from rsm_probe.similarity.affinity import pair_affinities
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
    method: Matching,
    kernel: Kernel,
    block: Block,
    rows: np.ndarray,
    other: Block,
    columns: np.ndarray,
    least: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, Counts]:
    """Matches pairs of queries and images, unless each location's best answer adds up to too little.

    Args:
        method: any matching; called in several threads at once.
        kernel: what says how similar two images are.
        block: the queries.
        rows: (B,), the query of each pair.
        other: a part of the database.
        columns: (B,), the image in it.
        least: what a pair must reach, for every query of the block.

    Returns:
        Which pairs were matched (B,), their products, and what was done.
    """
    with one_thread():
        started = time.perf_counter()
        affinity, hopeful = None, np.ones(len(rows), bool)
        if method.needs_affinity:
            affinity = pair_affinities(block.images.tokens, other.images.tokens, rows, columns)
        if affinity is not None and method.one_to_one:
            norms = block.norms[rows], other.norms[columns]
            bounds = _best_answers(affinity)[:, None] * (block.unit * other.unit)
            # Kernels take all rows with all columns; pairs are on the diagonal.
            reached = kernel(rounded_up(bounds, *norms), *norms, same=False)
            hopeful = np.diagonal(reached) >= least[rows]
            rows, columns, affinity = rows[hopeful], columns[hopeful], affinity[hopeful]
        halfway = time.perf_counter()
        values = _products(method, block, rows, other, columns, affinity) if len(rows) else np.empty(0)
        spent = halfway - started, time.perf_counter() - halfway
    return hopeful, values, Counts(0, len(hopeful), len(rows), 0.0, *spent)


def _best_answers(affinity: np.ndarray) -> np.ndarray:
    """What each location's best answer adds up to, seen from the side where that is less (B,)."""
    _, rows, columns = affinity.shape
    of_rows, of_columns = affinity.max(axis=2), affinity.max(axis=1)
    # Surplus locations of the larger image may stay without an answer, which is better than a negative one.
    if rows > columns:
        of_rows = np.maximum(of_rows, 0)
    if columns > rows:
        of_columns = np.maximum(of_columns, 0)
    return np.minimum(of_rows.sum(axis=1, dtype=np.float64), of_columns.sum(axis=1, dtype=np.float64))


def _products(
    method: Matching, block: Block, rows: np.ndarray, other: Block, columns: np.ndarray, affinity: np.ndarray | None
) -> np.ndarray:
    # Numba takes seconds to load, and whoever never matches should not wait for it.
    from rsm_probe.matching.loops import matched_products

    x, y, aligned = block.images, other.images, np.empty(len(rows))
    if affinity is not None:
        # One pair at a time: what two images add up to must not depend on who stands beside them in memory.
        same = np.arange(x.count)
        same = np.where(same < y.count, same, -1)
        matched_products(x.on_cpu.numpy(), y.on_cpu.numpy(), rows, columns, same, aligned)
    return solve_over(method, Pairs(rows, columns, x, y, affinity), aligned).values * (block.unit * other.unit)
