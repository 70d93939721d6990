"""Matching of single image pairs and of batches of affinities."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rsm_probe.arrays import real_tensor, require_dense
from rsm_probe.errors import MatchingError
from rsm_probe.execution.devices import in_halves, require_memory
from rsm_probe.html_table import html_table
from rsm_probe.matching.bounds import dual_bound, sorted_norms_bound
from rsm_probe.matching.certificate import SUMS_DIFFER, bounds_above, identity_partners, rounding_of
from rsm_probe.matching.cpu_or_gpu import Workload
from rsm_probe.matching.demand import demanded_bytes, pair_seconds, remark, require_room
from rsm_probe.matching.matching import Locations, Matching, Pairs, Solution, TokensNeededError, solve_both_ways
from rsm_probe.matching.methods.translation import checked_grid
from rsm_probe.matching.registry import get_matching
from rsm_probe.matching.scaling import each_rescaled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Entries of affinities that no method takes long to match; timing a part of larger ones costs a hundredth.
_ALWAYS_SHORT = 6144**2


@dataclass(frozen=True, eq=False)
class Match:
    """The matching of two images.

    Attributes:
        permutation: for each location of the first image its partner in the second, (S,), -1 for unmatched locations;
            None for scores, which do not pair locations.
        value: the matched inner product: the sum of the matched affinities, in float64. Given tokens, the affinities
            themselves are computed in float64, too.
        bound: a proven upper bound on the value of any matching, or None if there is none.
        solver: the solver that ran.
        status: "optimal" if no matching has a larger value (up to the certified gap), otherwise "feasible".
        affinities: what each location adds to the value, (S,), NaN for unmatched locations; None for scores.
        locations: numbers of locations of both images, (S, T).
    """

    permutation: np.ndarray | None
    value: float
    bound: float | None
    solver: str
    status: str
    affinities: np.ndarray | None = None
    locations: tuple[int, int] | None = None

    def __repr__(self) -> str:
        bound = "no bound" if self.bound is None else f"bound {self.bound:.7g}"
        if self.permutation is None:
            pairs = "pairs no locations"
        else:
            pairs = f"{int((self.permutation >= 0).sum())} of {len(self.permutation)} locations matched"
        return f"Match(value {self.value:.7g}, {bound}, {self.status} by {self.solver}, {pairs})"

    def _repr_html_(self) -> str:
        """Tabulate the pairs of locations of the largest affinities, for notebooks."""
        bound = None if self.bound is None else f"{self.bound:.7g}"
        facts = {"value": f"{self.value:.7g}", "bound": bound, "status": self.status, "solver": self.solver}
        if self.permutation is None or self.affinities is None:
            return html_table("Match", facts, note="It is a score, which pairs no locations.")
        matched = np.flatnonzero(self.permutation >= 0)
        stay = int((self.permutation == np.arange(len(self.permutation))).sum())
        strongest = matched[np.argsort(-self.affinities[matched], kind="stable")]
        rows = ((int(k), int(self.permutation[k]), float(self.affinities[k])) for k in strongest)
        note = f"{stay:,} of {len(matched):,} matched locations have the same number in both images."
        columns = ["location in the first image", "in the second", "affinity"]
        return html_table("Match", facts, columns, rows, count=len(matched), note=note)

    def plot(
        self,
        image_a: Any,
        image_b: Any,
        ax: Axes | None = None,
        *,
        grids: tuple[tuple[int, int], tuple[int, int]] | None = None,
        most: int = 60,
    ) -> Axes:
        """Draw two images side by side, with lines between the matched locations of the largest affinities.

        Args:
            image_a: the first image, as `rsm_probe.figures.displayed` takes it.
            image_b: the second image.
            ax: Axes to draw on; by default those of a new figure.
            grids: (H, W) of the locations of each image; by default the grid whose cells are most nearly square.
            most: maximal number of lines.

        Raises:
            MatchingError: the match is a score, or no grid of the locations has nearly square cells.
            ComparisonError: `grids` do not fit the match, or `most` is negative.
            ImageError: an image cannot be shown.
        """
        from rsm_probe.figures import displayed, matched_locations
        from rsm_probe.figures.style import axes_or_new

        if self.permutation is None or self.affinities is None:
            raise MatchingError(f"{self.solver} is a score and pairs no locations, so there is nothing to join")
        pictures = displayed(image_a), displayed(image_b)
        if grids is None:
            counts = self.locations or (len(self.permutation), len(self.permutation))
            first, second = (_square_cells(n, *image.shape[:2]) for n, image in zip(counts, pictures, strict=True))
            grids = first, second
        return matched_locations(axes_or_new(ax), pictures, grids, self.permutation, self.affinities, most)

    @property
    def gap(self) -> float | None:
        """An upper bound on the distance to the optimum; None without a bound."""
        return None if self.bound is None else self.bound - self.value

    @property
    def share(self) -> float | None:
        """The proven share of the optimum, value / bound: no matching is more than 1 / share times as good.

        None without a bound, or if the bound is not positive. Give `certify=True` for a tight bound.
        """
        return None if self.bound is None or self.bound <= 0 else self.value / self.bound


def _square_cells(count: int, height: int, width: int) -> tuple[int, int]:
    """The grid of some locations on an image whose cells are most nearly square.

    Raises:
        MatchingError: its cells are more than half as long again as they are wide, so the image has another grid.
    """
    shapes = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    elongation = {(rows, columns): abs(math.log(height * columns / (rows * width))) for rows, columns in shapes}
    best = min(shapes, key=elongation.__getitem__)
    if elongation[best] > math.log(1.5):
        raise MatchingError(
            f"{count} locations form no grid of nearly square cells on an image of {height} x {width} pixels; give "
            f"grids=((H, W), (H, W))"
        )
    return best


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
        y: tokens (T, C). Affinities are computed in the precision of the tokens, but at least in float32.
        matching: a name or a method object.
        certify: compute a dual bound, whatever the method. This takes one blockwise pass over all affinities in
            float64, and memory linear in S.
        grid: (H, W) of the locations, or their number along each axis, for methods that shift images along a grid.

    Returns:
        A `Match`. Its bound is that of the method if it gives one, otherwise the inner product of the sorted norms.

    Example:
        >>> import torch, rsm_probe
        >>> y = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))    # 16 locations, 8 channels
        >>> x = y.roll(3, dims=0)                                                 # the same, three locations further
        >>> best = rsm_probe.match(x, y)
        >>> torch.equal(y[best.permutation], x)
        True
        >>> best.status
        'optimal'

    Raises:
        MatchingError: wrong shapes, NaN or infinity (the message gives the position), an unknown method, a score
            together with `certify`, or a grid that is needed but unknown.
        CostError: the method needs an affinity that does not fit into memory; the message names a method that fits.

    Warns:
        UserWarning: the pair takes more than a minute or some GB of memory; said before it starts, with both.
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
            f"precision={method.precision!r} applies to batches of pairs (rsm, all_pairs, nearest); a single pair is "
            f"matched in the precision of its tokens"
        )
    require_room(method, len(left), len(right), left.shape[1], dtype.itemsize)
    # If the user insists on a device that cannot solve the pair, the device's solver raises the error.
    stays = Workload(1, max(len(left), len(right))).on_device(method, left.device, dtype)
    _announce(method, *images, stays)
    affinity: Tensor | np.ndarray | None = (left @ right.T)[None] if method.needs_affinity else None
    if isinstance(affinity, Tensor) and not stays:
        affinity = affinity.numpy()
    pairs = Pairs(np.zeros(1, int), np.zeros(1, int), *images, affinity, prepared, stays)
    solution = solve_both_ways(method, pairs)
    answer = _answer(method, solution, 0, unit, certify, (len(left), len(right)))
    if answer.permutation is None:
        return answer

    gap, permutation = answer.gap, answer.permutation
    answer = _in_float64(answer, left, right, unit)
    # Rounding error of the inner products: those that the method computed, and those in float64.
    scale = (left.shape[1] + 1) * float(images[0].image_norms[0] * images[1].image_norms[0]) * unit
    rounding, finest = (scale * torch.finfo(kind).eps / 2 for kind in (dtype, torch.float64))
    # Skip the identity if it loses by more than rounding: float64 cannot reverse that.
    near = affinity is None or not float(pairs.aligned_sums[0]) * unit + rounding + finest < answer.value
    if near and method.reaches_identity(len(left), len(right)):
        identity = replace(answer, permutation=identity_partners(len(left), len(right)))
        answer = max(answer, _in_float64(identity, left, right, unit), key=lambda candidate: candidate.value)
    bounds = []
    if answer.bound is not None and gap is not None:
        # Without `certify`, keep the gap that the method proved, however rounding moved the value.
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
    """Match the rows to the columns of one affinity matrix, or of each matrix in a batch.

    Args:
        affinity: inner products of all pairs of locations, (S, T) or (B, S, T), any real dtype.
        matching: a name or a method object; the method must not need tokens.
        certify: compute a dual bound, whatever the method.

    Returns:
        One `Match` for a matrix, a list of B for a batch.

    Example:
        >>> import numpy as np, rsm_probe
        >>> best = rsm_probe.match_affinity(np.array([[1.0, 5.0], [2.0, 4.0]]))
        >>> best.permutation.tolist(), float(best.value)    # 5 + 2 is more than 1 + 4
        ([1, 0], 7.0)

    Raises:
        MatchingError: wrong shape, NaN or infinity (the message gives the position), an unknown method, or one that
            needs tokens.
        CostError: the scratch memory of the method does not fit.
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
    require_room(method, batch.shape[1], batch.shape[2], 0, batch.element_size(), copies=0)
    stays = Workload(len(batch), max(batch.shape[1:])).on_device(method, batch.device, batch.dtype)
    try:
        pairs = Pairs(numbers, numbers, affinity=batch if stays else batch.cpu().numpy(), on_device=stays)
        parts = in_halves(lambda start, stop: solve_both_ways(method, pairs.part(start, stop)), len(batch))
        solution = Solution.joined(list(parts))
    except TokensNeededError:
        raise MatchingError(
            f"{method.name} needs the tokens of both images; use match(x, y, {method.name!r})"
        ) from None
    locations = batch.shape[1], batch.shape[2]
    answers = [_answer(method, solution, k, 1.0, certify, locations) for k in range(len(batch))]
    if solution.permutations is None:
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


def _answer(
    method: Matching, solution: Solution, k: int, unit: float, certify: bool, locations: tuple[int, int]
) -> Match:
    """The match of pair k, in the unit of the original tokens."""
    if certify and solution.permutations is None:
        raise MatchingError(f"{method.name} is a score and pairs no locations, so there is nothing to certify")
    permutation = None if solution.permutations is None else solution.permutations[k]
    bound = None if np.isnan(solution.bounds[k]) else float(solution.bounds[k]) * unit
    if not np.isfinite(solution.values[k]):
        raise MatchingError(f"affinities are too large: their sum is {solution.values[k]}; scale them down")
    status = "optimal" if method.exact else "feasible"
    value = float(solution.values[k]) * unit
    return Match(permutation, value, bound, solution.solvers[k], status, locations=locations)


def _in_float64(answer: Match, x: Tensor, y: Tensor, unit: float) -> Match:
    """Recompute the affinities and the value of a match of tokens (S, C) and (T, C) in float64."""
    assert answer.permutation is not None
    partners = torch.from_numpy(np.maximum(answer.permutation, 0))
    each = (x.double() * y[partners].double()).sum(dim=1).numpy() * unit
    unmatched = answer.permutation < 0
    each[unmatched] = 0.0
    value = float(each.sum())
    each[unmatched] = np.nan
    return replace(answer, value=value, affinities=each)


def _above(bound: float, answer: Match, rounding: float) -> float:
    """Raise a bound to the value if rounding alone put it below."""
    return float(bounds_above(np.array([bound]), np.array([answer.value]), lambda _: rounding, answer.solver)[0])


def _announce(method: Matching, x: Locations, y: Locations, on_device: bool) -> None:
    """Warn of a pair that takes minutes or many GB, before it starts."""
    rows, columns = x.count, y.count
    if rows * columns < _ALWAYS_SHORT:
        return
    needed = demanded_bytes(method, rows, columns, x.tokens.shape[2], x.tokens.element_size())
    linear = "" if method.growth <= 1 else "; the time of matching='rewindowed' is linear in the locations"
    text = remark(
        f"matching {rows} x {columns} locations by {method.name!r}",
        pair_seconds(method, x, y, on_device),
        needed,
        linear,
    )
    if text is not None:
        warnings.warn(text, stacklevel=3)


def _require_room_to_convert(affinity: Tensor | np.ndarray) -> None:
    """Refuse an affinity whose copy in a supported dtype and memory order would not fit into memory."""
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
            "give a contiguous affinity in float32 or float64, or use match(x, y, 'rewindowed'), which needs none",
        )


def _tokens(values: Tensor | np.ndarray, name: str) -> Tensor:
    matrix = real_tensor(values, name, MatchingError).cpu()
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise MatchingError(f"{name} must hold tokens (S, C) of one image, found shape {tuple(matrix.shape)}")
    _require_finite(matrix, name)
    return matrix


def _require_finite(values: Tensor, name: str) -> None:
    # A finite sum implies finite terms: one cheap pass. Only locating a bad entry takes several.
    if torch.isfinite(values.sum()):
        return
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        position = ", ".join(map(str, bad[0].tolist()))
        value = values[tuple(bad[0])].item()
        raise MatchingError(f"{name}[{position}] is {value}; only finite values can be matched")
