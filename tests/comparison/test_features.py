"""Comparisons of representations against other packages and their formulas."""

import numpy as np
import pytest
import rsatoolbox
import torch
from ckatorch.core import cka_base
from repsim import cca
from repsim import pwcca as repsim_pwcca
from scipy.linalg import orthogonal_procrustes, subspace_angles
from scipy.spatial import procrustes as scipy_procrustes
from scipy.spatial.distance import pdist
from scipy.stats import ortho_group

from rsm_probe.comparison.features import (
    FEATURE_MEASURES,
    canonical_correlations,
    linear_cka,
    pooled,
    procrustes,
    pwcca,
    sampled,
    svcca,
)
from rsm_probe.errors import ComparisonError


def features(images=80, first=7, second=5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(images, first)) * rng.uniform(0.2, 3.0, size=first) + 4
    return x, x @ rng.normal(size=(first, second)) + rng.normal(size=(images, second))


def centred(x):
    return x - x.mean(axis=0)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("shape", [(20, 7, 5), (30, 400, 300)])
def test_linear_cka_equals_ckatorch(estimator, shape):
    x, y = features(*shape)
    expected = cka_base(torch.from_numpy(x), torch.from_numpy(y), "linear", unbiased=estimator == "unbiased")
    assert linear_cka(torch.from_numpy(x), y, estimator) == pytest.approx(float(expected), abs=1e-7)


def test_canonical_correlations_equal_subspace_angles_and_repsim():
    x, y = features()
    found = canonical_correlations(x, y)
    assert found == pytest.approx(np.sort(np.cos(subspace_angles(centred(x), centred(y))))[::-1], abs=1e-9)
    assert found.mean() == pytest.approx(cca([x, y], "pillai")[0, 1], abs=1e-9)
    assert (found**2).mean() == pytest.approx(cca([x, y], "yanai")[0, 1], abs=1e-9)


def test_svcca_correlates_the_components_that_hold_the_variance():
    x, y = features(first=12, second=9)
    kept = []
    for f in (x, y):
        basis, scale, _ = np.linalg.svd(centred(f), full_matrices=False)
        count = next(k for k in range(1, len(scale) + 1) if (scale[:k] ** 2).sum() >= 0.99 * (scale**2).sum())
        assert count < len(scale), "or nothing is left out"
        kept.append(basis[:, :count])
    assert svcca(x, y) == pytest.approx(np.cos(subspace_angles(*kept)).mean(), abs=1e-9)
    assert svcca(x, y) == pytest.approx(cca(kept, "pillai")[0, 1], abs=1e-9)


def test_svcca_of_all_variance_is_the_mean_of_canonical_correlations():
    x, y = features()
    assert svcca(x, y, 1.0) == pytest.approx(canonical_correlations(x, y).mean(), abs=1e-12)


def test_pwcca_equals_its_formula():
    x, y = features()
    a, b = centred(x), centred(y)
    (qx, rx), (qy, _) = np.linalg.qr(a), np.linalg.qr(b)
    left, rho, _ = np.linalg.svd(qx.T @ qy)
    weights = []
    for k in range(len(rho)):
        direction = a @ np.linalg.solve(rx, left[:, k])
        weights.append(sum(abs(direction @ a[:, j]) for j in range(a.shape[1])))
    assert pwcca(x, y) == pytest.approx(np.average(rho, weights=weights), abs=1e-9)


def test_pwcca_is_weighted_by_the_first():
    x, y = features()
    assert pwcca(x, y) != pytest.approx(pwcca(y, x), abs=1e-6)
    assert pwcca(x, x) == pytest.approx(1, abs=1e-12)
    # repsim takes the mean of both directions.
    assert (pwcca(x, y) + pwcca(y, x)) / 2 == pytest.approx(repsim_pwcca([x, y])[0, 1], abs=1e-9)


def test_procrustes_equals_scipy():
    x, y = features(first=6, second=6)
    a, b = (centred(f) / np.linalg.norm(centred(f)) for f in (x, y))
    assert procrustes(x, y) == pytest.approx(np.linalg.norm(a @ orthogonal_procrustes(a, b)[0] - b), abs=1e-9)
    # SciPy scales the second again, to the best size: its disparity is the squared sine of the same angle.
    cosine = 1 - procrustes(x, y) ** 2 / 2
    assert scipy_procrustes(x, y)[2] == pytest.approx(1 - cosine**2, abs=1e-9)
    raw = orthogonal_procrustes(centred(x), centred(y))[0]
    expected = np.linalg.norm(centred(x) @ raw - centred(y))
    assert procrustes(x, y, normalised=False) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(25, 7, 5), (10, 300, 40)])
def test_procrustes_equals_rsatoolbox_for_any_numbers_of_features(shape):
    x, y = features(*shape)
    first, second = (rsatoolbox.rdm.RDMs(pdist(f, "sqeuclidean")[None]) for f in (x, y))
    cosine = float(rsatoolbox.rdm.compare(first, second, method="bures")[0, 0])
    assert 1 - procrustes(x, y) ** 2 / 2 == pytest.approx(cosine, abs=1e-6)
    assert procrustes(x, y) == pytest.approx(procrustes(y, x), abs=1e-12)


def changed(x, what, rng):
    if what == "rotation":
        return x @ ortho_group.rvs(x.shape[1], random_state=rng)
    if what == "scale":
        return 0.3 * x
    if what == "shift":
        return x + rng.normal(size=x.shape[1])
    return x @ rng.normal(size=(x.shape[1], x.shape[1]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("what", ["rotation", "scale", "shift", "linear map", "images"])
@pytest.mark.parametrize("measure", FEATURE_MEASURES)
def test_the_table_names_the_invariances(measure, what, seed):
    function, about = FEATURE_MEASURES[measure]
    x, y = features(seed=seed)
    rng = np.random.default_rng(seed)
    before = function(x, y)
    if what == "images":
        order = rng.permutation(len(x))
        after = function(x[order], y[order])
    else:
        after = function(changed(x, what, rng), y)
    if what in about.invariances:
        assert after == pytest.approx(before, abs=1e-9)
    elif seed == 0:
        assert abs(after - before) > 1e-6


@pytest.mark.parametrize("measure", FEATURE_MEASURES)
def test_ranges_hold_for_related_and_unrelated_features(measure):
    function, about = FEATURE_MEASURES[measure]
    x, y = features(seed=3)
    other = np.random.default_rng(4).normal(size=y.shape)
    same, related, unrelated = function(x, x), function(x, y), function(x, other)
    if about.kind == "similarity":
        assert same == pytest.approx(1, abs=1e-9)
        assert same > related > unrelated
    else:
        assert same == pytest.approx(0, abs=1e-12)
        assert same < related < unrelated < np.sqrt(2)


def test_more_features_than_images_are_said_to_correlate_perfectly():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 50)), rng.normal(size=(20, 60))
    with pytest.warns(UserWarning, match="19 of 19 canonical correlations are 1 whatever the representations"):
        found = canonical_correlations(x, y)
    assert found == pytest.approx(np.ones(19), abs=1e-6)
    with pytest.warns(UserWarning, match="5 of 9 canonical correlations"):
        found = canonical_correlations(x[:, :15], y[:, :9])
    assert (found > 1 - 1e-9).sum() == 5


def test_pooled_and_sampled_tokens():
    tokens = torch.arange(4 * 3 * 2, dtype=torch.float32).reshape(4, 3, 2)
    assert np.array_equal(pooled(tokens), tokens.mean(1).double().numpy())
    drawn, again, other = sampled(tokens, 5), sampled(tokens, 5), sampled(tokens, 5, seed=1)
    assert drawn.shape == (5, 2)
    assert np.array_equal(drawn, again)
    assert not np.array_equal(drawn, other)
    places = {tuple(row) for row in tokens.reshape(-1, 2).tolist()}
    assert len({tuple(row) for row in drawn.tolist()} & places) == 5
    # The same places of another layer.
    assert np.array_equal(sampled(tokens + 100, 5), drawn + 100)
    with pytest.raises(ComparisonError, match="12 tokens, from which 13"):
        sampled(tokens, 13)
    with pytest.raises(ComparisonError, match=r"shape \(12, 2\); expected \(N, S, C\)"):
        pooled(tokens.reshape(12, 2))


def test_wrong_features_are_named():
    x, y = features(20)
    with pytest.raises(ComparisonError, match=r"second features have shape \(20, 5, 1\).* \(N, S, C\), take pooled"):
        svcca(x, y[:, :, None])
    with pytest.raises(ComparisonError, match="20 and 19 images"):
        procrustes(x, y[1:])
    with pytest.raises(ComparisonError, match="first features are the same for all images"):
        pwcca(np.full((20, 3), 0.1), y)
    bad = y.copy()
    bad[7, 2] = np.inf
    with pytest.raises(ComparisonError, match="NaN or infinity, first in image 7"):
        linear_cka(x, bad)
    with pytest.raises(ComparisonError, match=r"variance must be at most 1.0, found 99"):
        svcca(x, y, 99)
    with pytest.raises(ComparisonError, match="the same for all images"):
        procrustes(x[:1], y[:1])
