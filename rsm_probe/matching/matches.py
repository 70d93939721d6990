"""Single pairs of images, or a batch of affinities: which location answers to which."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rsm_probe.arrays import real_tensor, require_dense
from rsm_probe.errors import MatchingError
from rsm_probe.execution.devices import in_halves, require_memory
from rsm_probe.matching.bounds import dual_bound, sorted_norms_bound
from rsm_probe.matching.certificate import SUMS_DIFFER, bounds_above, identity_partners, rounding_of
from rsm_probe.matching.cpu_or_gpu import Workload
from rsm_probe.matching.matching import Locations, Matching, Pairs, Solution, TokensNeededError, solve_both_ways
from rsm_probe.matching.methods.translation import checked_grid
from rsm_probe.matching.registry import get_matching
from rsm_probe.matching.scaling import each_rescaled


@dataclass(frozen=True, eq=False)
class Match:
    """How the locations of one image answer to those of another.

    Attributes:
        permutation: shape (S,), for each location of the first image its partner in the second, -1 where it has none;
            None for scores, which pair nothing.
        value: sum of the affinities of matched locations, in float64: the matched inner product; of tokens, the
            affinities are computed in float64 as well.
        bound: a proven upper bound on the value of any matching, or None where there is none.
        solver: what really ran.
        status: "optimal" where no matching has a larger value (up to the certified gap), else "feasible".
        affinities: shape (S,), what each location adds to the value, NaN where it has no partner; None for scores.
    """

    permutation: np.ndarray | None
    value: float
    bound: float | None
    solver: str
    status: str
    affinities: np.ndarray | None = None

    @property
    def gap(self) -> float | None:
        """How far the value can be from the optimum at most; None where there is no bound."""
        return None if self.bound is None else self.bound - self.value


def match(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray,
    matching: str | Matching = "optimal",
    *,
    certify: bool = False,
    grid: tuple[int, ...] | None = None,
) -> Match:
    """Match the locations of two images by their concept vectors.

    Args:
        x: tokens (S, C).
        y: tokens (T, C). Affinities are computed in the tokens' own precision, at least float32.
        matching: a name or a method object.
        certify: prove how far the value is from the optimum at most, whatever the method: one blockwise pass over all
            affinities in float64, at a memory linear in S.
        grid: (H, W) of the locations, or one number for each axis they have, for methods that move along it.

    Returns:
        A `Match`. Its bound is the method's own where it gives one, else the product of the sorted norms.

    Raises:
        MatchingError: wrong shapes, NaN or infinity (the message gives the position), unknown method, a score to
            certify, a grid that is not known where one is needed.
        CostError: the method needs an affinity that does not fit into memory.
    """
    _, method = get_matching(matching)
    grid = None if grid is None else checked_grid(grid)
    left, right = _tokens(x, "x"), _tokens(y, "y")
    if left.shape[1] != right.shape[1]:
        raise MatchingError(
            f"x has {left.shape[1]} channels and y has {right.shape[1]}; only vectors of one layer can be matched"
        )
    dtype = torch.promote_types(left.dtype, right.dtype)
    (scaled_x, unit_x), (scaled_y, unit_y) = (each_rescaled(side.to(dtype)[None]) for side in (left, right))
    images = Locations(scaled_x, grid), Locations(scaled_y, grid)
    left, right, unit = scaled_x[0], scaled_y[0], float(unit_x[0]) * float(unit_y[0])
    prepared = method.prepare(images[0]), method.prepare(images[1])
    if method.precision != "float32":
        raise MatchingError(
            f"precision={method.precision!r} is for many pairs at once (rsm, all_pairs, nearest); a single pair is "
            f"matched in the tokens' own"
        )
    _require_room(method, len(left), len(right), dtype.itemsize)
    # Where the device is asked for by name, its solver says what it needs.
    stays = Workload(1, max(len(left), len(right))).on_device(method, left.device, dtype)
    affinity: Tensor | np.ndarray | None = (left @ right.T)[None] if method.needs_affinity else None
    if isinstance(affinity, Tensor) and not stays:
        affinity = affinity.numpy()
    pairs = Pairs(np.zeros(1, int), np.zeros(1, int), *images, affinity, prepared, stays)
    solution = solve_both_ways(method, pairs)
    answer = _answer(method, solution, 0, unit)
    if answer.permutation is None:
        if certify:
            raise MatchingError(f"{method.name} is a score, which pairs nothing: there is no matching to certify")
        return answer

    gap, permutation = answer.gap, answer.permutation
    answer = _in_float64(answer, left, right, unit)
    # What rounding can have moved inner products by: those of the method, and those in float64.
    scale = (left.shape[1] + 1) * float(images[0].image_norms[0] * images[1].image_norms[0]) * unit
    rounding, finest = (scale * torch.finfo(kind).eps / 2 for kind in (dtype, torch.float64))
    # If the affinity puts equal locations below the answer by more than rounding explains, float64 does not reverse it.
    near = affinity is None or not float(pairs.aligned_sums[0]) * unit + rounding + finest < answer.value
    if near and method.reaches_identity(len(left), len(right)):
        identity = replace(answer, permutation=identity_partners(len(left), len(right)))
        answer = max(answer, _in_float64(identity, left, right, unit), key=lambda candidate: candidate.value)
    bounds = []
    if answer.bound is not None and gap is not None:
        # Without a certificate, the gap that the method proved stays, wherever rounding has moved the value to.
        bounds.append(answer.bound + rounding if certify else max(answer.bound, answer.value + gap))
    if certify or not bounds:
        bounds.append(sorted_norms_bound(images[0], 0, images[1], 0) * unit)
    if certify:
        transposed = right.T.double()
        proven = dual_bound(
            lambda rows: (left[torch.from_numpy(rows)].double() @ transposed).numpy(), len(right), permutation
        )
        bounds.append(proven * unit + finest)
    return replace(answer, bound=_above(min(bounds), answer, SUMS_DIFFER * scale))


def match_affinity(
    affinity: Tensor | np.ndarray, matching: str | Matching = "optimal", *, certify: bool = False
) -> Match | list[Match]:
    """Match the rows to the columns of one affinity matrix, or of each in a batch.

    Args:
        affinity: shape (S, T) or (B, S, T), any real dtype; inner products of all pairs of locations.
        matching: a name or a method object, of a method that needs nothing but the affinity.
        certify: prove how far the value is from the optimum at most, whatever the method.

    Returns:
        One `Match` for a matrix, a list of B for a batch.

    Raises:
        MatchingError: another shape, NaN or infinity (the message gives the position), unknown method, or one that
            needs tokens.
        CostError: what the method needs beside the affinity does not fit into memory.
    """
    _, method = get_matching(matching)
    _require_room_to_convert(affinity)
    given = real_tensor(affinity, "affinity", MatchingError)
    if given.ndim not in (2, 3) or 0 in given.shape[-2:]:
        raise MatchingError(f"an affinity has shape (S, T) or (B, S, T) with S, T >= 1, found {tuple(given.shape)}")
    _require_finite(given, "affinity")
    batch = (given if given.ndim == 3 else given[None]).contiguous()
    if not len(batch):
        return []
    numbers = np.zeros(len(batch), int)
    _require_room(method, batch.shape[1], batch.shape[2], batch.element_size(), copies=0)
    stays = Workload(len(batch), max(batch.shape[1:])).on_device(method, batch.device, batch.dtype)
    try:
        pairs = Pairs(numbers, numbers, affinity=batch if stays else batch.cpu().numpy(), on_device=stays)
        parts = in_halves(lambda start, stop: solve_both_ways(method, pairs.part(start, stop)), len(batch))
        solution = Solution.joined(list(parts))
    except TokensNeededError:
        raise MatchingError(
            f"{method.name} needs the tokens of both images; use match(x, y, {method.name!r})"
        ) from None
    answers = [_answer(method, solution, k, 1.0) for k in range(len(batch))]
    if solution.permutations is None:
        if certify:
            raise MatchingError(f"{method.name} is a score, which pairs nothing: there is no matching to certify")
        return answers if given.ndim == 3 else answers[0]
    partners = torch.from_numpy(solution.permutations.astype(np.int64)).to(batch.device)
    each = batch.gather(2, partners.clamp(min=0)[:, :, None])[:, :, 0].cpu().double()
    given_each = torch.where(partners.cpu() >= 0, each, np.nan).numpy()
    for k in range(len(batch)):
        bound = answers[k].bound
        if certify:
            matrix, permutation = batch[k].cpu().numpy(), solution.permutations[k]
            proven = dual_bound(matrix.__getitem__, matrix.shape[1], permutation)
            proven = proven if bound is None else min(proven, bound)
            bound = _above(proven, answers[k], rounding_of(matrix, permutation))
        answers[k] = replace(answers[k], bound=bound, affinities=given_each[k])
    return answers if given.ndim == 3 else answers[0]


def _answer(method: Matching, solution: Solution, k: int, unit: float) -> Match:
    """What was found for one pair, in the unit of the tokens that were given."""
    permutation = None if solution.permutations is None else solution.permutations[k]
    bound = None if np.isnan(solution.bounds[k]) else float(solution.bounds[k]) * unit
    if not np.isfinite(solution.values[k]):
        raise MatchingError(f"affinities are too large: what they add up to is {solution.values[k]}; scale them down")
    status = "optimal" if method.exact else "feasible"
    return Match(permutation, float(solution.values[k]) * unit, bound, solution.solvers[k], status)


def _in_float64(answer: Match, x: Tensor, y: Tensor, unit: float) -> Match:
    """A matching of tokens (S, C) and (T, C) with its value as inner products in float64 add up to it."""
    assert answer.permutation is not None
    partners = torch.from_numpy(np.maximum(answer.permutation, 0))
    each = (x.double() * y[partners].double()).sum(dim=1).numpy() * unit
    unmatched = answer.permutation < 0
    each[unmatched] = 0.0
    value = float(each.sum())
    each[unmatched] = np.nan
    return replace(answer, value=value, affinities=each)


def _above(bound: float, answer: Match, rounding: float) -> float:
    """A bound, raised to the value where only rounding put it below."""
    return float(bounds_above(np.array([bound]), np.array([answer.value]), lambda _: rounding, answer.solver)[0])


def _require_room(method: Matching, rows: int, columns: int, itemsize: int, copies: int = 1) -> None:
    """Refuse a pair whose affinity does not fit into memory, for methods that need one.

    Args:
        method: any matching.
        rows: locations S of one image.
        columns: locations T of the other.
        itemsize: bytes of an entry.
        copies: of the affinity that are still to be made; 0 where it is there.

    Raises:
        CostError: the message says what it takes, what is free, and which method needs no affinity.
    """
    if not method.needs_affinity:
        return
    entries = rows * columns
    # The other side of an asymmetric method reads a copy.
    size = entries * itemsize * (copies + (not method.symmetric)) + method.scratch_bytes(rows, columns, itemsize)
    require_memory(
        size,
        f"matching {rows} x {columns} locations by {method.name!r}, which needs their affinity,",
        "match(x, y, 'rewindowed') takes the tokens of two images and needs no affinity",
    )


def _require_room_to_convert(affinity: Tensor | np.ndarray) -> None:
    """Refuse what would not fit into memory in the precision, and the order, in which it can be computed with."""
    if isinstance(affinity, Tensor):
        require_dense(affinity, "affinity", MatchingError)
        contiguous = affinity.is_contiguous()
    elif isinstance(affinity, np.ndarray):
        contiguous = affinity.flags.c_contiguous
    else:
        return
    if not (contiguous and affinity.dtype in (torch.float32, torch.float64, np.float32, np.float64)):
        require_memory(
            max(4, affinity.dtype.itemsize) * math.prod(affinity.shape),
            f"a copy of the affinity of shape {tuple(affinity.shape)}",
            "give a contiguous one in float32 or float64, or match(x, y, 'rewindowed') the tokens, which needs none",
        )


def _tokens(values: Tensor | np.ndarray, name: str) -> Tensor:
    matrix = real_tensor(values, name, MatchingError).cpu()
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise MatchingError(f"{name} must hold tokens (S, C) of one image, found shape {tuple(matrix.shape)}")
    _require_finite(matrix, name)
    return matrix


def _require_finite(values: Tensor, name: str) -> None:
    # A finite sum has finite terms: one cheap pass, where finding the position takes several.
    if torch.isfinite(values.sum()):
        return
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        position = ", ".join(map(str, bad[0].tolist()))
        value = values[tuple(bad[0])].item()
        raise MatchingError(f"{name}[{position}] is {value}; only finite values can be matched")
