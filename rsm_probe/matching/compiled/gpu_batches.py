"""Batches of affinities on a device: which are solved there, and what the kernel needs to know of them."""

from __future__ import annotations

import threading
import warnings
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from subprocess import SubprocessError

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rsm_probe.errors import MatchingError

# A row of a larger affinity, and what is known of its columns, would not fit into the registers of a program.
LARGEST = 4096
# Columns of one warp: 16 registers for each of affinities, prices and owners.
_COLUMNS_OF_A_WARP = 512
# Triton compiles a kernel when it is first launched, and interprets one at a time; a launch itself takes microseconds.
_launching = threading.Lock()
_SMALLEST, _LARGEST = 1e-15, 1e15


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether the kernel runs on a device; found out once, by a tiny problem.

    There is one for devices that PyTorch calls "cuda", by Triton, which comes with PyTorch for Linux, and compiles it
    with the tools of the system: where these are missing, it is said why, and CPU threads match.
    """
    if device.type != "cuda" or not torch.cuda.is_available() or find_spec("triton") is None:
        return False
    from triton.errors import TritonError

    try:
        *_, certified, _ = solve_on_device(torch.eye(4, device=device)[None], np.zeros(1), 1e-3, 1000)
    except (RuntimeError, OSError, SubprocessError, TritonError) as problem:
        warnings.warn(f"CPU threads match in place of {device}, whose kernel does not run: {problem}", stacklevel=2)
        return False
    return bool(certified.all())


def solve_on_device(affinities: Tensor, scales: np.ndarray, gap: float, bids_per_row: int) -> tuple[np.ndarray, ...]:
    """Solves a batch of assignments on the device that holds the affinities, each by one program.

    Args:
        affinities: (B, S, T) float32, finite, with S and T at most `LARGEST`.
        scales: (B,), what the gap is relative to; 0 for the affinity's Frobenius norm.
        gap: allowed difference of bound and value, relative to the scale.
        bids_per_row: where to give up.

    Returns:
        Permutations (B, S), -1 where a row has no column; values (B,), -infinity where the bids ran out; upper bounds
        (B,), valid in any case; whether the gap was reached (B,); bids (B,). Of affinities beyond the kernel's range
        nothing is found: -infinity below infinity.

    Raises:
        MatchingError: the affinities are in main memory, and Triton does not interpret its kernels.
    """
    # Triton takes a second to load, and need not be there without a device.
    from rsm_probe.matching.compiled.gpu_auction import interpreted, solve_pairs

    if affinities.device.type == "cpu" and not interpreted:
        raise MatchingError("the device's kernel was asked for, and the affinities are on the CPU")
    count, rows, columns = affinities.shape
    size, device = max(rows, columns), affinities.device
    square = affinities.contiguous()
    if rows != columns:  # zero vectors fill up the smaller side
        square = functional.pad(affinities, (0, size - columns, 0, size - rows))
    # Squares and differences of others leave float32, or its normal numbers: they are not for the kernel.
    least = square.amin(dim=(1, 2))
    largest = torch.maximum(square.amax(dim=(1, 2)), -least)
    solvable = (largest == 0) | ((largest > _SMALLEST) & (largest < _LARGEST))
    if not bool(solvable.all()):
        square = torch.where(solvable[:, None, None], square, 0)
    known = torch.from_numpy(scales).to(device)
    if not scales.all():
        known = torch.where(known > 0, known, torch.linalg.vector_norm(square, dim=(1, 2)).double())
    order, aside, counts, permutations = live_lines(square, least)
    values, bounds = (torch.empty(count, dtype=torch.float64, device=device) for _ in range(2))
    bids = torch.empty(count, dtype=torch.int32, device=device)
    block = _block_of(size)
    most_bids = min(bids_per_row, (2**31 - 1) // size)  # the kernel counts in 32 bits
    with _launching, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        solve_pairs[(count,)](
            square, known, order, aside, counts, permutations, values, bounds, bids,
            size, 0 if len(order) == 1 else size, gap, most_bids,
            BLOCK=block, num_warps=warps_of(size), enable_fp_fusion=False,
        )  # fmt: skip
    # Those that are not for the kernel were replaced by zeros, of which values and bounds say nothing.
    values.masked_fill_(~solvable, -torch.inf)
    bounds.masked_fill_(~solvable, torch.inf)
    partners = permutations[:, :rows]
    partners = torch.where(partners < columns, partners, -1).to(torch.int16)
    certified = (bounds - values <= gap * torch.maximum(known, values.abs())) & values.isfinite()
    rest = (part.cpu().numpy() for part in (values, bounds, certified, bids))
    return partners.cpu().numpy().astype(np.int64), *rest


def warps_of(locations: int) -> int:
    """Warps of the program that solves one affinity of this many locations, a power of two."""
    return max(1, _block_of(locations) // _COLUMNS_OF_A_WARP)


def _block_of(locations: int) -> int:
    """The columns of a program: a power of two."""
    return max(16, 1 << (locations - 1).bit_length())


def live_lines(square: Tensor, least: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose the rows and columns to match; those of zeros are set aside where nothing is negative.

    Matching dead locations with each other then loses nothing; see the auction for CPUs.

    Args:
        square: (B, n, n), affinities.
        least: (B,), the least of each.

    Returns:
        Orders of rows (B or 1, n), those to be matched first; 1 for columns that are set aside (B or 1, n); how many
        are to be matched (B,); permutations (B, n), in which those that are set aside have their partners.
    """
    count, size, device = len(square), square.shape[1], square.device
    numbers = torch.arange(size, dtype=torch.int32, device=device)
    everything = torch.full((count,), size, dtype=torch.int32, device=device)
    # Most affinities have negative entries, and no more needs to be known of them.
    if not bool((least >= 0).any()):
        return numbers[None], torch.zeros_like(numbers)[None], everything, numbers.repeat(count, 1)
    dead = torch.stack([square.amax(dim=2), square.amax(dim=1)]) == 0
    dead &= (least >= 0)[:, None]
    order, column_order = dead.to(torch.uint8).argsort(dim=2, stable=True).to(torch.int32)
    counts = (size - dead.sum(dim=2)).amax(dim=0).to(torch.int32)
    last = numbers[None] >= counts[:, None]
    aside = torch.zeros_like(order).scatter_(1, column_order.long(), last.to(torch.int32))
    permutations = torch.empty_like(order).scatter_(1, order.long(), column_order)
    return order.contiguous(), aside, counts, permutations
