"""Every matching method inside rsm() and Accumulator: one result, whoever asks, on any number of threads."""

import threading
from functools import cache
from math import isqrt
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from rsm_probe import Accumulator, match, rsm
from rsm_probe.errors import MatchingError
from rsm_probe.matching import Matching
from rsm_probe.matching.matching import Solution
from rsm_probe.matching.methods.batch_optimal import BatchOptimal
from rsm_probe.matching.methods.greedy import TopKGreedy
from rsm_probe.matching.methods.rewindowed import Rewindowed
from rsm_probe.matching.methods.scores import SoftMatching
from rsm_probe.matching.methods.translation import Translation
from rsm_probe.matching.registry import get_matching, matching_names
from rsm_probe.probe import Representation

SMALL = [BatchOptimal(5), Rewindowed(5, 3, 1e-9), TopKGreedy(4), SoftMatching(0.2)]
METHODS = [name for name in matching_names() if name != "soft"] + SMALL
ONE_TO_ONE = [m for m in METHODS if get_matching(m)[1].one_to_one]


def label(method):
    return method if isinstance(method, str) else f"{method.name}-small"


def on_square(method, locations=16):
    """The method; shifts need a grid, which tokens alone do not have."""
    return Translation((isqrt(locations),) * 2) if method == "translation" else method


def tokens(images=5, locations=16, channels=6, seed=0, dtype=np.float32):
    """Images that resemble each other, as those of a trained network do; lengths differ between locations."""
    rng = np.random.default_rng(seed)
    shared = np.random.default_rng(100).normal(size=(1, 25, channels))[:, :locations]
    found = (shared + rng.normal(size=(images, locations, channels))) * rng.lognormal(size=(images, locations, 1))
    return found.astype(dtype)


def product_scales(x, y):
    norms = [np.sqrt((z.astype(np.float64) ** 2).sum(axis=(1, 2))) for z in (x, y)]
    return np.outer(*norms)


@cache
def optimal_products(locations, dtype):
    z = tokens(locations=locations, dtype=dtype).astype(np.float64)
    found = np.zeros((len(z), len(z)))
    for i, j in np.ndindex(found.shape):
        affinity = z[i] @ z[j].T
        found[i, j] = affinity[linear_sum_assignment(affinity, maximize=True)].sum()
    return found


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", METHODS, ids=label)
def test_rsm_is_symmetric_and_equals_match_pair_by_pair(method, dtype):
    z, other, method = tokens(4, dtype=dtype), tokens(3, seed=1, dtype=dtype), on_square(method)
    alone = rsm(z, matching=method, kernel="linear")
    np.testing.assert_array_equal(alone.values, alone.values.T)
    expected = np.array([[match(x, y, method).value for y in z] for x in z])
    assert (np.abs(alone.values - expected) <= 1e-6 * product_scales(z, z)).all()
    both = rsm(z, other, matching=method, kernel="linear").values
    expected = np.array([[match(x, y, method).value for y in other] for x in z])
    assert (np.abs(both - expected) <= 1e-6 * product_scales(z, other)).all()
    turned = rsm(other, z, matching=method, kernel="linear").values
    assert (np.abs(turned.T - both) <= 1e-6 * product_scales(z, other)).all()


@pytest.mark.parametrize("method", METHODS, ids=label)
@pytest.mark.parametrize("locations", [(16, 9), (9, 16), (1, 9), (16, 1), (1, 1)])
def test_rsm_with_a_database_of_other_sizes_equals_match_pair_by_pair(method, locations):
    z, other = tokens(3, locations[0]), tokens(2, locations[1], seed=1)
    if get_matching(method)[0] == "translation" and locations != (1, 1):
        with pytest.raises(MatchingError, match="grid"):
            rsm(z, other, matching=method, kernel="linear")
        return
    found = rsm(z, other, matching=method, kernel="linear").values
    expected = np.array([[match(x, y, method).value for y in other] for x in z])
    assert (np.abs(found - expected) <= 1e-6 * product_scales(z, other)).all()


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_workers_and_memory_change_no_bit(method):
    z, method = tokens(6), on_square(method)
    first = rsm(z, matching=method, kernel="linear", workers=1).values
    for options in ({"workers": 3}, {"workers": 3, "memory": 16 * 16 * 4}, {"workers": 1, "memory": "2KB"}):
        np.testing.assert_array_equal(rsm(z, matching=method, kernel="linear", **options).values, first)
    accumulator = Accumulator(matchings=(method,), kernels=("linear",), keep=["a"], workers=3)
    with accumulator:
        given = torch.from_numpy(z)
        accumulator.update({"a": Representation(given, given[:, :0], None)})
        np.testing.assert_array_equal(accumulator.result().rsms.values[0, 0], first)


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_one_image_is_compared_with_itself(method):
    for shape in ((1, 16, 3), (1, 1, 3), (1, 16, 1), (1, 1, 1)):
        z, used = np.random.default_rng(2).normal(size=shape), on_square(method, shape[1])
        found = rsm(z, matching=used, kernel="linear").values
        assert found.shape == (1, 1)
        if get_matching(used)[1].one_to_one:
            assert found[0, 0] == pytest.approx((z**2).sum(), rel=1e-12)
            assert rsm(z, matching=used).values[0, 0] == pytest.approx(1.0, rel=1e-12)
            assert rsm(z, matching=used, kernel="rbf").values[0, 0] == 1.0


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_with_one_location_everything_is_the_inner_product(method):
    z = tokens(4, 1).astype(np.float64)
    found = rsm(z, matching=method, kernel="linear").values
    np.testing.assert_allclose(found, z[:, 0] @ z[:, 0].T, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("locations", [4, 16])
@pytest.mark.parametrize("method", ONE_TO_ONE, ids=label)
def test_no_method_exceeds_the_optimum_and_exact_ones_reach_it(method, locations, dtype):
    z, method = tokens(locations=locations, dtype=dtype), on_square(method, locations)
    values = rsm(z, matching=method, kernel="linear").values
    assert (values <= optimal_products(locations, dtype) + 1e-6 * product_scales(z, z)).all()
    if get_matching(method)[1].exact:
        assert (values >= optimal_products(locations, dtype) - 1e-6 * product_scales(z, z)).all()
    cosines = rsm(z, matching=method).values
    np.testing.assert_allclose(np.diagonal(cosines), 1.0, rtol=1e-12)
    assert np.abs(cosines).max() <= 1.0


@pytest.mark.parametrize("locations", [1, 2, 3, 16])
@pytest.mark.parametrize("kind", ["any", "alike", "dead", "sparse", "rounded"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_optimal_is_at_least_identity_to_the_last_bit(locations, kind, dtype):
    z = tokens(8, locations, dtype=dtype)
    if kind == "alike":
        z = z[:1] + 1e-3 * z  # the identity is the optimum, or nearly so
    elif kind == "dead":
        z[::2] = 0
    elif kind == "sparse":
        z = np.maximum(z - 1, 0)
    elif kind == "rounded":
        z = np.round(z)
    for kernel in ("linear", "cosine"):
        identity, optimal = (rsm(z, matching=name, kernel=kernel).values for name in ("identity", "optimal"))
        assert (optimal >= identity).all()
        identity, optimal = (rsm(z, z[::-1], name, kernel).values for name in ("identity", "optimal"))
        assert (optimal >= identity).all()


class ByPermutation(Matching):
    """Reversed order, from one affinity at a time."""

    name, exact, symmetric, needs_affinity, growth = "reversed", False, True, True, 1.0

    def permutation(self, affinity):
        return np.arange(len(affinity))[::-1].copy()


class BySolve(Matching):
    """Reversed order, from tokens."""

    name: ClassVar[str] = "reversed"
    exact, symmetric, needs_affinity, growth = False, True, False, 1.0

    def solve(self, pairs):
        x, y = pairs.images()
        found = np.tile(np.arange(x.count)[::-1], (len(pairs), 1))
        values = [
            float((x.tokens[i].double() * y.tokens[j].double().flip(0)).sum())
            for i, j in zip(pairs.rows, pairs.columns, strict=True)
        ]
        return Solution(np.array(values), found, np.full(len(pairs), np.nan), ["mine"] * len(pairs))


@pytest.mark.parametrize("method", [ByPermutation(), BySolve()], ids=["permutation", "solve"])
def test_own_methods_work_wherever_a_name_does(method):
    z, other = tokens(4), tokens(3, seed=1)
    expected = np.einsum("isc,jsc->ij", z.astype(np.float64), other[:, ::-1].astype(np.float64))
    tolerance = 1e-6 * product_scales(z, other)
    assert (np.abs(rsm(z, other, method, "linear").values - expected) <= tolerance).all()
    found = match(z[0], other[0], method)
    assert abs(found.value - expected[0, 0]) <= tolerance[0, 0]
    assert found.permutation.tolist() == list(range(16))[::-1]
    assert found.solver == ("mine" if isinstance(method, BySolve) else "reversed")
    assert found.bound >= found.value
    assert match(z[0], other[0], method, certify=True).bound >= match(z[0], other[0]).value - tolerance[0, 0]
    alone = rsm(z, matching=method, kernel="linear")
    np.testing.assert_array_equal(alone.values, alone.values.T)
    with Accumulator(matchings=("identity", method), kernels=("linear", "rbf"), keep=["a"]) as accumulator:
        given = torch.from_numpy(z)
        accumulator.update({"a": Representation(given, given[:, :0], None)})
        stored = accumulator.result().rsms
    assert stored.shape[1:] == (4, 4, 4)
    np.testing.assert_array_equal(stored.values[0, 2], alone.values)


def test_a_grid_that_does_not_hold_the_locations_matters_to_shifts_only():
    z = tokens(3)
    for name in ("identity", "optimal", "rewindowed"):
        expected = rsm(z, matching=name).values
        np.testing.assert_array_equal(rsm(z, matching=name, grid=(3, 3)).values, expected)
    np.testing.assert_array_equal(rsm(z, matching=Translation((2, 8))).values, rsm(z, None, "translation", grid=(2, 8)))


@pytest.mark.parametrize("method", ["identity", "optimal", "rewindowed", "translation"])
@pytest.mark.parametrize("before", [1, 2])
def test_threads_of_pytorch_are_what_they_were_after_an_rsm(method, before):
    kept = torch.get_num_threads()
    seen = []
    try:
        torch.set_num_threads(before)
        rsm(tokens(4), matching=on_square(method), workers=3)
        assert torch.get_num_threads() == before
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [before]
    finally:
        torch.set_num_threads(kept)


class Doubled(ByPermutation):
    """A score of one's own that is not the inner product, even of single locations."""

    name, one_to_one = "doubled", False

    def solve(self, pairs):
        values = 2 * pairs.affinities().max(axis=(1, 2)).astype(np.float64)
        return Solution(values, None, np.full(len(pairs), np.nan), ["doubled"] * len(pairs))


@pytest.mark.parametrize(
    "locations",
    [4, 1],
)
def test_scores_of_ones_own_are_asked_whatever_the_number_of_locations(locations):
    z = tokens(3, locations)
    expected = [[match(x, y, Doubled()).value for y in z] for x in z]
    np.testing.assert_allclose(rsm(z, matching=Doubled(), kernel="linear").values, expected, rtol=1e-6)
