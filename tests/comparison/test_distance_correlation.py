"""The bias-corrected distance correlation against dcor and its formula."""

import dcor
import numpy as np
import pytest
from scipy.spatial.distance import pdist, squareform

from rsm_probe import RSM, bootstrap, cka
from rsm_probe.comparison import (
    MEASURES,
    DistanceCorrelation,
    bootstrap_batches,
    compare,
    compare_batches,
    distance_correlation,
    get_estimator,
    permutation_test,
)
from rsm_probe.comparison.grid import RsmKey
from rsm_probe.errors import ComparisonError


def features(kind, images=25, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(images, 5))
    y = np.abs(x[:, :3]) + 0.5 * rng.normal(size=(images, 3))
    if kind == "tied":
        return np.round(x), np.round(y)
    if kind == "copies":
        return x[np.arange(images) // 2], y[np.arange(images) // 3]
    if kind == "unrelated":
        return x, rng.normal(size=(images, 300))
    if kind == "two values":
        return np.arange(images)[:, None] % 2.0, x
    return x, y


def gram(x):
    return x @ x.T


KINDS = ["related", "tied", "copies", "unrelated", "two values"]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_linear_rsms_give_what_dcor_gives_for_features(kind, seed, exponent):
    x, y = features(kind, seed=seed)
    expected = dcor.u_distance_correlation_sqr(x, y, exponent=exponent)
    assert distance_correlation(gram(x), gram(y), exponent) == pytest.approx(expected, abs=1e-8)


def written_out(a, b):
    """Székely & Rizzo 2014: the cosine between U-centred distances, without their diagonals."""
    n, centred = len(a), []
    for d in (a, b):
        sums, u = d.sum(axis=1), np.zeros((n, n))
        for i in range(n):
            for j in range(n):
                if i != j:
                    u[i, j] = d[i, j] - (sums[i] + sums[j]) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
        centred.append(u)
    return (centred[0] * centred[1]).sum() / np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())


@pytest.mark.parametrize("metric", ["euclidean", "cityblock", "cosine"])
@pytest.mark.parametrize("kind", ["related", "tied", "copies"])
def test_rsms_of_distances_use_them_as_they_are_or_their_roots(kind, metric):
    first, second = (squareform(pdist(f + 4, metric)) for f in features(kind))
    k, l = (RSM.from_array(d, kind="distance") for d in (first, second))  # noqa: E741
    assert distance_correlation(k, l, 2) == pytest.approx(written_out(first, second), abs=1e-8)
    roots = np.sqrt(np.maximum(first, 0)), np.sqrt(np.maximum(second, 0))
    assert distance_correlation(k, l) == pytest.approx(written_out(*roots), abs=1e-6 if kind == "copies" else 1e-8)


def test_squared_euclidean_distances_and_inner_products_give_the_same():
    x, y = features("related")
    squared = (RSM.from_array(squareform(pdist(f, "sqeuclidean")), kind="distance") for f in (x, y))
    assert distance_correlation(*squared) == pytest.approx(distance_correlation(gram(x), gram(y)), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_exponent_2_is_unbiased_cka(kind):
    k, l = map(gram, features(kind))  # noqa: E741
    assert distance_correlation(k, l, 2) == pytest.approx(cka(k, l), abs=1e-10)


def test_it_sees_dependence_that_cka_does_not():
    x = np.linspace(-1, 1, 60)[:, None]
    assert abs(cka(gram(x), gram(x**2))) < 0.05
    assert distance_correlation(gram(x), gram(x**2)) > 0.15
    found = permutation_test({"x": gram(x)}, {"y": gram(x**2)}, "distance-correlation", repeats=99)
    assert found["p"].item() == 0.01


def test_the_mean_over_unrelated_features_is_0():
    values = [distance_correlation(*map(gram, features("unrelated", 20, seed))) for seed in range(100)]
    assert abs(np.mean(values)) < 0.02
    assert min(values) < 0, "no root is taken"


def test_negative_squared_distances_count_as_0():
    rng = np.random.default_rng(0)
    noisy = squareform(pdist(features("related")[0], "sqeuclidean"))
    noise = rng.normal(size=noisy.shape)
    noisy += np.triu(noise, 1) + np.triu(noise, 1).T
    assert noisy.min() < 0
    other = squareform(pdist(features("related")[1], "sqeuclidean"))
    found = distance_correlation(RSM.from_array(noisy, kind="distance"), RSM.from_array(other, kind="distance"))
    assert found == pytest.approx(written_out(np.sqrt(np.maximum(noisy, 0)), np.sqrt(other)), abs=1e-10)


def test_constant_distances_have_no_value_and_are_named():
    k = gram(features("related")[0])
    for flat in (np.full((25, 25), 0.7), np.eye(25)):
        with pytest.raises(ComparisonError, match=r"the first RSM is constant.*distance-correlation is undefined"):
            distance_correlation(flat, k)
        with pytest.warns(UserWarning, match="distance-correlation is undefined .*first flat"):
            grid = compare({"flat": flat, "k": k}, measure="distance-correlation", eigenvalues=False)
        assert np.isnan(grid.values).tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("exponent", [0, -1, 2.1, np.nan, "1", True])
def test_wrong_exponents_are_refused(exponent):
    with pytest.raises(ComparisonError, match="exponent must be"):
        DistanceCorrelation(exponent)


def test_wrong_rsms_are_refused():
    k = gram(features("related")[0])
    with pytest.raises(ComparisonError, match="needs at least 4 images"):
        distance_correlation(k[:3, :3], k[:3, :3])
    bad = k.copy()
    bad[3, 1] = bad[1, 3] = np.nan
    with pytest.raises(ComparisonError, match="second RSM holds nan for images 1 and 3"):
        distance_correlation(k, bad)


def distances(k, exponent=1.0):
    own = np.diag(k)
    return np.maximum(own[:, None] + own - 2 * k, 0) ** (exponent / 2)


def test_draws_of_images_are_those_of_cka_of_the_distances():
    k, l = map(gram, features("related"))  # noqa: E741
    found = bootstrap({"k": k}, {"l": l}, "distance-correlation", repeats=30, seed=2)
    expected = bootstrap({"k": -distances(k)}, {"l": -distances(l)}, "cka", repeats=30, seed=2)
    for part in ("value", "low", "high", "std"):
        assert found[part].item() == pytest.approx(expected[part].item(), abs=1e-10)


@pytest.mark.parametrize("scale", [1.0, 1e80, 1e-80])
def test_mini_batches_sum_distance_covariances(scale):
    class Batches:
        keys = tuple(RsmKey("net", str(n), n, "optimal", "linear") for n in range(2))
        sizes = (12, 20, 15)

        @staticmethod
        def rsms(batch):
            size = scale if batch == 1 else 1.0
            return np.stack([size * gram(f) for f in features("related", Batches.sizes[batch], seed=batch)])

    for exponent in (1.0, 0.6):
        sums = np.zeros((2, 2))
        for batch in range(3):
            stack = np.stack([distances(k, exponent) for k in Batches.rsms(batch)])
            rows = get_estimator("unbiased").rows(stack) * np.sqrt(len(stack[0]) * (len(stack[0]) - 3))
            sums += rows @ rows.T
        own = np.sqrt(np.diag(sums))
        measure = DistanceCorrelation(exponent)
        np.testing.assert_allclose(compare_batches(Batches, measure), sums / np.outer(own, own), atol=1e-10)
        drawn = bootstrap_batches(Batches, measure, repeats=20)
        assert drawn.attrs["drawn"] == "images"
        assert (drawn["low"] <= drawn["high"]).all()


def test_it_is_found_by_name_and_claims_no_interval_of_exact_matching():
    assert MEASURES["distance-correlation"] == DistanceCorrelation(1.0)
    assert DistanceCorrelation().certified() is None
