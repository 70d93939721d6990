"""The optimal matching by an auction with a certificate (paper, equation 4)."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from rsm_probe.checks import brief, require_whole
from rsm_probe.errors import MatchingError
from rsm_probe.execution.devices import require_memory
from rsm_probe.matching.certificate import matched_sums, prefer_identity
from rsm_probe.matching.compiled.gpu_batches import LARGEST, has_kernel, solve_on_device, warps_of
from rsm_probe.matching.matching import Locations, Matching, Pairs, Solution
from rsm_probe.matching.methods.library_solvers import ScipyAssignment

# The smallest gap that float64 can certify.
_FINEST_GAP = 1e-12
# With fewer warps, most of a device idles while CPU threads could solve the pairs. Estimated from instruction counts;
# benchmarks/gpu.py measures the break-even point.
_FEWEST_ON_DEVICE = 128
# Below this gap, float32 can certify hardly any pair, and nearly all would return to the CPU.
_FINEST_ON_DEVICE = 1e-7
# Pairs copied back to the CPU at a time.
_FINISHED_AT_ONCE = 64


@dataclass(frozen=True)
class Auction(Matching):
    """Exact assignment by an auction with epsilon scaling (Bertsekas, 1988), in the precision of the affinity.

    Every pair comes with an upper bound, the dual value of the auction in float64. If the bound stays further from the
    value than `gap` allows, because float32 prices are too coarse, the pair is finished in float64; if the bids run
    out, SciPy solves it. The solver of a pair is "auction", "auction-float64" or "scipy" accordingly.

    Batches whose affinities are on a device are solved there, many pairs at once ("auction-device"). Pairs that miss
    the gap are finished on the CPU.

    Attributes:
        gap: largest certified difference between bound and value, relative to the product of the image norms. If only
            the affinity is known, it is relative to its Frobenius norm or its value, whichever is larger.
        bids_per_row: bids per row after which the auction gives up; features of trained networks need 20 to 100.
        where: "auto" solves on the device that holds the affinities if it has a Triton program and the batch is large
            enough; "cpu" always solves on the CPU; "device" ignores the size of the batch. The device takes float32 and
            up to 4096 locations.
        precision: precision of the tokens that are multiplied, "float32" or "float16"; sums are float32 in either case.
            Half precision is faster on devices. It changes an affinity by at most 1e-3 of the norms, and a value, which
            depends on differences of two affinities, by at most 2e-3. Bounds account for that. See
            docs/explanation/gpu.md for measured changes.
    """

    gap: float = 1e-6
    bids_per_row: int = 2000
    where: Literal["auto", "cpu", "device"] = "auto"
    precision: Literal["float32", "float16"] = "float32"

    name: ClassVar[str] = "optimal"
    exact: ClassVar[bool] = True
    symmetric: ClassVar[bool] = True
    growth: ClassVar[float] = 2.2

    def __post_init__(self) -> None:
        if not (isinstance(self.gap, Real) and _FINEST_GAP <= self.gap < 1):
            raise MatchingError(f"gap must lie in [{_FINEST_GAP:g}, 1), found {brief(self.gap)}")
        require_whole(self.bids_per_row, "bids_per_row", 1, MatchingError)
        if not isinstance(self.where, str) or self.where not in ("auto", "cpu", "device"):
            raise MatchingError(f'where must be "auto", "cpu" or "device", found {brief(self.where)}')
        if not isinstance(self.precision, str) or self.precision not in ("float32", "float16"):
            raise MatchingError(f'precision must be "float32" or "float16", found {brief(self.precision)}')

    def __repr__(self) -> str:
        # Stores identify the method by this text. It omits `where`, so that a device can continue what a CPU began.
        half = "" if self.precision == "float32" else f", precision={self.precision!r}"
        return f"Auction(gap={self.gap!r}, bids_per_row={self.bids_per_row!r}{half})"

    def on_device(self, device: torch.device, dtype: torch.dtype, locations: int, pairs: int) -> bool:
        """Decide whether to solve a batch on the device that holds the tokens, so that its affinities stay there."""
        if not self._may_stay(dtype, locations):
            return False
        if self.where == "device":
            return device.type in ("cpu", "cuda")
        worth = self.gap >= _FINEST_ON_DEVICE and pairs * warps_of(locations) >= _FEWEST_ON_DEVICE
        return worth and has_kernel(device)

    def _may_stay(self, dtype: torch.dtype, locations: int) -> bool:
        return self.where != "cpu" and dtype == torch.float32 and locations <= LARGEST

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        """A square copy for the vector unit, needed unless the number of columns is a multiple of 64."""
        return max(rows, columns) ** 2 * itemsize

    def prepare(self, images: Locations) -> np.ndarray:
        """Compute the image norms (N,), to which the gap is relative."""
        return images.image_norms

    def solve(self, pairs: Pairs) -> Solution:
        """Match pairs; values and bounds refer to the affinities as given."""
        scales, given = pairs.scales(), pairs.affinity
        # Do not ask `on_device` again: the caller decided for the whole workload, not for this block.
        if isinstance(given, Tensor) and self._may_stay(given.dtype, max(given.shape[1:])):
            solution = self._solve_on_device(given, scales)
        else:
            solution = self._solve_on_cpu(pairs.affinities(), scales)
        assert solution.permutations is not None
        # The identity may beat a matching that is optimal only up to the gap.
        prefer_identity(pairs.aligned_sums, pairs.aligned_entries.shape[1], solution.permutations, solution.values)
        return solution

    def assign(self, affinities: Tensor | np.ndarray) -> np.ndarray:
        """Return the partners (B, S) for affinities (B, S, T) without tokens; see `solve`."""
        numbers = np.zeros(len(affinities), int)
        permutations = self.solve(Pairs(numbers, numbers, affinity=affinities)).permutations
        assert permutations is not None
        return permutations

    def _solve_on_device(self, affinities: Tensor, scales: np.ndarray) -> Solution:
        permutations, values, bounds, certified, _ = solve_on_device(affinities, scales, self.gap, self.bids_per_row)
        solvers = ["auction-device"] * len(values)
        left = np.flatnonzero(~certified)
        for missed in np.split(left, range(_FINISHED_AT_ONCE, len(left), _FINISHED_AT_ONCE)) if len(left) else ():
            rest = affinities[torch.from_numpy(missed).to(affinities.device)].cpu().numpy()
            finer = self._solve_on_cpu(rest, scales[missed])
            assert finer.permutations is not None
            values[missed], permutations[missed] = finer.values, finer.permutations
            bounds[missed] = np.minimum(bounds[missed], finer.bounds)
            for k, solver in zip(missed, finer.solvers, strict=True):
                solvers[k] = solver
        return Solution(values, permutations, bounds, solvers)

    def _solve_on_cpu(self, affinities: np.ndarray, scales: np.ndarray) -> Solution:
        results = auction(affinities, scales, self.gap, self.bids_per_row)
        permutations, values, bounds = results.permutations, results.values, results.bounds
        solvers = ["auction" if affinities.dtype == np.float32 else "auction-float64"] * len(affinities)
        for k in np.flatnonzero(~results.certified):
            alone, proven = slice(k, k + 1), False
            if affinities.dtype == np.float32:
                require_memory(
                    8 * (affinities[k].size + max(affinities[k].shape) ** 2),
                    "finishing in float64 what float32 cannot certify",
                    "use a larger gap, e.g. Auction(gap=1e-5), or match(x, y, 'rewindowed'), which needs no affinity",
                )
                finer = auction(affinities[alone].astype(np.float64), scales[alone], self.gap, self.bids_per_row)
                permutations[k], bounds[k] = finer.permutations[0], min(bounds[k], finer.bounds[0])
                solvers[k], proven = "auction-float64", bool(finer.certified[0])
            if not proven:
                solvers[k] = ScipyAssignment.name
                permutations[k] = ScipyAssignment().permutation(affinities[k])
            # Values of all solvers are summed in the same way.
            values[k] = matched_sums(affinities[alone], permutations[alone])[0]
        return Solution(values, permutations, bounds, solvers)


@dataclass(frozen=True, eq=False)
class Auctions:
    """Results of auctions over a batch of affinities.

    Attributes:
        permutations: (B, S), -1 for unmatched rows; undefined if the bids ran out.
        values: (B,), -inf if the bids ran out.
        bounds: upper bounds on the sums of exactly these affinities, (B,), float64; always valid.
        certified: whether the bound is within the requested gap of the value, (B,).
        bids: number of bids, (B,).
    """

    permutations: np.ndarray
    values: np.ndarray
    bounds: np.ndarray
    certified: np.ndarray
    bids: np.ndarray


def auction(affinities: np.ndarray, scales: np.ndarray, gap: float, bids_per_row: int = 2000) -> Auctions:
    """Solve a batch of assignments in the precision of the affinities.

    Args:
        affinities: (B, S, T), float32 or float64, finite.
        scales: scale of the gap, (B,). For 0, use the larger of the affinity's Frobenius norm and its value, neither
            of which exceeds |x||y|.
        gap: allowed difference between bound and value, relative to the scale.
        bids_per_row: bids per row after which to give up.
    """
    # Lazy: importing Numba takes seconds.
    from rsm_probe.matching.compiled.cpu_auction import CERTIFIED, solve_batch

    count, rows, _ = affinities.shape
    scales = np.asarray(scales, np.float64)
    affinities, units = _within_range(np.ascontiguousarray(affinities), scales)
    permutations = np.empty((count, rows), np.int64)
    values, bounds = np.empty(count), np.empty(count)
    outcomes, bids = np.empty(count, np.int64), np.empty(count, np.int64)
    solve_batch(affinities, scales / units, gap, bids_per_row, permutations, values, bounds, outcomes, bids)
    # Rescaling may have underflowed small entries; each loses less than the smallest subnormal number.
    lost = np.where(units == 1, 0.0, max(affinities.shape[1:]) * float(np.finfo(affinities.dtype).smallest_subnormal))
    return Auctions(permutations, values * units, (bounds + lost) * units, outcomes == CERTIFIED, bids)


def _within_range(affinities: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rescale affinities so that squares and differences stay finite and normal; units are powers of two."""
    low, high = (1e-15, 1e25) if affinities.dtype == np.float32 else (1e-140, 1e140)
    units = np.ones(len(affinities))
    if scales.size and low < scales.min() and scales.max() < high:
        return affinities, units  # no affinity exceeds its scale
    axes = (1, 2)
    largest = np.maximum(affinities.max(axis=axes, initial=0.0), -affinities.min(axis=axes, initial=0.0))
    outside = (largest > 0) & ((largest < low) | (largest > high))
    if not outside.any():
        return affinities, units
    units[outside] = 2.0 ** np.minimum(np.frexp(largest[outside].astype(np.float64))[1], 1023)
    return (affinities / units[:, None, None]).astype(affinities.dtype), units
