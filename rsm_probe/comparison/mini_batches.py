"""Comparison of RSMs over many mini-batches, such as those of a sweep, in the memory of one mini-batch.

CKA divides HSICs summed over mini-batches, and distance correlation divides distance covariances. Values of other
measures are averaged over mini-batches, weighted by their images: each mini-batch estimates the value for that many
images, and larger ones estimate it better. The norm difference and the Bures similarity are norms of whole RSMs and
grow with the size of a mini-batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from rsm_probe.checks import brief
from rsm_probe.comparison.batch_values import BatchMeans
from rsm_probe.comparison.grid import RsmKey, label_grid, warn_undefined, with_interval
from rsm_probe.comparison.intervals import draw_weights
from rsm_probe.comparison.measures import MEASURES, get_measure
from rsm_probe.comparison.protocol import Measure
from rsm_probe.comparison.resampling import Sample, Sampler, drawn_images, shuffled_images
from rsm_probe.comparison.statistics import against_null, check_draws, check_level, summarise
from rsm_probe.errors import ComparisonError

if TYPE_CHECKING:
    import xarray as xr

# With fewer mini-batches, intervals from drawing whole mini-batches are coarse.
_FEW = 8

Drawn = Literal["images", "mini-batches"]


class RsmBatches(Protocol):
    """RSMs of several mini-batches of images."""

    @property
    def keys(self) -> Sequence[RsmKey]:
        """Keys of the R RSMs."""

    @property
    def sizes(self) -> Sequence[int]:
        """Number of images in each mini-batch."""

    def rsms(self, batch: int, /) -> np.ndarray:
        """Read or compute the RSMs of one mini-batch of N images, (R, N, N), symmetric."""


@runtime_checkable
class BoundedRsmBatches(RsmBatches, Protocol):
    """RSMs of several mini-batches whose matchings may be approximations with known bounds."""

    def boxes(self, batch: int, /) -> tuple[np.ndarray, np.ndarray]:
        """RSMs of one mini-batch, and the highest that exact matching can make of them, (R, N, N) each.

        They are equal where a matching is not an approximation.
        """


def compare_batches(batches: RsmBatches, measure: str | Measure = "cka") -> xr.DataArray:
    """Compare every RSM with every other over all mini-batches.

    CKA divides HSICs summed over mini-batches, each weighted by its pairs of images, as a sweep does, and distance
    correlation divides distance covariances in the same way. Other measures have no such sums, so their values are
    means over mini-batches. Each mini-batch is weighted by its images, because larger ones estimate a value better. The
    mean is the value for mini-batches of that size, not for all images together: `norm-difference` and `bures` grow
    with the number of images, so compare them only between sweeps with the same batch size; neighbour overlaps depend
    on it too. Mini-batches that are too small for the measure are left out, with a warning.

    Args:
        batches: RSMs of one or several mini-batches.
        measure: a name from `MEASURES`, or a measure object with its options.

    Returns:
        Dimensions (rsm_a, rsm_b), labelled as by `compare`, which gives the same values for a single mini-batch. An RSM
        that is constant in a mini-batch (for CKA: in all of them) has undefined values, which are NaN, with a warning
        that names it. For CKA of batches with `boxes`, `proven_low` and `proven_high` are as in `compare`.

    Raises:
        ComparisonError: an unknown measure, no mini-batch that is large enough, or RSMs that are not finite or of a
            wrong shape.
    """
    comparison = _Comparison(batches, measure)
    return comparison.with_interval(comparison.grid(comparison.sampled_values()[0]))


def bootstrap_batches(
    batches: RsmBatches,
    measure: str | Measure = "cka",
    repeats: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    on_repeat: Callable[[int], object] = lambda count: None,
    *,
    draw: Drawn | None = None,
) -> xr.Dataset:
    """Compute bootstrap intervals of comparisons over mini-batches, see `compare_batches`.

    Images are drawn with replacement within each mini-batch, as by `bootstrap`. Measures that cannot count an image
    more than once draw whole mini-batches instead, which takes at least 2, and many for a smooth interval. This is also
    much faster: each mini-batch is compared once instead of once per repeat.

    Args:
        batches: RSMs of one or several mini-batches.
        measure: see `compare_batches`.
        repeats: number of draws. Memory holds one grid (R, R) per draw.
        level: level of the interval, in (0, 1).
        seed: seed of the draws, which are the same for all RSMs.
        on_repeat: called with 1 as often as `repeats` says, for progress bars.
        draw: "images" or "mini-batches"; by default images, if the measure can weight them.

    Returns:
        Dimensions (rsm_a, rsm_b): `value`, `low`, `high`, `std` and `draws`, see `bootstrap`; the attribute `drawn`
        says what was drawn.

    Raises:
        ComparisonError: as `compare_batches`; an argument out of range, too few images to draw from, a single
            mini-batch to draw from, or images drawn for a measure that cannot weight them.
    """
    check_level(level)
    check_draws(repeats, seed, on_repeat)
    comparison = _Comparison(batches, measure)
    if draw is not None and draw not in ("images", "mini-batches"):
        raise ComparisonError(f"draw is 'images', 'mini-batches' or None, found {brief(draw)}")
    drawn = draw or ("images" if comparison.measure.weighted else "mini-batches")
    sampler = comparison.images(repeats, seed) if drawn == "images" else comparison.mini_batches(repeats, seed)
    values = comparison.sampled_values(sampler, repeats, on_repeat)
    summary = summarise(comparison.grid(values[0]), values[1:], level)
    return summary.assign_attrs(measure=comparison.measure.name, seed=seed, drawn=drawn)


def bootstrap_batch_samples(
    batches: RsmBatches,
    measure: str | Measure = "cka",
    repeats: int = 1000,
    seed: int = 0,
    on_repeat: Callable[[int], object] = lambda count: None,
) -> np.ndarray:
    """Compute the values of comparisons over mini-batches for images drawn within them; see `bootstrap_batches`.

    Returns:
        Shape (repeats, R, R); NaN where a value is undefined.

    Raises:
        ComparisonError: see `bootstrap_batches`.
    """
    check_draws(repeats, seed, on_repeat)
    comparison = _Comparison(batches, measure)
    return comparison.sampled_values(comparison.images(repeats, seed), repeats, on_repeat)[1:]


def permutation_test_batches(
    batches: RsmBatches,
    measure: str | Measure = "cka",
    repeats: int = 1000,
    seed: int = 0,
    on_repeat: Callable[[int], object] = lambda count: None,
) -> xr.Dataset:
    """Test whether RSMs are more alike than RSMs of unrelated images, by shuffling images within each mini-batch.

    Args:
        batches: RSMs of one or several mini-batches.
        measure: see `compare_batches`.
        repeats: number of random orders; p-values are at least 1 / (repeats + 1). Memory holds one grid (R, R) each.
        seed: seed of the orders, which are the same for all RSMs.
        on_repeat: called with 1 as often as `repeats` says.

    Returns:
        Dimensions (rsm_a, rsm_b): `value`, `null_mean`, `null_std`, `z` and `p`; see `permutation_test`.

    Raises:
        ComparisonError: as `compare_batches`; invalid `repeats`, `seed` or `on_repeat`.
    """
    check_draws(repeats, seed, on_repeat)
    comparison = _Comparison(batches, measure)
    values = comparison.sampled_values(
        shuffled_images(comparison.sizes, repeats, seed), repeats, on_repeat, shuffled=True
    )
    return against_null(comparison.grid(values[0]), values[1:], comparison.measure).assign_attrs(seed=seed)


class _Comparison:
    """One comparison of the mini-batches that are large enough for a measure."""

    def __init__(self, batches: RsmBatches, measure: str | Measure) -> None:
        self.measure = get_measure(measure)
        self.batches = batches
        self.keys = list(batches.keys)
        if not self.keys or not len(batches.sizes):
            raise ComparisonError("there is no RSM to compare")
        refused: dict[int, ComparisonError] = {}
        for number, size in enumerate(batches.sizes):
            try:
                self.measure.require_images(size)
            except ComparisonError as error:
                refused[number] = error
        self.numbers = [number for number in range(len(batches.sizes)) if number not in refused]
        self.sizes = [int(batches.sizes[number]) for number in self.numbers]
        if not self.sizes:
            raise next(iter(refused.values()))
        if refused:
            images = sum(batches.sizes[number] for number in refused)
            warnings.warn(
                f"{len(refused)} of {len(batches.sizes)} mini-batches are too small and are left out, with {images} "
                f"images: {next(iter(refused.values()))}",
                stacklevel=3,  # above this method and the function that users call,
            )

    def images(self, repeats: int, seed: int) -> Sampler:
        """Draw images within each mini-batch."""
        return drawn_images(self.sizes, self.measure, repeats, seed)

    def mini_batches(self, repeats: int, seed: int) -> Sampler:
        """Draw whole mini-batches.

        Raises:
            ComparisonError: there is only one.
        """
        count, name = len(self.sizes), self.measure.name
        if count < 2:
            weighted = ", ".join(other.name for other in MEASURES.values() if other.weighted)
            raise ComparisonError(
                f"the bootstrap of {name} draws whole mini-batches, and there is only one of {self.sizes[0]} images; "
                f"divide the images into more mini-batches, or use a measure that can draw images: {weighted}"
            )
        if count < _FEW:
            warnings.warn(
                f"the intervals of {name} come from drawing {count} mini-batches and are coarse; use at least {_FEW}",
                stacklevel=3,
            )
        times = draw_weights(count, repeats, seed)
        return lambda sample, batch: Sample(times=int(times[sample, batch]))

    def sampled_values(
        self,
        sampler: Sampler = lambda sample, batch: Sample(),
        repeats: int = 0,
        on_repeat: Callable[[int], object] = lambda count: None,
        shuffled: bool = False,
    ) -> np.ndarray:
        """Compute the values for all images and for each sample of them, (1 + repeats, R, R)."""
        several, samples, rsms = len(self.sizes) > 1, 1 + repeats, len(self.keys)
        sums = self.measure.over_batches(samples, rsms) if several else BatchMeans(samples, rsms, self.measure.grid)
        weights = np.array([sums.weight(size) for size in self.sizes])
        for batch, weight in enumerate((weights / weights.sum()).tolist()):
            stack = sums.scaled(self._rsms(batch))
            if repeats:
                stack = self.measure.ready(stack)
            terms = sums.terms(stack, stack)
            sums.add(0, terms, weight)
            for number in range(repeats):
                times, image_weights, order = sampler(number, batch)
                drawn = terms
                if image_weights is not None or order is not None:
                    columns = stack if order is None else stack[:, order[:, None], order]
                    drawn = sums.terms(stack, columns, image_weights)
                sums.add(1 + number, drawn, weight * times)
                if (batch * repeats + number) % len(self.sizes) == 0:
                    on_repeat(1)
        return sums.values(shuffled)

    def _rsms(self, batch: int) -> np.ndarray:
        number, expected = self.numbers[batch], (len(self.keys), self.sizes[batch], self.sizes[batch])
        rsms = np.asarray(self.batches.rsms(number), dtype=np.float64)
        if rsms.shape != expected:
            raise ComparisonError(f"the RSMs of mini-batch {number} have shape {rsms.shape}, expected {expected}")
        finite = np.isfinite(rsms).all(axis=(1, 2))
        if not finite.all():
            key = self.keys[int(np.flatnonzero(~finite)[0])]
            raise ComparisonError(f"the {key.label()} RSM of mini-batch {number} holds values that are not finite")
        return rsms

    def with_interval(self, grid: xr.DataArray) -> xr.DataArray:
        """Add the interval of exact matching, if the mini-batches have bounds and the measure takes them."""
        sums = self.measure.certified()
        if sums is None or not isinstance(self.batches, BoundedRsmBatches):
            return grid
        for number, size in zip(self.numbers, self.sizes, strict=True):
            low, high = self.batches.boxes(number)
            sums.add(partial(_part_of, low, high), [slice(0, len(self.keys))], size)
        return with_interval(grid, sums, grid.values)

    def grid(self, values: np.ndarray) -> xr.DataArray:
        """Label values (R, R), and warn and name the first RSM without a value."""
        alone = zip(self.keys, np.diagonal(values), strict=True)
        warn_undefined(
            self.measure,
            [key.label() for key, value in alone if np.isnan(value)],
            " of a mini-batch" if len(self.sizes) > 1 else "",
        )
        grid = label_grid(values, self.keys, self.keys).rename(self.measure.name)
        attributes: dict[str, Any] = {"kind": self.measure.properties.kind, "measure": self.measure.name}
        return grid.assign_attrs(attributes, images=sum(self.sizes), batches=len(self.sizes))


def _part_of(low: np.ndarray, high: np.ndarray, part: slice) -> tuple[np.ndarray, np.ndarray]:
    return low[part], high[part]
