"""How well RSMs of models explain the RSMs of subjects."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rsm_probe.brains.ceilings import ceilings, require_defined
from rsm_probe.brains.corrections import Correction, corrected
from rsm_probe.brains.draws import KINDS, Draw, corrected_variance, drawn_values
from rsm_probe.brains.permutations import permutation_test_of_means
from rsm_probe.checks import require_whole
from rsm_probe.comparison.grid import RsmKey, label_rsms, measured_grid, used_images
from rsm_probe.comparison.measures import get_measure
from rsm_probe.comparison.protocol import Measure
from rsm_probe.comparison.statistics import check_draws, check_level
from rsm_probe.errors import ComparisonError, look_up
from rsm_probe.execution.executors import available_cores

if TYPE_CHECKING:
    import xarray as xr


def evaluate(
    models: Any,
    subjects: Any,
    measure: str | Measure = "rsa-spearman",
    *,
    draw: Draw = "both",
    repeats: int = 1000,
    level: float = 0.95,
    correction: Correction | None = "fdr",
    seed: int = 0,
    workers: int | None = None,
    on: Literal["intersection"] | None = None,
    skip_missing: bool = False,
    on_repeat: Callable[[int], object] = lambda count: None,
) -> xr.Dataset:
    """Compare every RSM of models with every subject, with intervals, tests and the noise ceiling.

    Args:
        models: mapping from names to RSMs. Names are texts or pairs (model, layer); layers of a model come in forward
            order.
        subjects: `RSMs`, or a mapping from names to RSMs, over the same images.
        measure: a name from `rsm_probe.comparison.MEASURES`, or a measure object.
        draw: what is a sample from more, and therefore drawn with replacement: "images", "subjects" or "both". Measures
            that cannot weight images allow "subjects" alone.
        repeats: number of bootstrap draws, and of random orders in the permutation test.
        level: level of the intervals, in (0, 1).
        correction: how `p_ceiling_corrected` accounts for the number of models; see `differences`.
        seed: seed of the draws and orders.
        workers: threads that compute draws; None for all cores. Results do not depend on it.
        on: "intersection" takes the images that all RSMs hold; see `rsm_probe.compare`.
        skip_missing: leave out pairs of images that any RSM misses.
        on_repeat: called with 1 after each draw, for progress bars.

    Returns:
        Dimensions `rsm` (with coordinates model, layer, depth, matching and kernel) and `subject`:

        - `value` (rsm, subject): the measure; `mean` (rsm): its mean over subjects.
        - `std`, `low`, `high` (rsm): standard error of the mean by the corrected bootstrap (Schütt et al. 2023), and
          the t interval that follows from it with one degree of freedom less than there are subjects or images, of
          those that are drawn whichever are fewer.
        - `p` (rsm): probability that unrelated images are as alike, one-sided, by shuffling the images of the subjects;
          `p_corrected`: the probability that any of all these RSMs is, by the largest value of each order (Nichols &
          Holmes 2002).
        - `ceiling_low`, `ceiling_high`: the noise ceiling (see `noise_ceiling`), with standard errors
          `ceiling_low_std` and `ceiling_high_std`; NaN for one subject and for measures that have none.
        - `p_ceiling` (rsm): two-sided t test of the mean against `ceiling_low`; `p_ceiling_corrected`. NaN where 2
          subjects are drawn: how a lower end varies takes 3.
        - `draws` (drawn, repeat, rsm): means in the draws, from which `differences` follow.

        The attributes hold the settings and the numbers of images and subjects.

    Example:
        >>> import numpy as np, rsm_probe
        >>> truth, other = np.random.default_rng(0).normal(size=(2, 30, 5))
        >>> models = {name: rsm_probe.RSM.from_array(x @ x.T) for name, x in (("right", truth), ("wrong", other))}
        >>> subjects = rsm_probe.brains.simulated_subjects(models["right"], subjects=6, noise=1.0)
        >>> evaluation = rsm_probe.brains.evaluate(models, subjects, repeats=200)
        >>> rsm_probe.brains.best(evaluation)
        'right'

    Raises:
        ComparisonError: as `rsm_probe.compare` and `rsm_probe.bootstrap`; a subject for which the measure is undefined;
            or fewer than two subjects, if subjects are drawn.
    """
    measure = get_measure(measure)
    check_level(level)
    check_draws(repeats, seed, on_repeat)
    if workers is not None:
        require_whole(workers, "workers", 1, ComparisonError)
    kinds = KINDS[look_up(draw, {name: name for name in KINDS}, "draw", ComparisonError)]
    corrected(np.zeros(1), correction)
    _, rows, columns = label_rsms(models, subjects, measure, on=on, skip_missing=skip_missing)
    known = ~np.isnan(rows.values[0])
    np.fill_diagonal(known, val=False)
    if not (counting := known.any(axis=0)).all():  # an image of which no pair is known does not count as one
        rows, columns = (stack._replace(values=stack.values[:, counting][:, :, counting]) for stack in (rows, columns))
    names = [key.label() for key in columns.keys]
    count, images = len(names), rows.values.shape[-1]
    if "subjects" in kinds and count < 2:
        raise ComparisonError(
            f"there is one subject, {names[0]}, so subjects cannot be drawn; draw='images' gives intervals over images"
        )
    if "images" in kinds and not measure.weighted:
        raise ComparisonError(
            f"{measure.name} cannot count an image more than once, as a bootstrap does; take draw='subjects', CKA or "
            "another correlation"
        )
    among = measure.grid(columns.values, columns.values)
    require_defined(among, names, measure)
    grid = measured_grid(rows, columns, measure)
    means, ends = grid.values.mean(axis=1), np.full(2, np.nan)
    if measure.averages and count > 1:
        ends = ceilings(columns.values, np.ones((1, count)), measure, among=among)[0]
    test = permutation_test_of_means(means, rows.values, columns.values, measure, repeats, seed)
    workers, fixed = workers or available_cores(), np.concatenate([grid.values, among])
    drawn = drawn_values(rows.values, columns.values, measure, draw, repeats, seed, workers, on_repeat, fixed)
    sizes = images if "images" in kinds else 0, count if "subjects" in kinds else 0
    dof = min(size for size in sizes if size) - 1
    std = np.sqrt(corrected_variance(drawn.means, *sizes))
    below = means - ends[0]
    p_ceiling = t_test(below, np.sqrt(corrected_variance(drawn.means - drawn.ceilings[..., :1], *sizes)), dof)
    low, high = t_interval(means, std, dof, level)
    ends_std = np.sqrt(corrected_variance(drawn.ceilings, *sizes))
    return _labelled(
        rows.keys,
        names,
        kinds,
        {
            "value": grid.values,
            "mean": means,
            "std": std,
            "low": low,
            "high": high,
            "p": test.p,
            "p_corrected": test.p_corrected,
            "ceiling_low": ends[0],
            "ceiling_high": ends[1],
            "ceiling_low_std": ends_std[0],
            "ceiling_high_std": ends_std[1],
            "p_ceiling": p_ceiling,
            "p_ceiling_corrected": corrected(p_ceiling, correction),
            "draws": drawn.means,
        },
    ).assign_attrs(
        measure=measure.name,
        kind=measure.properties.kind,
        draw=draw,
        repeats=repeats,
        level=level,
        correction=correction or "none",
        seed=seed,
        dof=dof,
        subjects=count,
        dimension=str(getattr(subjects, "dimension", "subject")),
        **used_images(rows, skip_missing),
    )


def t_interval(value: np.ndarray, std: np.ndarray, dof: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the interval of a value with a standard error and degrees of freedom."""
    from scipy.stats import t

    half = t.ppf((1 + level) / 2, dof) * std
    return value - half, value + half


def t_test(value: np.ndarray, std: np.ndarray, dof: int) -> np.ndarray:
    """Two-sided p-values of values against 0; NaN where the standard error is unknown."""
    from scipy.stats import t

    smallest = np.sqrt(np.finfo(np.float64).eps)
    return np.asarray(2 * t.sf(np.abs(value) / np.maximum(std, smallest), dof))


def best(evaluation: xr.Dataset) -> str | None:
    """Name the RSM that explains the subjects best.

    Args:
        evaluation: what `evaluate` returned.

    Returns:
        The label of the RSM with the best mean; None if unrelated images are as alike with a probability
        (`p_corrected`) above 1 - level.
    """
    means = evaluation["mean"].values * (1 if evaluation.attrs["kind"] == "similarity" else -1)
    if np.isnan(means).all():
        return None
    first = int(np.nanargmax(means))
    sure = float(evaluation["p_corrected"][first]) <= 1 - evaluation.attrs["level"] + 1e-12
    return str(evaluation["rsm"].values[first]) if sure else None


def _labelled(
    keys: list[RsmKey], subjects: list[str], kinds: tuple[str, ...], values: dict[str, np.ndarray]
) -> xr.Dataset:
    import xarray as xr

    dims = {"value": ("rsm", "subject"), "draws": ("drawn", "repeat", "rsm")}
    coordinates: dict[str, Any] = {"rsm": [key.label() for key in keys], "subject": subjects, "drawn": list(kinds)}
    for field in RsmKey._fields:
        coordinates[field] = ("rsm", [getattr(key, field) for key in keys])
    shaped = {name: (dims.get(name, ("rsm",) if np.ndim(data) else ()), data) for name, data in values.items()}
    return xr.Dataset(shaped, coords=coordinates)
