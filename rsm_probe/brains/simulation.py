"""Simulated subjects, of whom the truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rsm_probe.checks import require_number, require_seed, require_whole
from rsm_probe.comparison.inputs import stack_rsms
from rsm_probe.errors import ComparisonError
from rsm_probe.similarity.rsm import RSM
from rsm_probe.similarity.rsms import RSMs


def simulated_subjects(truth: RSM, subjects: int = 8, noise: float = 1.0, seed: int = 0) -> RSMs:
    """Simulate subjects who see images as an RSM does, up to noise of their own.

    Each holds distances `k_ii + k_jj - 2 k_ij` of the RSM plus independent normal noise for every pair of images, whose
    standard deviation is `noise` times that of the distances. The distances are shifted such that none is negative,
    which no correlation and no CKA notices.

    Args:
        truth: an RSM of one set of N images.
        subjects: number of subjects.
        noise: standard deviation of the noise, relative to that of the true distances.
        seed: seed of the noise.

    Returns:
        RSMs of distances, (subjects, N, N).

    Raises:
        ComparisonError: two sets of images, missing pairs, a constant RSM, or numbers out of range.
    """
    values = stack_rsms([truth], ["true"])[0]
    first, second = np.triu_indices(len(values), 1)
    distances = values[first, first] + values[second, second] - 2 * values[first, second]
    if not distances.size or not (spread := float(distances.std())) > 0:
        raise ComparisonError("all images of the true RSM are equally alike, so there is nothing to simulate")
    return _with_noise(distances / spread, truth.ids, subjects, noise, seed)


def unrelated_subjects(ids: Sequence[str], subjects: int = 8, seed: int = 0) -> RSMs:
    """Simulate subjects whose distances have nothing to do with the images, nor with each other.

    Args:
        ids: names of N images.
        subjects: number of subjects.
        seed: seed of the distances.

    Returns:
        RSMs of distances, (subjects, N, N).

    Raises:
        ComparisonError: fewer than 3 images, unusable names, or numbers out of range.
    """
    if len(ids) < 3:
        raise ComparisonError(f"unrelated subjects need at least 3 images, found {len(ids)}")
    return _with_noise(np.zeros(len(ids) * (len(ids) - 1) // 2), ids, subjects, 1.0, seed)


def _with_noise(distances: np.ndarray, ids: Sequence[str], subjects: Any, noise: Any, seed: Any) -> RSMs:
    require_whole(subjects, "subjects", 1, ComparisonError)
    require_number(noise, "noise", ComparisonError, least=0.0)
    require_seed(seed, "seed", ComparisonError)
    noisy = distances + noise * np.random.default_rng(seed).normal(size=(subjects, distances.size))
    noisy -= noisy.min(axis=1, keepdims=True)
    return RSMs.from_array(noisy, ids, dissimilarity="simulated")
