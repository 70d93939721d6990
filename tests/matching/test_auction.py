"""The exact auction: hard families within a budget of bids, its certificate, and its agreement with other solvers."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from rsm_probe import match, match_affinity
from rsm_probe.errors import MatchingError
from rsm_probe.matching.methods.optimal import Auction, auction

GAP = Auction().gap
# What sums of float32 numbers may differ by, relative to the reference scale.
FLOAT32_ROUNDING = 2e-6
# What float64 sums may leave of a bound that equals the optimum.
SLACK = 1e-12
# From 512 locations on, rows remember candidates; 513 leave 63 columns of padding, 64 none.
SIZES = [(64, 64), (100, 100), (257, 257), (513, 513), (600, 600), (300, 500), (600, 550), (1, 1), (1, 9), (9, 1)]
DTYPES = [np.float32, np.float64]
METHODS = ["optimal", "identity", "batch-optimal", "rewindowed", "greedy", "topk-greedy"]
SIDES = st.integers(1, 40)
SIZE = st.one_of(st.tuples(SIDES, SIDES), SIDES.map(lambda side: (side, side)))


def relu(count, dead, rng):
    tokens = np.maximum(rng.normal(size=(count, 16)), 0)
    tokens[dead] = 0
    return tokens


def few_distinct(rows, columns, kinds, rng):
    return rng.normal(size=kinds)[rng.integers(0, kinds[0], rows)][:, rng.integers(0, kinds[1], columns)]


def norms_over_6_decades(count, rng):
    return rng.normal(size=(count, 16)) * 10 ** rng.uniform(-3, 3, (count, 1))


# Bids per row that a family may need: some 2.5 times the most that was measured over four seeds, all sizes above and
# both precisions, which is what the comments give.
FAMILIES = {
    "zeros": (lambda s, t, rng: np.zeros((s, t)), 0),  # 0
    "constant": (lambda s, t, rng: np.full((s, t), rng.normal()), 95),  # 38, and 0 where S = T
    "dead halves": (lambda s, t, rng: relu(s, np.s_[::2], rng) @ relu(t, np.s_[::2], rng).T, 110),  # 44; 9 where S = T
    "dead unequal": (lambda s, t, rng: relu(s, np.s_[: s // 5], rng) @ relu(t, np.s_[: 2 * t // 3], rng).T, 350),  # 140
    "dead signed": (
        lambda s, t, rng: rng.normal(size=(s, t)) * np.outer(np.arange(s) % 2, np.arange(t) > 9),
        300,
    ),  # 119
    "duplicates": (lambda s, t, rng: few_distinct(s, t, (4, 4), rng), 205),  # 81
    "uneven duplicates": (lambda s, t, rng: few_distinct(s, t, (7, 5), rng), 170),  # 67
    "rank one": (lambda s, t, rng: np.outer(rng.lognormal(0, 2, s), rng.lognormal(0, 2, t)), 1000),  # 385
    "Machol-Wien": (lambda s, t, rng: np.outer(np.arange(1.0, s + 1), np.arange(1.0, t + 1)), 230),  # 93
    "negative Machol-Wien": (lambda s, t, rng: -np.outer(np.arange(1.0, s + 1), np.arange(1.0, t + 1)), 160),  # 65
    "lognormal": (lambda s, t, rng: norms_over_6_decades(s, rng) @ norms_over_6_decades(t, rng).T, 1000),  # 395
    "integers": (lambda s, t, rng: rng.integers(-3, 4, (s, t)).astype(float), 280),  # 112
    "binary": (lambda s, t, rng: (rng.random((s, t)) < 2 / s).astype(float), 300),  # 119
    "normal": (lambda s, t, rng: rng.normal(size=(s, t)), 230),  # 91, and 13 where S = T
    "features": (lambda s, t, rng: rng.normal(size=(s, 16)) @ rng.normal(size=(16, t)), 245),  # 98, and 17 where S = T
    "offset": (lambda s, t, rng: 1e6 + rng.normal(size=(s, t)), 85),  # 32
    "almost constant": (lambda s, t, rng: 1 + 1e-7 * np.abs(rng.normal(size=(s, t))), 90),  # 35
    "mixed rows": (lambda s, t, rng: rng.normal(size=(s, t)) * 10 ** rng.uniform(-15, 15, (s, 1)), 310),  # 123
    "outlier": (lambda s, t, rng: rng.normal(size=(s, t)) + 1e7 * (np.arange(s * t).reshape(s, t) == 0), 235),  # 94
}


def family(name, rows, columns, dtype=np.float64, seed=0):
    return FAMILIES[name][0](rows, columns, np.random.default_rng(seed)).astype(dtype)


def optimum_and_reference(affinity):
    """SciPy's optimum, and the scale that errors are relative to; both in float64."""
    affinity = affinity.astype(np.float64)
    optimum = affinity[linear_sum_assignment(affinity, maximize=True)].sum()
    return optimum, max(np.linalg.norm(affinity), abs(optimum))


def assert_optimal(found, affinity, gap=GAP):
    """A proper matching of SciPy's value, under a bound that lies above the optimum and is as close as promised."""
    unit = np.abs(affinity.astype(np.float64)).max() or 1.0
    optimum, reference = optimum_and_reference(affinity / unit)
    rows = np.flatnonzero(found.permutation >= 0)
    assert len(rows) == len(set(found.permutation[rows].tolist())) == min(affinity.shape)
    by_hand = (affinity[rows, found.permutation[rows]].astype(np.float64) / unit).sum()
    assert abs(found.value / unit - by_hand) <= SLACK * reference
    assert abs(found.value / unit - optimum) <= FLOAT32_ROUNDING * reference
    assert found.bound / unit >= optimum - SLACK * reference
    assert found.gap / unit <= gap * reference * (1 + 1e-6) or found.solver == "scipy"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_hard_families_are_solved_and_certified_within_their_budget_of_bids(name, dtype):
    for size in SIZES:
        affinity = family(name, *size, dtype)
        found = auction(affinity[None], np.zeros(1), GAP)
        assert found.certified[0], size
        assert found.bids[0] <= FAMILIES[name][1] * max(size), size
        assert_optimal(match_affinity(affinity), affinity)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_bounds_of_auctions_that_were_stopped_early_still_hold(name, dtype):
    for size in [(64, 64), (40, 57), (57, 40), (600, 600)]:
        affinity = family(name, *size, dtype, seed=1)
        optimum, reference = optimum_and_reference(affinity)
        for bids_per_row in (1, 2, 5):
            found = auction(affinity[None], np.zeros(1), GAP, bids_per_row)
            assert found.bounds[0] >= optimum - SLACK * reference
            assert found.bids[0] <= bids_per_row * max(size)
            # Nothing within a phase can be trusted, unless everything is worth the same.
            assert found.certified[0] == np.isfinite(found.values[0])
        rescued = match_affinity(affinity, Auction(bids_per_row=1))
        assert_optimal(rescued, affinity)
        assert rescued.solver == "scipy" or name == "zeros" or (name == "constant" and size[0] == size[1])


@pytest.mark.parametrize("dtype", DTYPES)
# Powers of ten; float32 is rescaled below -20 and above 25, and holds nothing but denormals below -38.
@pytest.mark.parametrize("power", [-44, -38, -30, -22, -20, 15, 18, 26, 30, 38])
def test_affinities_of_any_scale_are_solved_and_certified(power, dtype):
    for name in ("normal", "features", "lognormal", "constant", "duplicates", "dead unequal"):
        for size in [(64, 64), (40, 57)]:
            affinity = family(name, *size)
            affinity = (affinity / np.abs(affinity).max() * 10.0**power).astype(dtype)
            found = match_affinity(affinity)
            assert found.solver.startswith("auction")
            assert_optimal(found, affinity)


# Squares leave float32 from 1e19 on, and float64 from 1e154 on.
@pytest.mark.parametrize(("dtype", "scale"), [(np.float32, 1e20), (np.float64, 1e160)])
def test_affinities_whose_squares_overflow_are_held_to_the_same_gap(dtype, scale):
    affinity = family("normal", 64, 64)
    affinity = (affinity / np.abs(affinity).max() * scale).astype(dtype)
    assert_optimal(match_affinity(affinity), affinity)


def test_the_largest_float64_affinities_are_solved():
    affinity = np.array([[1e308, 0.0], [0.0, 1.0]])
    assert_optimal(match_affinity(affinity), affinity)


def test_a_batch_may_mix_scales():
    rng = np.random.default_rng(0)
    batch = (rng.normal(size=(2, 20, 20)) * np.array([1e30, 1e-15])[:, None, None]).astype(np.float32)
    for found, affinity in zip(match_affinity(batch), batch, strict=True):
        assert_optimal(found, affinity)


def test_the_gap_is_relative_to_the_true_norm_where_sampled_rows_are_the_largest():
    affinity = np.random.default_rng(0).standard_normal((3072, 3072), np.float32)
    affinity[:: 3072 // 256] *= 100
    found = match_affinity(affinity)
    assert found.gap <= GAP * max(np.linalg.norm(affinity.astype(np.float64)), abs(found.value))


def test_the_solver_says_what_ran_and_what_float32_cannot_prove_is_finished_in_float64():
    affinity = family("rank one", 300, 300)
    assert match_affinity(affinity.astype(np.float32)).solver == "auction"
    assert match_affinity(affinity).solver == "auction-float64"
    assert match_affinity(affinity, Auction(bids_per_row=2)).solver == "scipy"
    # Prices in float32 carry some 1e-7 of the range, so a gap of 1e-9 needs more.
    for name in ("rank one", "lognormal", "normal", "features"):
        affinity = family(name, 257, 257, np.float32)
        found = match_affinity(affinity, Auction(gap=1e-9))
        assert found.solver == "auction-float64"
        assert_optimal(found, affinity, 1e-9)
    # Among two rows each bid raises a price by the whole range; after six phases, float32 cannot tell 1e-6 of it.
    tiny = np.array([[0, 2.1330512], [0, -3.5280097]], np.float32)
    assert match_affinity(tiny).solver == "auction-float64"
    assert_optimal(match_affinity(tiny), tiny)


@pytest.mark.parametrize("gap", [1e-3, 1e-9, 1e-12])
@pytest.mark.parametrize("name", FAMILIES)
def test_float64_reaches_any_gap_that_may_be_asked_for(name, gap):
    affinity = family(name, 100, 100)
    found = match_affinity(affinity, Auction(gap=gap))
    optimum, reference = optimum_and_reference(affinity)
    assert found.gap == found.bound - found.value
    assert -SLACK * reference <= optimum - found.value <= (gap + SLACK) * reference
    assert found.gap <= (gap + SLACK) * reference


def test_gaps_out_of_range_and_budgets_without_bids_are_refused():
    for gap in (0, -1e-6, 1e-13, 1, np.nan):
        with pytest.raises(MatchingError, match=rf"gap must lie in \[1e-12, 1\), found {gap}"):
            Auction(gap=gap)
    with pytest.raises(MatchingError, match="bids_per_row must be at least 1, found 0"):
        Auction(bids_per_row=0)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(FAMILIES)), size=SIZE, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32 - 1))
def test_all_exact_methods_agree_on_the_value(name, size, dtype, seed):
    pytest.importorskip("ortools")
    affinity = family(name, *size, dtype, seed)
    optimum, reference = optimum_and_reference(affinity)
    for method in ("optimal", "scipy", "lap", "ortools"):
        assert abs(match_affinity(affinity, method).value - optimum) <= FLOAT32_ROUNDING * reference, method
    assert_optimal(match_affinity(affinity), affinity)


def test_one_of_many_tied_optima_is_found():
    rng = np.random.default_rng(0)
    ties = [np.add.outer(rng.integers(0, 9, 130), rng.integers(0, 9, 130)), np.kron(np.eye(13), np.ones((10, 10)))]
    for affinity in ties + [np.full((65, columns), extreme) for columns in (65, 70) for extreme in (-1e30, -1e-40)]:
        for dtype in DTYPES:
            assert_optimal(match_affinity(affinity.astype(dtype)), affinity.astype(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tokens_of_any_precision_and_layout_are_matched_to_the_optimum(dtype):
    x, y = torch.randn(2, 64, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    views = {
        "plain": (x, y),
        "transposed": (x.T.contiguous().T, y.T.contiguous().T),
        "strided": (x.repeat_interleave(2, 0)[::2], y.repeat_interleave(3, 1)[:, ::3]),
        "with gradients": (x.clone().requires_grad_(), y.clone().requires_grad_()),
    }
    if dtype != torch.bfloat16:  # which NumPy does not know
        views["negative strides"] = tuple(side.numpy()[::-1, ::-1].copy()[::-1, ::-1] for side in (x, y))
    affinity = x.double().numpy() @ y.double().numpy().T
    expected, _ = optimum_and_reference(affinity)
    for name, (left, right) in views.items():
        found = match(left, right)
        assert found.value == pytest.approx(expected, rel=FLOAT32_ROUNDING), name
        assert found.solver == ("auction-float64" if dtype == torch.float64 else "auction"), name
        assert found.permutation.tolist() == match(x, y).permutation.tolist(), name
        # Of tokens, the gap is relative to the product of their norms.
        assert found.gap <= GAP * float(x.double().norm() * y.double().norm()) * (1 + 1e-6), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tokens_and_affinities_on_cuda_are_matched_like_those_in_main_memory():
    x, y = torch.randn(2, 64, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert match(x.cuda(), y.cuda()).permutation.tolist() == match(x, y).permutation.tolist()
    assert match_affinity((x @ y.T).cuda()).permutation.tolist() == match(x, y).permutation.tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_their_position(bad):
    batch = np.zeros((2, 70, 70), np.float32)
    batch[1, 69, 3] = bad
    with pytest.raises(MatchingError, match=rf"affinity\[1, 69, 3\] is {bad}"):
        match_affinity(batch)
    with pytest.raises(MatchingError, match=rf"y\[69, 3\] is {bad}"):
        match(batch[0], torch.from_numpy(batch[1]).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_even_in_two_threads_are_matched_like_each_of_their_affinities_alone(dtype):
    batch = np.stack([family(name, 128, 100, dtype) for name in FAMILIES])
    alone = [match_affinity(affinity) for affinity in batch]
    with ThreadPoolExecutor(2) as pool:
        for answers in (match_affinity(batch), *pool.map(match_affinity, [batch, batch.copy()])):
            for a, b in zip(answers, alone, strict=True):
                assert a.permutation.tolist() == b.permutation.tolist()
                assert (a.value, a.bound, a.solver) == (b.value, b.bound, b.solver)
    assert match_affinity(batch[:0]) == []


# Two grids, of which the second needs several windows; rectangles, which have no grid in common that can be moved.
@pytest.mark.parametrize(
    ("method", "rows", "columns"),
    [(m, *size) for m in METHODS for size in [(36, 36), (600, 600), (30, 50), (50, 30), (1, 7), (7, 1)]]
    + [("translation", 36, 36), ("translation", 600, 600)],
)
def test_bounds_of_any_method_hold_and_certified_ones_are_tight(method, rows, columns):
    rng = np.random.default_rng(0)
    grid = {36: (6, 6), 600: (20, 30)}.get(rows)
    for tokens in (lambda count: rng.normal(size=(count, 8)), lambda count: relu(count, slice(0, 0), rng)):
        for dtype in DTYPES:
            x, y = tokens(rows).astype(dtype), tokens(columns).astype(dtype)
            optimum, _ = optimum_and_reference(x.astype(np.float64) @ y.astype(np.float64).T)
            plain, certified = (match(x, y, method, grid=grid, certify=certify) for certify in (False, True))
            assert optimum - SLACK * abs(optimum) <= certified.bound <= plain.bound
            assert certified.bound == pytest.approx(optimum, rel=1e-6)
            assert plain.value == certified.value <= certified.bound


@pytest.mark.parametrize("size", [(64, 64), (40, 57), (57, 40), (600, 600)])
def test_the_identity_of_an_affinity_has_a_bound_only_where_asked_for(size):
    for name in FAMILIES:
        affinity = family(name, *size)
        plain = match_affinity(affinity, "identity")
        assert (plain.bound, plain.gap) == (None, None)
        optimum, reference = optimum_and_reference(affinity)
        bound = match_affinity(affinity, "identity", certify=True).bound
        assert optimum - SLACK * reference <= bound <= optimum + 1e-6 * reference, name
