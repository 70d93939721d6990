"""Noise ceilings against rsatoolbox, against their definition, and where they are undefined."""

import numpy as np
import pytest
from rsatoolbox.inference.noise_ceiling import boot_noise_ceiling
from rsatoolbox.rdm import RDMs, compare
from rsatoolbox.util.pooling import pool_rdm
from scipy.optimize import minimize
from scipy.stats import rankdata, spearmanr

from rsm_probe import RSM, RSMs
from rsm_probe.brains import noise_ceiling
from rsm_probe.brains.ceilings import ceilings
from rsm_probe.comparison import MEASURES, get_measure
from rsm_probe.errors import ComparisonError

# Our name -> rsatoolbox's.
SAME = {"rsa-spearman": "spearman", "rsa-pearson": "corr", "rsa-cosine": "cosine", "rsa-kendall": "tau-a"}
WITH_CEILING = [*SAME, "cka", "cka-biased", "distance-correlation"]


def some_distances(subjects: int, images: int, kind: str, seed: int = 0) -> np.ndarray:
    """Condensed distances (K, P) that share something; "tied" ones are rounded, those with "holes" miss some pairs."""
    rng = np.random.default_rng(seed)
    pairs = images * (images - 1) // 2
    distances = np.abs(rng.random(pairs) + 0.5 * rng.normal(size=(subjects, pairs)))
    if kind == "tied":
        return np.round(3 * distances) / 3
    if kind == "holes":
        distances[:, rng.choice(pairs, pairs // 5, replace=False)] = np.nan
    return distances


@pytest.mark.parametrize("kind", ["plain", "tied", "holes"])
@pytest.mark.parametrize(("subjects", "images"), [(2, 7), (5, 12), (9, 20)])
@pytest.mark.parametrize("measure", SAME)
@pytest.mark.filterwarnings("ignore:Noise ceiling for tau")
def test_ceilings_are_those_of_rsatoolbox(measure, subjects, images, kind):
    distances = some_distances(subjects, images, kind, seed=subjects)
    rsms = RSMs.from_array(distances, dissimilarity="correlation", allow_missing=True)
    ours = noise_ceiling(rsms, measure, skip_missing=kind == "holes")
    np.testing.assert_allclose(ours, boot_noise_ceiling(RDMs(distances), SAME[measure]), rtol=0, atol=1e-12)
    assert ours.low < ours.high


@pytest.mark.parametrize("kind", ["plain", "holes"])
def test_the_ceiling_of_biased_cka_compares_with_the_average_under_its_own_norm(kind):
    """rsatoolbox's `boot_noise_ceiling` pools for "cosine_cov" by plain norms; its `pooling.pool_rdm` does it right."""
    distances = some_distances(5, 12, kind)
    ours = noise_ceiling(
        RSMs.from_array(distances, dissimilarity="x", allow_missing=True), "cka-biased", skip_missing=kind == "holes"
    )
    rdms = RDMs(distances)
    high = compare(pool_rdm(rdms, "cosine_cov"), rdms, "cosine_cov").mean()
    others = [pool_rdm(rdms.subset("index", [k for k in range(5) if k != number]), "cosine_cov") for number in range(5)]
    low = np.mean([compare(pool, rdms.subset("index", k), "cosine_cov") for k, pool in enumerate(others)])
    np.testing.assert_allclose(ours, (low, high), rtol=0, atol=1e-7)  # theirs solves by conjugate gradients
    if kind == "plain":
        assert ours.high >= boot_noise_ceiling(rdms, "cosine_cov")[1]


@pytest.mark.parametrize("measure", ["cka", "cka-biased", "rsa-pearson", "rsa-cosine", "distance-correlation"])
def test_no_rsm_explains_subjects_better_than_the_upper_end(measure):
    images = 6
    distances = some_distances(4, images, "plain", seed=3)
    rsms = RSMs.from_array(distances, dissimilarity="x")
    low, high = noise_ceiling(rsms, measure)

    def loss(row: np.ndarray) -> float:
        model = RSM.from_array(_matrix(np.abs(row), images), dissimilarity="x")
        return -get_measure(measure).grid(model.values[None], rsms.similarities).mean()

    starts = [distances.mean(axis=0), distances[0], *np.random.default_rng(1).random((3, distances.shape[1]))]
    found = max(-minimize(loss, start, method="BFGS", options={"maxiter": 300}).fun for start in starts)
    assert low < found <= high + 1e-9
    assert found > high - 2e-2  # the end is near what can be reached, not a loose bound


def _matrix(row: np.ndarray, images: int) -> np.ndarray:
    square = np.zeros((images, images))
    square[np.triu_indices(images, 1)] = row
    return square + square.T


@pytest.mark.parametrize("measure", WITH_CEILING)
def test_equal_subjects_reach_one(measure):
    distances = np.repeat(some_distances(1, 9, "plain"), 3, axis=0)
    low, high = noise_ceiling(RSMs.from_array(distances, dissimilarity="x"), measure)
    assert (low, high) == (pytest.approx(1), pytest.approx(1))


@pytest.mark.parametrize(
    ("measure", "weighted"),
    [
        (name, weighted)
        for name in WITH_CEILING
        for weighted in (False, True)
        if MEASURES[name].weighted or not weighted
    ],
)
def test_a_subject_drawn_twice_counts_twice_and_is_left_out_at_once(measure, weighted):
    subjects = RSMs.from_array(some_distances(4, 10, "plain"), dissimilarity="x").similarities
    weights = np.array([2, 1, 1, 0, 3, 1, 0, 1, 0, 1]) if weighted else None
    measure = get_measure(measure)
    drawn = ceilings(subjects, np.array([[2, 1, 0, 1]]), measure, weights)[0]
    copies = subjects[[0, 0, 1, 3]]
    high = _against_average(copies, copies, measure, weights).mean()
    left_out = [[1, 3], [1, 3], [0, 0, 3], [0, 0, 1]]
    low = np.mean(
        [
            _against_average(subjects[others], copy[None], measure, weights)
            for others, copy in zip(left_out, copies, strict=True)
        ]
    )
    np.testing.assert_allclose(drawn, [low, high], rtol=0, atol=1e-12)


def _against_average(averaged: np.ndarray, others: np.ndarray, measure, weights) -> np.ndarray:
    """Values between an average of RSMs and others, written out."""
    if measure.averages == "rows":
        rows, against = measure.rows(averaged, weights), measure.rows(others, weights)
        mean = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(axis=0)
        return against @ mean / np.linalg.norm(against, axis=1) / np.linalg.norm(mean)
    count = averaged.shape[-1]
    drawn = np.repeat(np.arange(count), np.ones(count, int) if weights is None else weights)
    first, second = np.triu_indices(len(drawn), 1)
    distinct = drawn[first] != drawn[second]
    first, second = drawn[first[distinct]], drawn[second[distinct]]
    mean = np.mean([rankdata(rsm[first, second]) for rsm in averaged], axis=0)
    if measure.name == "rsa-spearman":
        return np.array([spearmanr(mean, rsm[first, second])[0] for rsm in others])
    signs = np.sign(np.subtract.outer(mean, mean))
    pairs = len(mean) * (len(mean) - 1)
    return np.array(
        [(signs * np.sign(np.subtract.outer(v, v))).sum() / pairs for v in (rsm[first, second] for rsm in others)]
    )


def test_the_lower_end_of_one_drawn_subject_is_unknown():
    subjects = RSMs.from_array(some_distances(3, 8, "plain"), dissimilarity="x").similarities
    low, high = ceilings(subjects, np.array([[0, 3, 0]]), get_measure("rsa-pearson"))[0]
    assert np.isnan(low)
    assert high == pytest.approx(1)


@pytest.mark.parametrize("measure", ["rsa-pearson", "rsa-cosine", "cka", "cka-biased"])
def test_subjects_that_cancel_each_other_have_no_average(measure):
    for seed in range(10):
        one = RSMs.from_array(some_distances(1, 6, "plain", seed), dissimilarity="x").similarities
        opposite = np.concatenate([one, -one / 3])  # up to rounding
        assert np.isnan(ceilings(opposite, np.ones((1, 2)), get_measure(measure))[0, 1])


@pytest.mark.parametrize("measure", sorted(set(MEASURES) - set(WITH_CEILING)))
def test_measures_without_a_ceiling_say_so(measure):
    rsms = RSMs.from_array(some_distances(3, 12, "plain"), dissimilarity="x")
    with pytest.raises(ComparisonError, match=f"no noise ceiling is known for {measure}; there is one for CKA"):
        noise_ceiling(rsms, measure)


def test_one_subject_has_no_ceiling():
    with pytest.raises(ComparisonError, match="a noise ceiling needs at least 2 subjects, found 1"):
        noise_ceiling(RSMs.from_array(some_distances(1, 8, "plain"), dissimilarity="x"))


def test_a_constant_subject_is_named():
    distances = some_distances(3, 8, "plain")
    distances[1] = 1.0
    rsms = RSMs.from_array(distances, names=["ann", "bob", "cyd"], dissimilarity="x")
    with pytest.raises(ComparisonError, match="the RSM of bob is constant over all pairs of images"):
        noise_ceiling(rsms)


def test_missing_pairs_must_be_allowed():
    rsms = RSMs.from_array(some_distances(3, 8, "holes"), dissimilarity="x", allow_missing=True)
    with pytest.raises(ComparisonError, match="skip_missing=True"):
        noise_ceiling(rsms)
