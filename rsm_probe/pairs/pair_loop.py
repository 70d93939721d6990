"""The pair loop: every pair of two sides, in blocks of affinities, solved by some methods.

A `PairLoop` is one piece of work. It decides once whether the device or the CPU solves the pairs, and knows how their
affinities are computed. Reductions consume its solved blocks: a matrix in memory, filled by worker threads
(`matcher.py`) or by the calling thread (`match_sides`); a tile on disk (`tiles.py`); the nearest images under bounds
(`neighbours/candidates.py`); a timing (`timing.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, islice
from typing import TypeVar

import numpy as np
import torch

from rsm_probe.errors import CostError, MatchingError
from rsm_probe.execution.amounts import as_budget, format_bytes
from rsm_probe.execution.devices import free_memory, in_halves
from rsm_probe.matching.certificate import identity_partners
from rsm_probe.matching.cpu_or_gpu import Workload
from rsm_probe.matching.demand import pair_bytes, require_room
from rsm_probe.matching.matching import Matching, Pairs, Solution, solve_both_ways
from rsm_probe.matching.methods.identity import aligned_products
from rsm_probe.matching.registry import cheap_matchings
from rsm_probe.pairs.affinities import Affinities, Block, BlockMemory
from rsm_probe.pairs.products import MatchedProducts, ProductMatrix
from rsm_probe.pairs.sides import Side

_Item = TypeVar("_Item")
# The part of a gain that rounding to float16 may hide, relative to the norms: a gain is the difference of two products,
# each off by up to (1 + 2^-11)^2 - 1.
_HALF_PRECISION = 2e-3
# Bytes of an affinity that every device holds.
_NEVER_TOO_LARGE = 256 << 20


@dataclass(frozen=True, eq=False)
class BlockSolver:
    """Methods that read the same affinities, with these affinities.

    Attributes:
        x: the images in the rows, contiguous, prepared by the methods.
        y: those in the columns, on the same device.
        methods: label -> method.
        affinities: of the pairs of both sides.
    """

    x: Side
    y: Side
    methods: Mapping[str, Matching]
    affinities: Affinities

    @classmethod
    def of(
        cls,
        x: Side,
        y: Side,
        methods: Mapping[str, Matching],
        on_device: bool,
        block_memory: int | None = None,
        solved: BlockMemory | None = None,
    ) -> BlockSolver:
        """Methods of one precision that are all solved on the device, or all by the CPU."""
        reads = any(method.needs_affinity for method in methods.values())
        precision = next(iter(methods.values())).precision
        affinities = Affinities(x, y, on_device, reads, precision, block_memory, solved)
        return cls(x.prepare(methods), y.prepare(methods), methods, affinities)

    def solve_gathered(self, rows: np.ndarray, columns: np.ndarray) -> None:
        """Solve pairs whose affinities are gathered one by one, and discard the solutions."""
        block = self.affinities.block(rows, columns, one_by_one=True)
        for label, method in self.methods.items():
            solve_both_ways(method, self.pairs(label, block))

    def pairs(self, label: str, block: Block) -> Pairs:
        """Wait for the affinities of a block, and return its pairs ready for one of the methods."""
        affinity = block.affinity() if self.methods[label].needs_affinity else None
        prepared = self.x.prepared[label], self.y.prepared[label]
        images = self.x.locations, self.y.locations
        return Pairs(block.rows, block.columns, *images, affinity, prepared, self.affinities.on_device)

    def solve(self, block: Block, aligned: np.ndarray | None) -> Iterator[tuple[str, Solution]]:
        """Solve a block by every method, and yield its label and solution.

        Args:
            block: pairs with their affinities.
            aligned: inner products of whole images, of all pairs (N, M); None where no method reads affinities.
        """
        for label, method in self.methods.items():
            base = None if aligned is None else aligned[block.rows, block.columns]
            yield label, solve_over(method, self.pairs(label, block), base)


class PairLoop:
    """All pairs of two sides under some methods: results known at once, and blocks that are left to solve.

    Args:
        x: the images in the rows.
        y: those in the columns, on the same device; x itself for the pairs within x, each of which is solved once.
        methods: label -> method.
        workload: the size of the whole work, where this loop is a part of it.
        memory: most bytes per affinity; None for no limit.
        bounds: whether to keep bounds.
        permutations: whether to keep the matched locations.
        block_memory: see `Affinities`.
        solved: memory of solved blocks, if other loops share it.

    Attributes:
        matrices: label -> results for all pairs, which `fill` completes.
        solvers: methods with the affinities they read; their blocks are left to solve.

    Raises:
        CostError: one affinity exceeds the memory.
        MatchingError: a method cannot work on these locations, or is a score, which has no permutations to return.
    """

    def __init__(
        self,
        x: Side,
        y: Side,
        methods: Mapping[str, Matching],
        workload: Workload | None = None,
        memory: int | None = None,
        *,
        bounds: bool = False,
        permutations: bool = False,
        block_memory: int | None = None,
        solved: BlockMemory | None = None,
    ) -> None:
        self.within = y is x
        self.workload = Workload.of(x.tokens.shape, None if y is x else y.tokens.shape)
        # Computed once: gains are measured against the same numbers, to the last bit.
        aligned = cache(lambda: aligned_products(x.tokens, y.tokens))
        counts = x.locations.count, y.locations.count
        self.matrices: dict[str, ProductMatrix] = {}
        left: dict[str, Matching] = {}
        for label, method in methods.items():
            if permutations and not method.one_to_one:
                raise MatchingError(f"{method.name} is a score and pairs no locations, so it has no permutations")
            identity, products = pairs_equal_locations(method, *counts), None
            if identity:
                products = aligned()
            elif method.at_once:
                products = method.products(x.locations, y.locations)
            self.matrices[label] = matrix = ProductMatrix(x, y, method, products, bounds, permutations)
            if identity:
                matrix.pair_equal_locations(identity_partners(*counts))
            elif products is None or permutations:
                left[label] = method
        self.solvers: list[BlockSolver] = []
        self._aligned: np.ndarray | None = None
        self._diagonal = any(not method.one_to_one for method in left.values())
        if left:
            itemsize = x.tokens.element_size()
            sizes = [affinity_bytes(method, *counts, memory, itemsize) for method in left.values()]
            # Results known at once read tokens in place; blocks gather them, which needs contiguous memory.
            self._aligned = aligned() if any(sizes) else None
            rows = x.contiguous()
            columns = rows if y is x else y.contiguous()
            self.solvers = _solvers(rows, columns, left, workload or self.workload, block_memory, solved)

    def block_pairs(self, solver: BlockSolver) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield rows and columns, both (B,), of the pairs of every block."""
        return solver.affinities.all_pairs(self._diagonal)

    def fill(self, solver: BlockSolver, block: Block) -> None:
        """Solve a block by all methods of a solver, for their matrices; in any thread. Its affinities are then lost."""
        for label, solution in solver.solve(block, self._aligned):
            self.matrices[label].fill(block.rows, block.columns, solution)
        solver.affinities.solved(block)

    def fill_all(self) -> None:
        """Solve everything in the calling thread."""
        for solver in self.solvers:
            blocks: Iterator[Block] = chain.from_iterable(
                solver.affinities.start(*pairs) for pairs in self.block_pairs(solver)
            )
            # A device computes the next block while the CPU solves this one. Where the device itself solves them,
            # working ahead would only take memory.
            if solver.affinities.device.type != "cpu" and not solver.affinities.on_device:
                blocks = _one_ahead(blocks)
            for block in blocks:
                self.fill(solver, block)
                del block  # or it would stay in memory until the next one is there


def match_sides(
    x: Side, y: Side, method: Matching, workload: Workload | None = None, permutations: bool = False
) -> MatchedProducts:
    """Match every image of x with every image of y in the calling thread, and keep bounds.

    Args:
        x: the images in the rows.
        y: those in the columns; x itself for the pairs within x.
        method: any matching.
        workload: the whole work that this is a part of; None if it is all.
        permutations: whether to keep the matched locations.

    Raises:
        MatchingError: the method cannot work on these locations, or is a score and permutations are asked for.
    """
    loop = PairLoop(x, y, {method.name: method}, workload, bounds=True, permutations=permutations)
    loop.fill_all()
    return loop.matrices[method.name].completed()


def solve_over(method: Matching, pairs: Pairs, aligned: np.ndarray | None) -> Solution:
    """Solve pairs; each value is the float64 product under the identity plus the gain of the matching.

    Equal pairings thus give equal values to the last bit, and an exact method never falls below the identity. A device
    that runs out of memory solves the pairs in halves.

    Args:
        method: any matching.
        pairs: B pairs, prepared for the method.
        aligned: inner products of whole images (B,), in float64; None for methods without affinity.
    """
    solved = in_halves(lambda start, stop: solve_both_ways(method, pairs.part(start, stop)), len(pairs))
    solution = Solution.joined(list(solved))
    if aligned is None or pairs.affinity is None or not (method.needs_affinity and method.one_to_one):
        return solution
    base, entries = pairs.aligned_sums, pairs.aligned_entries
    # Summing the same terms in a different order changes the last digits.
    noise = np.abs(entries).sum(axis=1, dtype=np.float64) * entries.shape[1] * np.finfo(np.float64).eps
    gains = np.where(np.abs(solution.values - base) > noise, solution.values - base, 0.0)
    hidden = _HALF_PRECISION * pairs.scales() if method.precision == "float16" else 0.0
    bounds = aligned + np.maximum(solution.bounds - base + hidden, gains)
    return replace(solution, values=aligned + gains, bounds=bounds)


def pairs_equal_locations(method: Matching, rows: int, columns: int) -> bool:
    """Whether location s is paired with location s: under the identity, or where both sides have a single location."""
    return method.is_identity or (rows == columns == 1 and method.one_to_one)


def affinity_bytes(
    method: Matching,
    rows: int,
    columns: int,
    memory: int | None,
    itemsize: int = 4,
    whole: Callable[[int], int] = int,
) -> int:
    """Bytes of one affinity (rows, columns); 0 if the method reads none.

    Args:
        method: any matching.
        rows: locations of one image, S.
        columns: locations of the other image, T.
        memory: the memory budget in bytes; None for no limit.
        itemsize: bytes of an entry.
        whole: the smallest budget, from the bytes of the affinity.

    Raises:
        CostError: it exceeds the memory; the message names methods that need no affinity.
    """
    size = rows * columns * itemsize if method.needs_affinity else 0
    if memory is None or size <= memory:
        return size
    free, needed = free_memory(), max(whole(size), pair_bytes(method, rows, columns, itemsize))
    raised = f"raise memory= to at least {as_budget(whole(size))!r}, or "
    if free is not None and needed > free:
        raised = f"this machine has {format_bytes(free)} free; "
    raise CostError(
        f"one affinity of {rows} x {columns} locations takes {format_bytes(size)}, above the memory budget of "
        f"{format_bytes(memory)}; {raised}use a matching that needs no affinity: {', '.join(cheap_matchings())}"
    )


def require_machine(method: Matching, x: Sequence[int], y: Sequence[int], itemsize: int, device: torch.device) -> None:
    """Refuse pairs of which this machine or its device could not match a single one, before anything is computed.

    Args:
        method: any matching.
        x: shape (N, S, C) of the images in the rows.
        y: shape (M, T, C) of those in the columns.
        itemsize: bytes of a number.
        device: where affinities are computed.

    Raises:
        CostError: the message gives the bytes needed and free, and a method that fits.
    """
    require_room(method, x[1], y[1], x[2], itemsize)
    size = x[1] * y[1] * itemsize
    if device.type != "cuda" or not method.needs_affinity or size < _NEVER_TOO_LARGE:
        return
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + cached
    if size > free:
        raise CostError(
            f"one affinity of {x[1]} x {y[1]} locations takes {format_bytes(size)}, but {format_bytes(free)} are free "
            f"on {device}; use device='cpu', or a matching that needs no affinity: {', '.join(cheap_matchings())}"
        )


def _solvers(
    x: Side,
    y: Side,
    methods: Mapping[str, Matching],
    workload: Workload,
    block_memory: int | None,
    solved: BlockMemory | None,
) -> list[BlockSolver]:
    """Group methods that can share affinities: same solver (device or CPU) and same precision."""
    groups: dict[tuple[bool, str], dict[str, Matching]] = {}
    for label, method in methods.items():
        on_device = workload.on_device(method, x.tokens.device, x.tokens.dtype)
        groups.setdefault((on_device, method.precision), {})[label] = method
    return [BlockSolver.of(x, y, group, on_device, block_memory, solved) for (on_device, _), group in groups.items()]


def _one_ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """Fetch the next item before yielding the current one."""
    before = list(islice(items, 1))
    for item in items:
        yield before.pop()
        before.append(item)
    yield from before
