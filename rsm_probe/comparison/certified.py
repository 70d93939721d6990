"""Intervals that contain the CKA of exact matching, from upper bounds of matched inner products.

An approximate matching leaves the exact product of every pair of images between the value it reached and an upper
bound, and kernels increase with the product. So every entry of the RSM `K` of exact matching lies between an entry of
the RSM `V` of the values and one of the RSM `U` of the bounds: `K = M + D` with `M = (V + U) / 2` and `|D| <= H`,
`H = (U - V) / 2`.

Both estimators of HSIC (Gretton et al. 2005; Song et al. 2012) are inner products of RSMs after an orthogonal
projection `P` that centres them, over all mini-batches together. CKA is therefore the cosine between `P K` and `P L`,
which lies in [-1, 1]. (It lies in [0, 1] by the biased estimator if both RSMs are positive semi-definite, which exact
matching does not ensure.) Let `m`, `n` be `P M`, `P N` at unit length, `c = <m, n>`, `a = |H| / |P M|`, and `b` alike.

CKA is at least `t` where `<P K, P L> - t |P K| |P L| >= 0`. Insert `P K = P M + P D`. With
`2 |P K| |P L| <= |P K|^2 |P N| / |P M| + |P L|^2 |P M| / |P N|`, what is left, divided by `|P M| |P N|`, is at least

    c - t - s(K, L, t) - s(L, K, t) - a b - |t| (a^2 + b^2) / 2,    s(K, L, t) = <H, |n - t m|> / |P M|.

CKA is at most `t` where the same holds with `t - c` for `c - t`: there, `|P K| >= <P K, m>` bounds the norms from
below. `s` is bounded by Cauchy-Schwarz, `<H, |x|>^2 <= <H, 1> <H, x^2>` or `<H, H> <x, x>`, whose terms are matrix
products over all RSMs at once. To first order in `H`, a sum of absolute values in place of these roots would be exact.
The width so falls with `sqrt(1 - c^2)`: RSMs that are alike are changed alike.

Source: this project.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rsm_probe.comparison.alignment import Estimator
from rsm_probe.comparison.inputs import CONSTANT

# Rounding of one operation in float64.
_ROUNDING = 2.0**-53
# The exponent of an RSM that was 0 so far: below that of any number.
_NOTHING = -1100
# Halvings of [-1, 1] until the end of an interval is known to 1e-13.
_HALVINGS = 44
# RSMs -> lowest and highest values of their entries, (R, N, N) each.
Boxes = Callable[[slice], tuple[np.ndarray, np.ndarray]]


class CertifiedSums:
    """Sums over mini-batches, from which intervals for CKA between all RSMs follow; see the module.

    Args:
        estimator: estimator of HSIC.
    """

    def __init__(self, estimator: Estimator) -> None:
        self._estimator = estimator
        self._sums: dict[str, np.ndarray] = {}

    def add(self, boxes: Boxes, blocks: Sequence[slice], images: int) -> None:
        """Add a mini-batch.

        Args:
            boxes: returns the lowest and the highest entries of a slice of the RSMs, symmetric. They are equal where
                the matching is not an approximation, and the highest are infinite where nothing is known. It is called
                several times where there are several blocks.
            blocks: slices of the RSMs, of which two are compared at a time.
            images: number of images, N.
        """
        if not self._sums:
            self._sums = _empty(blocks[-1].stop)
        sums = self._sums
        sums["pairs"] += images * images
        for number, block in enumerate(blocks):
            rows = self._rows(block, boxes(block), images)
            for other in blocks[: number + 1]:
                columns = rows if other is block else self._rows(other, boxes(other), images)
                centres = rows.centred @ columns.centred.T
                sums["centres"][block, other] += centres
                rows.add_spread(sums, columns)
                if other is not block:
                    sums["centres"][other, block] += centres.T
                    columns.add_spread(sums, rows)
            sums["widths"][block] += rows.widths @ rows.times + rows.unknown
            sums["squares"][block] += (rows.widths**2) @ rows.times + rows.unknown
            sums["rounding"][block] += rows.rounding

    def _rows(self, part: slice, box: tuple[np.ndarray, np.ndarray], images: int) -> _Rows:
        low, high = box
        unknown = ~np.isfinite(high).all(axis=(1, 2))
        high = np.where(unknown[:, None, None], low, high) if unknown.any() else high
        largest = np.maximum(np.abs(low).max(axis=(1, 2)), np.abs(high).max(axis=(1, 2)))
        before = self._sums["exponents"][part]
        exponents = np.maximum(before, np.where(largest > 0, np.frexp(largest)[1], _NOTHING))
        self._rescale(part, before - exponents)
        self._sums["exponents"][part] = exponents
        low, high = (np.ldexp(end, -exponents[:, None, None]) for end in (low, high))
        return _Rows(self._estimator, part, low, high, np.where(unknown, np.inf, 0.0))

    def _rescale(self, part: slice, shift: np.ndarray) -> None:
        """Divide some RSMs in the sums so far by further powers of two, which keep every digit."""
        if not shift.any():
            return
        sums = self._sums
        # How often an RSM enters a sum as the row, and as the column.
        for name, rows, columns in (("centres", 1, 1), ("spread", 1, 2), ("crossed", 2, 1)):
            sums[name][part] = np.ldexp(sums[name][part], rows * shift[:, None])
            sums[name][:, part] = np.ldexp(sums[name][:, part], columns * shift[None, :])
        for name, times in (("widths", 1), ("squares", 2), ("rounding", 2)):
            sums[name][part] = np.ldexp(sums[name][part], times * shift)

    @property
    def approximate(self) -> bool:
        """Whether the matching of any RSM is an approximation, so that there is something to prove."""
        return bool(self._sums) and bool((self._sums["widths"] > 0).any())

    def intervals(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute the interval of every cell.

        Args:
            values: CKA of the values, (R, R); they are inside their intervals.

        Returns:
            Lowest and highest CKA, (R, R) each: equal to the values where both RSMs are exact, 1 on the diagonal (or
            the value, where rounding left it beside 1), -1 and 1 where nothing is proven, NaN where a value is
            undefined.
        """
        bounds = _Bounds(self._sums)
        low, high = (bounds.end(sign, values) for sign in (1, -1))
        exact = self._sums["widths"] == 0
        for end in (low, high):
            np.fill_diagonal(end, 1.0)
        same = exact[:, None] & exact[None, :] | np.isnan(values)
        return np.where(same, values, np.fmin(low, values)), np.where(same, values, np.fmax(high, values))

    def state(self) -> dict[str, np.ndarray]:
        """The sums as plain arrays, from which `restore` continues."""
        return dict(self._sums)

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from the arrays of `state`; {} starts again."""
        self._sums = {name: np.array(values) for name, values in state.items()}


def _empty(rsms: int) -> dict[str, np.ndarray]:
    """Sums over no mini-batch.

    By name, with K in the rows and L in the columns: `centres` <P M, P N>; `spread` <H, (P N)^2>; `crossed`
    <H, P M P N>; `widths` <H, 1>; `squares` <H, H>; `rounding`, squared errors of the centred RSMs in units of one
    rounding; `exponents` of the powers of two by which RSMs are divided; `pairs`, the number of summed entries.
    """
    square = {name: np.zeros((rsms, rsms)) for name in ("centres", "spread", "crossed")}
    single = {name: np.zeros(rsms) for name in ("widths", "squares", "rounding")}
    return {**square, **single, "exponents": np.full(rsms, _NOTHING), "pairs": np.zeros(())}


class _Rows:
    """Some RSMs of a mini-batch, one row of entries each.

    Attributes:
        centred: centred centres of the boxes, each entry times the root of its multiplicity, (R, P).
        widths: half-widths, (R, P).
        unknown: infinity for RSMs of which the highest entries are unknown, else 0, (R,).
        times: multiplicity of the entries, (P,).
        rounding: squared error of `centred`, in units of one rounding, (R,).
    """

    def __init__(
        self, estimator: Estimator, part: slice, low: np.ndarray, high: np.ndarray, unknown: np.ndarray
    ) -> None:
        self._part, self.unknown, images = part, unknown, low.shape[-1]
        row, column = estimator.pairs(images)
        self.times = np.where(row == column, 1.0, 2.0)
        self.widths = (high[:, row, column] - low[:, row, column]) / 2
        centres = (low + high) / 2
        self.centred = estimator.rows(centres) * np.sqrt(estimator.divisor(images))
        # Means of rows are sums of N entries; the kernel and the bound add a few roundings per entry. A row that is
        # constant up to rounding of float32 was set to 0.
        units = np.where(self.centred.any(axis=1), (16.0 * (images + 20)) ** 2, CONSTANT / _ROUNDING**2)
        self.rounding = units * np.einsum("rij,rij->r", centres, centres)

    def add_spread(self, sums: dict[str, np.ndarray], other: _Rows) -> None:
        """Add the terms of the widths of these RSMs against the centres of others."""
        wide = np.flatnonzero(self.widths.any(axis=1))
        if not len(wide):
            return
        where = np.ix_(wide + self._part.start, np.arange(other._part.start, other._part.stop))
        widths = self.widths[wide]
        sums["spread"][where] += widths @ (other.centred**2).T
        sums["crossed"][where] += (widths * self.centred[wide]) @ other.centred.T


class _Bounds:
    """The ends of intervals from sums; every quantity is rounded so that intervals grow.

    Args:
        sums: see `_empty`.
    """

    def __init__(self, sums: Mapping[str, np.ndarray]) -> None:
        # A sum of P products, in whatever order, is off by at most P roundings of the sum of their sizes.
        self._slack = slack = 4 * (float(sums["pairs"]) + 100) * _ROUNDING
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            length = np.sqrt(np.diagonal(sums["centres"]))
            scale = length[:, None] * length[None, :]
            # Symmetric to the last bit, as all that follows: one t stands for (K, L) and for (L, K).
            self._centres = (sums["centres"] + sums["centres"].T) / (2 * scale)
            short = length * (1 - slack)
            self._error = _ROUNDING * np.sqrt(sums["rounding"]) / short
            self._widths = np.sqrt(sums["squares"]) * (1 + slack) / short
            self._sum = np.sqrt(sums["widths"]) * (1 + slack) / short
            self._spread = sums["spread"] / np.square(length)[None, :]
            self._crossed = sums["crossed"] / scale
            self._own = np.diagonal(sums["spread"]) / np.square(length)

    def end(self, sign: int, values: np.ndarray) -> np.ndarray:
        """The lowest (sign 1) or highest (sign -1) CKA, (R, R): the last t for which the inequality is shown."""
        proven, unproven = np.full(values.shape, -float(sign)), np.nan_to_num(self._centres)
        for _ in range(_HALVINGS):
            middle = (proven + unproven) / 2
            with np.errstate(invalid="ignore", over="ignore"):
                shown = self._margin(sign, middle) >= 0
            proven, unproven = np.where(shown, middle, proven), np.where(shown, unproven, middle)
        return np.clip(proven - sign * _ROUNDING * 8, -1.0, 1.0)

    def _margin(self, sign: int, t: np.ndarray) -> np.ndarray:
        """What is left of the inequality, (R, R); negative or NaN where nothing is shown."""
        slack, size = self._slack, np.abs(t)
        radius = self._widths + self._error
        first = self._first_order(t) + self._error[:, None] * (1 + size)
        squares = radius[:, None] ** 2 + radius[None, :] ** 2
        second = radius[:, None] * radius[None, :] + size * squares / 2
        margin = sign * (self._centres - t) - 3 * slack - (first + first.T) - (1 + slack) * second
        return np.where((radius[:, None] < 1) & (radius[None, :] < 1), margin, -1.0)

    def _first_order(self, t: np.ndarray) -> np.ndarray:
        """Upper bounds of s(K, L, t), (R, R), without the errors of the centres."""
        slack, own = 8 * self._slack, (t**2) * self._own[:, None]
        apart = 1 - 2 * t * self._centres + t**2
        plain = self._widths[:, None] * np.sqrt(np.maximum(apart, 0) + slack)
        weighted = self._spread - 2 * t * self._crossed + own + slack * (self._spread + own)
        return np.minimum(plain, self._sum[:, None] * np.sqrt(np.maximum(weighted, 0)))
