"""Permutation tests of many RSMs against subjects: would unrelated images be as alike?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rsm_probe.comparison.alignment import unit_rows
from rsm_probe.comparison.inputs import in_range, known_pairs
from rsm_probe.comparison.protocol import Measure, RowMeasure
from rsm_probe.comparison.resampling import shuffled_images

# Bytes of permuted rows that are held at once.
_HELD = 1 << 26


class PermutationTest(NamedTuple):
    """p-values of R RSMs.

    Attributes:
        p: share of orders of the images in which the RSM is at least as alike as in the given one, (R,).
        p_corrected: the same for the largest standardised value of all RSMs, (R,): the probability that any RSM of
            unrelated images seems as alike (Nichols & Holmes 2002).
    """

    p: np.ndarray
    p_corrected: np.ndarray


def permutation_test_of_means(
    observed: np.ndarray, models: np.ndarray, subjects: np.ndarray, measure: Measure, repeats: int, seed: int
) -> PermutationTest:
    """Test the mean of a measure over subjects by shuffling the images of all subjects alike.

    Args:
        observed: means in the given order, (R,).
        models: RSMs (R, N, N).
        subjects: RSMs over the same images, (K, N, N).
        measure: any measure.
        repeats: number of random orders; p-values are at least 1 / (repeats + 1).
        seed: seed of the orders.
    """
    null = _permuted_means(models, subjects, measure, repeats, seed)
    both = np.concatenate([observed[None], null])
    # Larger is to mean more alike.
    both = both if measure.properties.kind == "similarity" else -both
    # The given order is one of all orders, so it belongs to their mean and spread: the test stays exact.
    spread = both.std(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        z = (both - both.mean(axis=0)) / np.where(spread > 1e-12 * np.abs(both).max(axis=0), spread, np.nan)
    # The given order may recur among the random ones, with a different rounding.
    least = z[0] - 1e-9 * np.abs(z[0])
    known = ~np.isnan(z[0])
    highest = z[:, known].max(axis=1) if known.any() else np.zeros(len(z))
    p = np.where(known, (z >= least).mean(axis=0), np.nan)
    return PermutationTest(p, np.where(known, (highest[:, None] >= least).mean(axis=0), np.nan))


def _permuted_means(models: np.ndarray, subjects: np.ndarray, measure: Measure, repeats: int, seed: int) -> np.ndarray:
    """Means over subjects for random orders of their images, (repeats, R)."""
    count = models.shape[-1]
    shuffle = shuffled_images([count], repeats, seed)
    orders = [shuffle(number, 0).order for number in range(repeats)]
    null = np.empty((repeats, len(models)))
    if not isinstance(measure, RowMeasure) or known_pairs(models, subjects) is not None:
        for number, order in enumerate(orders):
            assert order is not None
            null[number] = measure.grid(models, subjects[:, order[:, None], order]).mean(axis=1)
        return null
    # Rows of shuffled images are shuffled rows, and a mean of cosines is the cosine with a mean of unit rows.
    rows, mean = unit_rows(measure.rows(in_range(models))), unit_rows(measure.rows(in_range(subjects))).mean(axis=0)
    first, second = measure.pairs(count)
    square = np.zeros((count, count))
    square[first, second] = square[second, first] = mean
    held = max(1, _HELD // mean.nbytes)
    for start in range(0, repeats, held):
        part = slice(start, start + held)
        null[part] = np.stack([square[order[first], order[second]] for order in orders[part]]) @ rows.T  # type: ignore[index]
    return null
