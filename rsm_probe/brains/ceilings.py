"""Noise ceilings: how well any model can explain subjects that differ from each other."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from rsm_probe.comparison.correlations import mean_ranks
from rsm_probe.comparison.grid import label_rsms
from rsm_probe.comparison.inputs import CONSTANT
from rsm_probe.comparison.measures import get_measure
from rsm_probe.comparison.protocol import Measure
from rsm_probe.errors import ComparisonError


class NoiseCeiling(NamedTuple):
    """The range in which the true model would lie.

    Attributes:
        low: mean over subjects of the measure between each and the average of all others. The average of few subjects
            is noisy, so that the true model may reach more.
        high: mean over subjects of the measure between each and the average of all. No model reaches more.
    """

    low: float
    high: float


def noise_ceiling(
    subjects: Any, measure: str | Measure = "rsa-spearman", *, skip_missing: bool = False
) -> NoiseCeiling:
    """Compute the noise ceiling of subjects (Nili et al. 2014).

    RSMs are averaged as the measure sees them, so that the average is the best model of these subjects: scaled to norm
    1 after centring for CKA and Pearson correlations, scaled for cosines, as ranks for Spearman and Kendall
    correlations. The upper end is a bound for all measures but Kendall's, where the average of ranks comes close to the
    best model.

    Args:
        subjects: `RSMs`, or a mapping from names to RSMs of the same images.
        measure: CKA, a correlation, or distance-correlation.
        skip_missing: leave out pairs of images that any subject misses.

    Example:
        >>> import numpy as np, rsm_probe
        >>> rng = np.random.default_rng(0)
        >>> truth = rng.normal(size=(20, 5))
        >>> noisy = [truth + rng.normal(size=truth.shape) for _ in range(6)]
        >>> subjects = rsm_probe.RSMs.from_array(np.stack([x @ x.T for x in noisy]))
        >>> low, high = rsm_probe.brains.noise_ceiling(subjects, "cka")
        >>> 0 < low < high < 1
        True

    Raises:
        ComparisonError: fewer than two subjects, a subject for which the measure is undefined, a measure without a
            ceiling, or as `rsm_probe.compare`.
    """
    measure = get_measure(measure)
    _, stack, _ = label_rsms(subjects, None, measure, on=None, skip_missing=skip_missing)
    if len(stack.keys) < 2:
        raise ComparisonError(f"a noise ceiling needs at least 2 subjects, found {len(stack.keys)}")
    require_ceiling(measure)
    among = measure.grid(stack.values, stack.values)
    require_defined(among, [key.label() for key in stack.keys], measure)
    low, high = ceilings(stack.values, np.ones((1, len(stack.keys))), measure, among=among)[0]
    return NoiseCeiling(float(low), float(high))


def require_defined(among: np.ndarray, names: list[str], measure: Measure) -> None:
    """Refuse subjects for which a measure is undefined.

    Args:
        among: values of the measure between all subjects, (K, K).
        names: K names.
        measure: the measure.

    Raises:
        ComparisonError: the measure between a subject's RSM and itself is undefined.
    """
    for name, own in zip(names, np.diagonal(among), strict=True):
        if np.isnan(own):
            raise ComparisonError(
                f"the RSM of {name} is constant over all pairs of images, so {measure.name} is undefined; leave it out"
            )


def require_ceiling(measure: Measure) -> None:
    """Refuse measures for which no average of subjects is known to be the best model of them.

    Raises:
        ComparisonError: there is none.
    """
    if measure.averages is None:
        raise ComparisonError(
            f"no noise ceiling is known for {measure.name}; there is one for CKA, distance-correlation and the "
            "correlations (rsa-...)"
        )


def ceilings(
    subjects: np.ndarray,
    times: np.ndarray,
    measure: Measure,
    weights: np.ndarray | None = None,
    among: np.ndarray | None = None,
) -> np.ndarray:
    """Compute the noise ceilings of several draws of subjects.

    A subject that was drawn several times counts as often, and all its copies are left out together.

    Args:
        subjects: RSMs of K subjects, (K, N, N).
        times: how often each counts in D draws, (D, K).
        measure: a measure that has a noise ceiling.
        weights: how often each image counts, (N,).
        among: values of the measure between all subjects, (K, K), if they are known.

    Returns:
        Lower and upper ends, (D, 2); the lower one is NaN where only one subject was drawn.
    """
    count = times.shape[1]
    others = times[:, None, :] * (1.0 - np.eye(count))
    # First the averages of all, then those of all but one.
    shares = np.concatenate([times[:, None, :], others], axis=1).reshape(-1, count)
    if measure.averages == "rows":
        if among is None:
            among = measure.grid(subjects, subjects, weights)
        # An average of unit rows u_t with shares c_t has the cosine (sum_t c_t u_t u_s) / |sum_t c_t u_t| with row s.
        inner = shares @ among
        squared = (inner * shares).sum(axis=1, keepdims=True)
        # Rows that cancel each other leave rounding, of which no model can be made.
        least = CONSTANT * shares.sum(axis=1, keepdims=True) ** 2
        values = inner / np.sqrt(np.where(squared > least, squared, np.nan))
    else:
        # Subjects that were not drawn, and equal draws, need no further averages.
        needed, where = np.unique(shares, axis=0, return_inverse=True)
        values = measure.grid(mean_ranks(subjects, needed, weights), subjects, weights)[where.ravel()]
    values = values.reshape(len(times), 1 + count, count)
    share = times / times.sum(axis=1, keepdims=True)
    low = np.where(share > 0, share * np.diagonal(values[:, 1:], axis1=1, axis2=2), 0.0).sum(axis=1)
    high = np.where(share > 0, share * values[:, 0], 0.0).sum(axis=1)
    return np.stack([low, high], axis=1)
