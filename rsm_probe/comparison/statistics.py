"""Uncertainty of comparisons: bootstrap over images, permutation tests, spread over seeds.

All functions work on existing RSMs; no model runs again, and no location is matched again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rsm_probe.checks import require_callable, require_number, require_seed, require_whole
from rsm_probe.comparison.grid import label_rsms, measured_grid, used_images
from rsm_probe.comparison.measures import get_measure
from rsm_probe.comparison.protocol import Measure
from rsm_probe.comparison.resampling import drawn_images, shuffled_images
from rsm_probe.errors import ComparisonError

if TYPE_CHECKING:
    import xarray as xr


def bootstrap(
    rsms: Any,
    others: Any = None,
    measure: str | Measure = "cka",
    repeats: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    on_repeat: Callable[[int], object] = lambda count: None,
    *,
    on: Literal["intersection"] | None = None,
    skip_missing: bool = False,
) -> xr.Dataset:
    """Compute bootstrap intervals of a grid of comparisons, by drawing images with replacement.

    Each repeat draws N of the N images and weights every pair by how often it was drawn. Pairs of an image with its own
    copy are omitted: their similarity is that of an image with itself and would raise every value.

    Args:
        rsms: see `compare`.
        others: see `compare`.
        measure: CKA or a correlation other than Kendall's.
        repeats: number of draws; each takes about as long as the grid itself.
        level: level of the interval, in (0, 1).
        seed: seed of the draws, which are the same for all RSMs.
        on_repeat: called with 1 after each repeat, for progress bars.
        on: see `compare`.
        skip_missing: see `compare`. Images are drawn, and the pairs that are known count.

    Returns:
        Dimensions (rsm_a, rsm_b): `value`, the percentiles `low` and `high`, the standard error `std`, and `draws`, the
        number of draws in which the value is defined.

    Example:
        >>> import numpy as np, rsm_probe
        >>> x = np.random.default_rng(0).normal(size=(20, 5))
        >>> noisy = x + np.random.default_rng(1).normal(size=(20, 5)) / 2
        >>> interval = rsm_probe.bootstrap({"x": x @ x.T}, {"noisy": noisy @ noisy.T}, repeats=50)
        >>> bool(interval["low"][0, 0] < interval["value"][0, 0] < interval["high"][0, 0])
        True

    Raises:
        ComparisonError: as `compare`; a measure that cannot weight images, `repeats` or `level` out of range, or too
            few images.
    """
    measure = get_measure(measure)
    check_level(level)
    _, rows, columns = label_rsms(rsms, others, measure, on=on, skip_missing=skip_missing)
    samples = bootstrap_samples(rows.values, columns.values, measure, repeats, seed, on_repeat)
    grid = measured_grid(rows, columns, measure)
    summary = summarise(grid, samples, level)
    return summary.assign_attrs(measure=measure.name, seed=seed, **used_images(rows, skip_missing))


def bootstrap_samples(
    a: np.ndarray,
    b: np.ndarray,
    measure: str | Measure = "cka",
    repeats: int = 1000,
    seed: int = 0,
    on_repeat: Callable[[int], object] = lambda count: None,
) -> np.ndarray:
    """Compute the values of a comparison for images drawn with replacement.

    Args:
        a: RSMs (A, N, N).
        b: RSMs over the same images, (B, N, N); pass the same object twice to compare RSMs among themselves.
        measure: see `bootstrap`.
        repeats: number of draws.
        seed: seed of the draws.
        on_repeat: called with 1 after each repeat.

    Returns:
        Shape (repeats, A, B); NaN where a value is undefined.

    Raises:
        ComparisonError: see `bootstrap`.
    """
    measure = get_measure(measure)
    check_draws(repeats, seed, on_repeat)
    draw = drawn_images([a.shape[-1]], measure, repeats, seed)
    rows = measure.ready(a)
    columns = rows if b is a else measure.ready(b)
    samples = np.empty((repeats, len(a), len(b)))
    for number in range(repeats):
        samples[number] = measure.grid(rows, columns, draw(number, 0).weights)
        on_repeat(1)
    return samples


def summarise(grid: xr.DataArray, samples: np.ndarray, level: float = 0.95) -> xr.Dataset:
    """Add percentiles and the standard deviation of bootstrap samples (repeats, A, B) to a grid.

    Raises:
        ComparisonError: `level` out of range.
    """
    check_level(level)
    draws = (~np.isnan(samples)).sum(axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # for comparisons that are undefined in all draws
        low, high = np.nanquantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
        std = np.nanstd(samples, axis=0, ddof=1)
    incomplete = ~np.isnan(grid.values) & (draws < len(samples))
    if incomplete.any():
        most = len(samples) - int(draws[incomplete].min())
        warnings.warn(
            f"in up to {most} of {len(samples)} draws, an RSM was constant; {int(incomplete.sum())} comparisons ignore "
            f"these draws, and `draws` counts the rest",
            stacklevel=3,
        )
    summary = _labelled_like(grid, value=grid.values, low=low, high=high, std=std, draws=draws)
    return summary.assign_attrs(level=level, repeats=len(samples))


def check_level(level: float) -> None:
    """Refuse interval levels outside (0, 1).

    Raises:
        ComparisonError: not a number, or out of range.
    """
    require_number(level, "level", ComparisonError)
    if not 0 < level < 1:
        raise ComparisonError(f"the level of an interval lies between 0 and 1, found {level}")


def check_draws(repeats: int, seed: int, on_repeat: Callable[[int], object]) -> None:
    """Refuse numbers of repeats below 2, invalid seeds and progress that cannot be called.

    Raises:
        ComparisonError: an argument of the wrong type or out of range.
    """
    require_whole(repeats, "repeats", 2, ComparisonError)
    require_seed(seed, "seed", ComparisonError)
    require_callable(on_repeat, "on_repeat", ComparisonError)


def permutation_test(
    rsms: Any,
    others: Any = None,
    measure: str | Measure = "cka",
    repeats: int = 1000,
    seed: int = 0,
    on_repeat: Callable[[int], object] = lambda count: None,
    *,
    on: Literal["intersection"] | None = None,
    skip_missing: bool = False,
) -> xr.Dataset:
    """Test whether RSMs are more alike than RSMs of unrelated images, by shuffling the images of the columns.

    Args:
        rsms: see `compare`.
        others: see `compare`.
        measure: any of `MEASURES`.
        repeats: number of random orders; p-values are at least 1 / (repeats + 1).
        seed: seed of the orders, which are the same for all RSMs.
        on_repeat: called with 1 after each repeat.
        on: see `compare`.
        skip_missing: see `compare`. In a random order, pairs count that are known in it and in the given one; these are
            fewer, so p-values are rather too large.

    Returns:
        Dimensions (rsm_a, rsm_b): `value`; `null_mean` and `null_std` over the orders; `z`, the standardised value (NaN
        if all orders give the same value); `p`, the share of orders at least as alike, including the given one.

    Raises:
        ComparisonError: as `compare`; invalid `repeats`, `seed` or `on_repeat`.
    """
    measure = get_measure(measure)
    check_draws(repeats, seed, on_repeat)
    _, rows, columns = label_rsms(rsms, others, measure, on=on, skip_missing=skip_missing)
    grid = measured_grid(rows, columns, measure)
    shuffle = shuffled_images([rows.values.shape[-1]], repeats, seed)
    null = np.empty((repeats, *grid.shape))
    for number in range(repeats):
        order = shuffle(number, 0).order
        assert order is not None
        null[number] = measure.grid(rows.values, columns.values[:, order[:, None], order])
        on_repeat(1)
    return against_null(grid, null, measure).assign_attrs(seed=seed, **used_images(rows, skip_missing))


def against_null(grid: xr.DataArray, null: np.ndarray, measure: Measure) -> xr.Dataset:
    """Compare the values of a grid with those for random orders of the images, (repeats, A, B).

    Returns:
        See `permutation_test`.
    """
    values, repeats = grid.values, len(null)
    # The given order may recur among the random ones, with a different rounding.
    slack = 1e-9 * np.maximum(np.abs(values), 1e-300)
    alike = null >= values - slack if measure.properties.kind == "similarity" else null <= values + slack
    mean, std = null.mean(axis=0), null.std(axis=0, ddof=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        z = np.where(std > 1e-12 * np.abs(null).max(axis=0), (values - mean) / std, np.nan)
    p = np.where(np.isnan(values), np.nan, (1 + alike.sum(axis=0)) / (1 + repeats))
    summary = _labelled_like(grid, value=values, null_mean=mean, null_std=std, z=z, p=p)
    return summary.assign_attrs(measure=measure.name, repeats=repeats)


def over_models(grids: Sequence[xr.DataArray]) -> xr.Dataset:
    """Average grids over pairs of models, such as seeds of one architecture.

    Args:
        grids: one grid per pair, all of one shape.

    Returns:
        `mean`; `std` over pairs (which share models, so they are not independent; NaN for one pair); and `pairs`, the
        number of pairs in which the value is defined.

    Raises:
        ComparisonError: no grid, or grids of different layers.
    """
    if not grids:
        raise ComparisonError("there is no pair of models to average over")
    first = grids[0]
    for grid in grids[1:]:
        if grid.shape != first.shape or not all(np.array_equal(grid[d].values, first[d].values) for d in first.dims):
            raise ComparisonError("only models with the same layers can be averaged")
    values = np.stack([grid.values for grid in grids])
    pairs = (~np.isnan(values)).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(pairs > 0, np.nansum(values, axis=0) / pairs, np.nan)
        std = np.sqrt(np.where(pairs > 1, np.nansum((values - mean) ** 2, axis=0) / (pairs - 1), np.nan))
    return _labelled_like(first, mean=mean, std=std, pairs=pairs)


def _labelled_like(grid: xr.DataArray, **values: np.ndarray) -> xr.Dataset:
    import xarray as xr

    return xr.Dataset({name: grid.copy(data=data).rename(name) for name, data in values.items()})
