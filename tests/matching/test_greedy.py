"""Greedy matching against plain loops: who chooses first, what is free, and what the k largest get."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from rsm_probe import match, match_affinity, rsm
from rsm_probe.errors import MatchingError
from rsm_probe.matching.methods.greedy import Greedy, TopKGreedy

SHAPES = [(1, 1), (1, 6), (6, 1), (9, 9), (17, 9), (9, 17), (40, 40)]


def images(rows, columns, seed, dtype=np.float32):
    """Vectors of very different lengths, so that it matters who chooses first."""
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(n, 5)) * rng.lognormal(size=(n, 1))).astype(dtype) for n in (rows, columns)]


def by_norm(tokens):
    return sorted(range(len(tokens)), key=lambda s: -np.linalg.norm(tokens[s].astype(np.float64)))


def greedy_by_hand(x, y, k):
    """One direction: the k largest of both optimally, then row after row takes the best that is left."""
    affinity = x.astype(np.float64) @ y.astype(np.float64).T
    rows, columns = by_norm(x), by_norm(y)
    k = min(k, len(x), len(y))
    partner = {}
    if k:
        block = affinity[np.ix_(rows[:k], columns[:k])]
        for row, column in zip(*linear_sum_assignment(block, maximize=True), strict=True):
            partner[rows[row]] = columns[column]
    for row in rows:
        free = [column for column in range(len(y)) if column not in partner.values()]
        if row not in partner and free:
            partner[row] = max(free, key=lambda column, row=row: affinity[row, column])
    return sum(affinity[row, column] for row, column in partner.items()), partner


def scale(x, y):
    return float(np.linalg.norm(x.astype(np.float64)) * np.linalg.norm(y.astype(np.float64)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [0, 1, 4, 8])
def test_greedy_is_the_better_of_both_directions_by_hand(shape, dtype, k):
    taken = set()
    for seed in range(8):
        x, y = images(*shape, seed, dtype)
        found = match(x, y, TopKGreedy(k) if k else "greedy")
        (forward, onward), (backward, back) = greedy_by_hand(x, y, k), greedy_by_hand(y, x, k)
        assert abs(found.value - max(forward, backward)) <= 1e-6 * scale(x, y)
        if abs(forward - backward) > 1e-4 * scale(x, y):
            taken.add(forward > backward)
            expected = onward if forward > backward else {row: column for column, row in back.items()}
            assert found.permutation.tolist() == [expected.get(row, -1) for row in range(len(x))]
        partners = found.permutation[found.permutation >= 0]
        assert len(set(partners.tolist())) == len(partners) == min(shape)
        turned = match(y, x, TopKGreedy(k) if k else Greedy())
        assert turned.value == pytest.approx(found.value, abs=1e-6 * scale(x, y))
        assert found.status == "feasible"
    if min(shape) == 40 or (min(shape) > 1 and not k):
        assert taken == {True, False}  # otherwise this test would not see which direction was kept


def test_the_longest_vector_chooses_first_and_the_others_among_what_is_left():
    # Row 1 is the longest and takes column 0, which row 0 would have liked; nothing better remains for row 0.
    x, y = np.array([[2.0, 0.0], [3.0, 0.0]]), np.array([[2.0, 0.0], [-1.0, 0.5]])
    found = match(x, y, "greedy")
    assert found.permutation.tolist() == [1, 0]
    assert found.value == 4.0


@pytest.mark.parametrize("shape", SHAPES)
def test_k_of_all_locations_is_the_optimum(shape):
    for seed in range(4):
        x, y = images(*shape, seed, np.float64)
        affinity = x @ y.T
        rows, columns = linear_sum_assignment(affinity, maximize=True)
        # Of unequal images, the k largest of the larger one are not all of it.
        optimum = affinity[rows, columns].sum() if shape[0] == shape[1] else greedy_by_hand(x, y, 128)[0]
        optimum = max(optimum, greedy_by_hand(y, x, 128)[0])
        assert abs(match(x, y, TopKGreedy(max(shape))).value - optimum) <= 1e-6 * scale(x, y)
        assert abs(match(x, y, "topk-greedy").value - optimum) <= 1e-6 * scale(x, y)


@pytest.mark.parametrize("name", ["greedy", "topk-greedy"])
@pytest.mark.parametrize("kind", ["constant", "zeros", "dead locations", "opposite"])
def test_ties_and_dead_locations_leave_a_permutation(name, kind):
    rng = np.random.default_rng(5)
    x, y = {
        "constant": np.ones((2, 150, 3)),
        "zeros": np.zeros((2, 150, 3)),
        "dead locations": rng.normal(size=(2, 150, 3)) * (rng.random((2, 150, 1)) > 0.7),
        "opposite": np.abs(rng.normal(size=(2, 150, 3))) * np.array([1.0, -1.0])[:, None, None],
    }[kind]
    found = match(x, y, name)
    assert sorted(found.permutation.tolist()) == list(range(150))
    by_hand = max(greedy_by_hand(x, y, 128 * (name != "greedy"))[0], greedy_by_hand(y, x, 128 * (name != "greedy"))[0])
    assert found.value == pytest.approx(by_hand, abs=1e-6 * (scale(x, y) or 1.0))


@pytest.mark.parametrize("method", [Greedy(), TopKGreedy(3)])
@pytest.mark.parametrize("locations", [(12, 12), (12, 7), (7, 12)])
def test_rsm_of_greedy_equals_the_loops_by_hand(method, locations):
    z, other = (
        np.stack([images(n, n, seed)[0] for seed in range(k, k + 3)]) for n, k in zip(locations, (0, 9), strict=True)
    )
    k = getattr(method, "k", 0)
    expected = [[max(greedy_by_hand(x, y, k)[0], greedy_by_hand(y, x, k)[0]) for y in other] for x in z]
    found = rsm(z, other, matching=method, kernel="linear").values
    np.testing.assert_allclose(found, expected, atol=1e-6 * max(scale(x, y) for x in z for y in other))
    alone = rsm(torch.from_numpy(z), matching=method, kernel="linear").values
    np.testing.assert_array_equal(alone, alone.T)


@pytest.mark.parametrize("name", ["greedy", "topk-greedy"])
def test_an_affinity_alone_is_refused_with_what_to_use_instead(name):
    for affinity in (np.ones((3, 3)), np.ones((2, 3, 4))):
        with pytest.raises(MatchingError, match=rf"needs the tokens of both images; use match\(x, y, '{name}'\)"):
            match_affinity(affinity, name)


def test_k_below_one_is_refused():
    with pytest.raises(MatchingError, match="k must be at least 1, found 0"):
        TopKGreedy(0)
