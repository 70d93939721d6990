"""Batches of affinities on a device: prepare them for the Triton program, and collect its results."""

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

# The state of a larger problem would not fit into the registers of one program.
LARGEST = 4096
# Columns per warp: 16 registers each for affinities, prices and owners.
_COLUMNS_OF_A_WARP = 512
# Triton compiles a program at its first launch, and its interpreter runs one at a time; a launch takes microseconds.
_launching = threading.Lock()
_SMALLEST, _LARGEST = 1e-15, 1e15


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether the Triton program runs on a device; tested once, with a tiny problem.

    Devices that PyTorch calls "cuda" can run it if Triton is installed (it comes with PyTorch on Linux) and the system
    has the tools that Triton compiles with. If they fail, a warning gives the reason, and CPU threads match instead.
    """
    if device.type != "cuda" or not torch.cuda.is_available() or find_spec("triton") is None:
        return False
    from triton.errors import TritonError

    try:
        *_, certified, _ = solve_on_device(torch.eye(4, device=device)[None], np.zeros(1), 1e-3, 1000)
    except (RuntimeError, OSError, SubprocessError, TritonError) as problem:
        warnings.warn(f"CPU threads match, since the Triton program does not run on {device}: {problem}", stacklevel=2)
        return False
    return bool(certified.all())


def solve_on_device(affinities: Tensor, scales: np.ndarray, gap: float, bids_per_row: int) -> tuple[np.ndarray, ...]:
    """Solve a batch of assignments on the device that holds the affinities, one program per pair.

    Args:
        affinities: (B, S, T) float32, finite, S and T at most `LARGEST`.
        scales: scale of the gap, (B,); 0 for the Frobenius norm of the affinity.
        gap: allowed difference between bound and value, relative to the scale.
        bids_per_row: bids per row after which to give up.

    Returns:
        Permutations (B, S), -1 for unmatched rows; values (B,), -infinity if the bids ran out; upper bounds (B,), which
        are always valid; whether the gap was reached (B,); bids (B,). Affinities whose squares leave the range of
        float32 are not solved: their value is -infinity and their bound infinity.

    Raises:
        MatchingError: the affinities are in main memory, and Triton's interpreter is off.
    """
    # Lazy: importing Triton takes a second, and machines without a GPU may lack it.
    from rsm_probe.matching.compiled.gpu_auction import interpreted, solve_pairs

    if affinities.device.type == "cpu" and not interpreted:
        raise MatchingError("the device is to solve the pairs, but the affinities are on the CPU")
    count, rows, columns = affinities.shape
    size, device = max(rows, columns), affinities.device
    square = affinities.contiguous()
    if rows != columns:  # pad the smaller side with zero vectors
        square = functional.pad(affinities, (0, size - columns, 0, size - rows))
    # Beyond this range, squares and differences overflow or lose precision in float32.
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
    most_bids = min(bids_per_row, (2**31 - 1) // size)  # the program counts in 32 bits
    with _launching, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        solve_pairs[(count,)](
            square, known, order, aside, counts, permutations, values, bounds, bids,
            size, 0 if len(order) == 1 else size, gap, most_bids,
            BLOCK=block, num_warps=warps_of(size), enable_fp_fusion=False,
        )  # fmt: skip
    # Unsolvable affinities were replaced by zeros, so their values and bounds are meaningless.
    values.masked_fill_(~solvable, -torch.inf)
    bounds.masked_fill_(~solvable, torch.inf)
    partners = permutations[:, :rows]
    partners = torch.where(partners < columns, partners, -1).to(torch.int16)
    certified = (bounds - values <= gap * torch.maximum(known, values.abs())) & values.isfinite()
    rest = (part.cpu().numpy() for part in (values, bounds, certified, bids))
    return partners.cpu().numpy().astype(np.int64), *rest


def warps_of(locations: int) -> int:
    """Number of warps of the program that solves one affinity with this many locations, a power of two."""
    return max(1, _block_of(locations) // _COLUMNS_OF_A_WARP)


def _block_of(locations: int) -> int:
    """Number of columns of a program, a power of two."""
    return max(16, 1 << (locations - 1).bit_length())


def live_lines(square: Tensor, least: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Select the rows and columns to match; if nothing is negative, those of zeros (dead ones) are set aside.

    Dead locations can be matched with each other without loss; see `cpu_auction`.

    Args:
        square: affinities, (B, n, n).
        least: the smallest entry of each affinity, (B,).

    Returns:
        The row orders (B or 1, n), rows to be matched first; 1 for columns set aside (B or 1, n); the number of rows to
        be matched (B,); permutations (B, n), in which the rows set aside have partners already.
    """
    count, size, device = len(square), square.shape[1], square.device
    numbers = torch.arange(size, dtype=torch.int32, device=device)
    everything = torch.full((count,), size, dtype=torch.int32, device=device)
    # Most affinities have negative entries, and nothing is set aside.
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
