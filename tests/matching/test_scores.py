"""Scores, which pair nothing: against loops and POT by hand; what they refuse, and extras that are missing."""

import sys

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.special import logsumexp

from rsm_probe import Accumulator, match, match_affinity, rsm
from rsm_probe.errors import ComparisonError, MatchingError
from rsm_probe.matching.methods.scores import LateInteraction, SoftMatching
from rsm_probe.probe import Representation

SHAPES = [(1, 1), (1, 5), (5, 1), (6, 6), (4, 9), (9, 4)]
QUICK = SoftMatching(regularisation=0.2)


def images(rows, columns, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, 5)).astype(dtype), rng.normal(size=(columns, 5)).astype(dtype)


def late_interaction_by_hand(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    onward = sum(max(float(a @ b) for b in y) for a in x)
    back = sum(max(float(a @ b) for a in x) for b in y)
    return (onward + back) / 2


def sinkhorn_by_hand(affinity, regularisation, rounds=20_000):
    """Entropic transport of uniform masses, in logarithms; its value times the number of the smaller side."""
    rows, columns = affinity.shape
    logs = affinity / (affinity.max() - affinity.min()) / regularisation
    left, right = np.zeros(rows), np.zeros(columns)
    for _ in range(rounds):
        before, left = left, -np.log(rows) - logsumexp(logs + right, axis=1)
        right = -np.log(columns) - logsumexp(logs + left[:, None], axis=0)
        if np.abs(left - before).max() < 1e-13:
            break
    return float((np.exp(left[:, None] + logs + right) * affinity).sum() * min(rows, columns))


def optimum(affinity):
    rows, columns = linear_sum_assignment(affinity, maximize=True)
    return affinity[rows, columns].sum()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_late_interaction_is_the_mean_over_both_directions_of_the_best_answers(shape, dtype):
    for seed in range(5):
        x, y = images(*shape, seed, dtype)
        expected = late_interaction_by_hand(x, y)
        ways = [
            match(x, y, "late-interaction"),
            match(y, x, LateInteraction()),
            match_affinity(x @ y.T, LateInteraction()),
        ]
        for found in ways:
            assert found.value == pytest.approx(expected, rel=1e-5 if dtype == np.float32 else 1e-12)
            assert found.permutation is None
            assert found.bound is None
            assert found.gap is None
            assert (found.solver, found.status) == ("late-interaction", "feasible")


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 5)])
@pytest.mark.parametrize("regularisation", [0.05, 0.2, 1.0])
def test_soft_matching_is_entropic_transport(shape, regularisation):
    x, y = images(*shape)
    affinity = x @ y.T
    found = match(x, y, SoftMatching(regularisation, iterations=20_000))
    # POT stops at a marginal error of 1e-9, checked every tenth round.
    assert found.value == pytest.approx(sinkhorn_by_hand(affinity, regularisation), abs=1e-6 * np.abs(affinity).sum())
    cost = (affinity.max() - affinity) / (affinity.max() - affinity.min())
    masses = [np.full(n, 1 / n) for n in shape]
    plan = ot.sinkhorn(*masses, cost, regularisation, method="sinkhorn_log", numItermax=20_000)
    assert found.value == pytest.approx((plan * affinity).sum() * min(shape), abs=1e-6 * np.abs(affinity).sum())
    assert found.permutation is None
    assert found.bound is None
    turned = match(y, x, SoftMatching(regularisation, iterations=20_000))
    assert turned.value == pytest.approx(found.value, abs=1e-6 * np.abs(affinity).sum())


def test_soft_matching_tends_to_the_optimum_as_the_regularisation_falls():
    x, y = images(8, 8, 3)
    affinity = x @ y.T
    spread = affinity.max() - affinity.min()
    last = np.inf
    for regularisation in (0.3, 0.1, 0.03, 0.01):
        found = match(x, y, SoftMatching(regularisation, iterations=20_000)).value
        # Entropy is worth regularisation * spread * log S per unit of mass at most, and there are S units.
        lost = optimum(affinity) - found
        assert -1e-5 * spread <= lost <= regularisation * spread * 8 * np.log(8) + 1e-5 * spread
        assert lost <= last
        last = lost


def test_soft_matching_of_unequal_images_moves_the_smaller_one_in_full():
    # All of y is one vector: whatever moves where, every location of x gives its product with it.
    x, y = images(4, 1)[0], np.tile(images(1, 1, 1)[1], (9, 1))
    assert match(x, y, QUICK).value == pytest.approx((x @ y[0]).sum(), rel=1e-6)


@pytest.mark.parametrize("method", [LateInteraction(), QUICK])
@pytest.mark.parametrize("value", [0.0, 1.0, -2.0])
def test_constant_images_score_what_every_matching_gives(method, value):
    x, y = np.ones((6, 3)), np.full((6, 3), value)
    assert match(x, y, method).value == pytest.approx(18 * value)
    assert match_affinity(np.full((6, 6), value), method).value == pytest.approx(6 * value)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("method", [LateInteraction(), QUICK])
def test_scores_grow_with_the_scale_of_the_tokens(method, scale):
    x, y = images(6, 6, dtype=np.float32)
    expected = match(x, y, method).value * scale**2
    assert match(x * np.float32(scale), y * np.float32(scale), method).value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["late-interaction", "soft", LateInteraction(), SoftMatching(0.5)])
@pytest.mark.parametrize("kernel", ["cosine", "rbf"])
def test_kernels_of_norms_are_refused_for_scores(method, kernel):
    z = torch.randn(4, 3, 2)
    with pytest.raises(ComparisonError, match=f"is a score.*{kernel} kernel does not apply; use kernel='linear'"):
        rsm(z, matching=method, kernel=kernel)
    with pytest.raises(ComparisonError, match=f"is a score.*{kernel} kernel does not apply; use kernel='linear'"):
        Accumulator(matchings=("identity", method), kernels=("linear", kernel))


@pytest.mark.parametrize("matching", [LateInteraction(), QUICK])
def test_an_rsm_of_scores_cannot_be_given_a_kernel_of_norms_afterwards(matching):
    found = rsm(torch.randn(3, 4, 2), matching=matching, kernel="linear")
    for kernel in ("cosine", "rbf"):
        with pytest.raises(ComparisonError, match="does not apply"):
            found.with_kernel(kernel)


@pytest.mark.parametrize("method", [LateInteraction(), QUICK])
@pytest.mark.parametrize("locations", [1, 2, 7])
def test_linear_rsm_holds_scores_and_on_its_diagonal_every_image_with_itself(method, locations):
    z = np.random.default_rng(0).normal(size=(5, locations, 4))
    found = rsm(z, matching=method, kernel="linear").values
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_allclose(found, [[match(a, b, method).value for b in z] for a in z], rtol=1e-6, atol=1e-6)
    if method == LateInteraction():
        np.testing.assert_allclose(found, [[late_interaction_by_hand(a, b) for b in z] for a in z], rtol=1e-9)
    if locations == 7:
        assert np.isclose(np.diagonal(found), (z**2).sum(axis=(1, 2)), rtol=1e-3).sum() < 4
    np.testing.assert_allclose(rsm(z, z, matching=method, kernel="linear").values, found, rtol=1e-6, atol=1e-6)
    with Accumulator(matchings=(method,), kernels=("linear",), keep=["a"]) as accumulator:
        tokens = torch.from_numpy(z)
        accumulator.update({"a": Representation(tokens, tokens[:, :0], None)})
        np.testing.assert_allclose(accumulator.result().rsms.values[0, 0], found, rtol=1e-9)


@pytest.mark.parametrize(("name", "module", "extra"), [("soft", "ot", "soft"), ("ortools", "ortools", "ortools")])
def test_an_extra_that_is_missing_is_named(name, module, extra, monkeypatch):
    for loaded in [key for key in sys.modules if key == module or key.startswith(module + ".")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    x, y = images(4, 4)
    for use in (
        lambda: match(x, y, name),
        lambda: match_affinity(x @ y.T, name),
        lambda: rsm(np.stack([x, y]), matching=name, kernel="linear"),
    ):
        with pytest.raises(MatchingError, match=rf"not installed; pip install 'rsm-probe\[{extra}\]'"):
            use()


@pytest.mark.parametrize("regularisation", [0, -1, float("nan")])
def test_regularisation_must_be_above_zero(regularisation):
    with pytest.raises(MatchingError, match=r"regularisation must be (above 0|a finite number)"):
        SoftMatching(regularisation)


def test_soft_matching_never_exceeds_the_optimum_by_much():
    x, y = np.random.default_rng(22).normal(size=(2, 9, 3))
    assert match(x, y, SoftMatching(1e-4)).value <= optimum(x @ y.T) * 1.001
