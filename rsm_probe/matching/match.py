"""Single pairs of images, or a batch of affinities: which location answers to which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rsm_probe.arrays import real_tensor
from rsm_probe.devices import in_halves
from rsm_probe.errors import MatchingError
from rsm_probe.matching.bounds import dual_bound, sorted_norms_bound
from rsm_probe.matching.inputs import rescaled
from rsm_probe.matching.protocol import Locations, Matching, Pairs, Solution, TokensNeededError, solve_both_ways
from rsm_probe.matching.registry import get_matching


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
    grid: tuple[int, int] | None = None,
) -> Match:
    """Matches the locations of two images by their concept vectors.

    Args:
        x: tokens (S, C).
        y: tokens (T, C). Affinities are computed in the tokens' own precision, at least float32.
        matching: a name or a method object.
        certify: prove how far the value is from the optimum at most, whatever the method: one blockwise pass over all
            affinities in float64, at a memory linear in S.
        grid: (H, W) of the locations, for methods that move along it.

    Returns:
        A `Match`. Its bound is the method's own where it gives one, else the product of the sorted norms.

    Raises:
        MatchingError: wrong shapes, NaN or infinity (the message gives the position), unknown method, a score to
            certify.
    """
    _, method = get_matching(matching)
    left, right = _tokens(x, "x"), _tokens(y, "y")
    if left.shape[1] != right.shape[1]:
        raise MatchingError(
            f"x has {left.shape[1]} channels and y has {right.shape[1]}; only vectors of one layer can be matched"
        )
    dtype = torch.promote_types(left.dtype, right.dtype)
    (left, unit_x), (right, unit_y) = rescaled(left.to(dtype)), rescaled(right.to(dtype))
    images = Locations(left[None], grid), Locations(right[None], grid)
    for side in images:
        method.prepare(side)
    if method.precision != "float32":
        raise MatchingError(
            f"precision={method.precision!r} is for many pairs at once (rsm, all_pairs, nearest); a single pair is "
            f"matched in the tokens' own"
        )
    # Asked for by name, the device's kernel says what it needs.
    stays = method.on_device(left.device, dtype, max(len(left), len(right)), 1)
    affinity: Tensor | np.ndarray | None = (left @ right.T)[None] if method.needs_affinity else None
    if isinstance(affinity, Tensor) and not stays:
        affinity = affinity.numpy()
    solution = solve_both_ways(method, Pairs(np.zeros(1, int), np.zeros(1, int), *images, affinity))
    answer = _answer(method, solution, 0, unit_x * unit_y)
    if answer.permutation is None:
        if certify:
            raise MatchingError(f"{method.name} is a score, which pairs nothing: there is no matching to certify")
        return answer

    def rows_of(rows: np.ndarray) -> np.ndarray:
        return (left[torch.from_numpy(rows)].double() @ right.T.double()).numpy()

    partners = torch.from_numpy(np.maximum(answer.permutation, 0))
    each = (left.double() * right[partners].double()).sum(dim=1).numpy() * unit_x * unit_y
    each = np.where(answer.permutation >= 0, each, np.nan)
    answer = replace(answer, value=float(np.nansum(each)), affinities=each)
    bound = answer.bound
    if certify:
        # The method's own bound is one of inner products that were rounded, in whatever order they were added up.
        scale = float(images[0].image_norms[0] * images[1].image_norms[0]) * unit_x * unit_y
        rounding = left.shape[1] * torch.finfo(dtype).eps / 2 * scale
        own = None if bound is None else bound + rounding
        bound = _certified(replace(answer, bound=own), rows_of, len(right), unit_x * unit_y)
    elif bound is None:
        bound = sorted_norms_bound(images[0], 0, images[1], 0) * unit_x * unit_y
    # Rounding may leave the value of an optimal matching a digit above the bound.
    return replace(answer, bound=max(bound, answer.value))


def match_affinity(
    affinity: Tensor | np.ndarray, matching: str | Matching = "optimal", *, certify: bool = False
) -> Match | list[Match]:
    """Matches the rows to the columns of one affinity matrix, or of each in a batch.

    Args:
        affinity: shape (S, T) or (B, S, T), any real dtype; inner products of all pairs of locations.
        matching: a name or a method object, of a method that needs nothing but the affinity.
        certify: prove how far the value is from the optimum at most, whatever the method.

    Returns:
        One `Match` for a matrix, a list of B for a batch.

    Raises:
        MatchingError: another shape, NaN or infinity (the message gives the position), unknown method, or one that
            needs tokens.
    """
    _, method = get_matching(matching)
    given = real_tensor(affinity, "affinity", MatchingError)
    if given.ndim not in (2, 3) or 0 in given.shape[-2:]:
        raise MatchingError(f"an affinity has shape (S, T) or (B, S, T) with S, T >= 1, found {tuple(given.shape)}")
    _require_finite(given, "affinity")
    batch = (given if given.ndim == 3 else given[None]).contiguous()
    if not len(batch):
        return []
    numbers = np.zeros(len(batch), int)
    stays = method.on_device(batch.device, batch.dtype, max(batch.shape[1:]), len(batch))
    try:
        pairs = Pairs(numbers, numbers, affinity=batch if stays else batch.cpu().numpy())
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
            matrix = batch[k].cpu().numpy()
            bound = _certified(answers[k], matrix.__getitem__, matrix.shape[1], 1.0)
        answers[k] = replace(answers[k], bound=bound, affinities=given_each[k])
    return answers if given.ndim == 3 else answers[0]


def _answer(method: Matching, solution: Solution, k: int, unit: float) -> Match:
    """What was found for one pair, in the unit of the tokens that were given."""
    permutation = None if solution.permutations is None else solution.permutations[k]
    # A bound can lie below the value by what rounding leaves of two sums that are equal.
    bound = None if np.isnan(solution.bounds[k]) else float(max(solution.bounds[k], solution.values[k])) * unit
    if not np.isfinite(solution.values[k]):
        raise MatchingError(f"affinities are too large: what they add up to is {solution.values[k]}; scale them down")
    status = "optimal" if method.exact else "feasible"
    return Match(permutation, float(solution.values[k]) * unit, bound, solution.solvers[k], status)


def _certified(answer: Match, rows_of: Callable[[np.ndarray], np.ndarray], columns: int, unit: float) -> float:
    """The bound of a blockwise dual pass, or the method's own where that is lower."""
    assert answer.permutation is not None
    bound = max(dual_bound(rows_of, columns, answer.permutation) * unit, answer.value)
    return bound if answer.bound is None else min(bound, answer.bound)


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
