"""Matching of locations: exact methods against brute force, against each other and on awkward input."""

from dataclasses import FrozenInstanceError, dataclass
from itertools import permutations
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from rsm_probe import RsmProbeError, match, match_affinity, rsm
from rsm_probe.errors import MatchingError
from rsm_probe.matching import Matching
from rsm_probe.matching.certificate import matched_sums
from rsm_probe.matching.matching import Locations
from rsm_probe.matching.methods.batch_optimal import BatchOptimal
from rsm_probe.matching.methods.greedy import TopKGreedy
from rsm_probe.matching.methods.identity import aligned_products, squared_norms
from rsm_probe.matching.methods.library_solvers import OrToolsAssignment
from rsm_probe.matching.methods.optimal import Auction
from rsm_probe.matching.methods.rewindowed import Rewindowed
from rsm_probe.matching.registry import get_matching, matching_names

# name -> exact, symmetric, needs_affinity: what users of a method may rely on.
PROPERTIES = {
    "identity": (False, True, False),
    "optimal": (True, True, True),
    "scipy": (True, True, True),
    "lap": (True, True, True),
    "ortools": (True, True, True),
    "batch-optimal": (False, True, False),
    "rewindowed": (False, True, False),
    "topk-greedy": (False, False, True),
    "greedy": (False, False, True),
    "translation": (False, True, False),
    "late-interaction": (False, True, True),
    "soft": (False, False, True),
}
# Methods that pair locations and need nothing but the affinity.
ON_AFFINITIES = ["identity", "optimal", "scipy", "lap", "ortools"]
EXACT = [name for name in matching_names() if get_matching(name)[1].exact]
SHAPES = [(1, 1), (1, 5), (5, 1), (2, 2), (3, 6), (6, 3), (5, 6), (6, 5), (6, 6)]

KINDS = ("normal", "constant", "zeros", "duplicates", "rank one", "integers", "negative")


def affinity_of_kind(kind, rows, columns, rng):
    if kind == "constant":
        return np.full((rows, columns), rng.normal())
    if kind == "zeros":
        return np.zeros((rows, columns))
    if kind == "duplicates":
        few = rng.normal(size=(2, 2))
        return few[rng.integers(0, 2, rows)][:, rng.integers(0, 2, columns)]
    if kind == "rank one":
        return np.outer(rng.lognormal(sigma=2.0, size=rows), rng.lognormal(sigma=2.0, size=columns))
    if kind == "integers":
        return rng.integers(-3, 4, size=(rows, columns)).astype(np.float64)
    if kind == "negative":
        return -np.abs(rng.normal(size=(rows, columns)))
    return rng.normal(size=(rows, columns))


def best_by_brute_force(affinity):
    wide = affinity if affinity.shape[0] <= affinity.shape[1] else affinity.T
    rows = np.arange(wide.shape[0])
    orders = np.array(list(permutations(range(wide.shape[1]), wide.shape[0])))
    return wide.astype(np.float64)[rows, orders].sum(axis=1).max()


def assert_is_matching(permutation, rows, columns):
    """Every location of the smaller side is matched, none twice, and those left over hold -1."""
    assert permutation.shape == (rows,)
    assert np.issubdtype(permutation.dtype, np.integer)
    partners = permutation[permutation != -1]
    assert len(partners) == min(rows, columns)
    assert len(set(partners.tolist())) == len(partners)
    assert partners.min() >= 0
    assert partners.max() < columns


@pytest.mark.parametrize("name", PROPERTIES)
def test_methods_declare_the_properties_users_rely_on(name):
    label, method = get_matching(name)
    assert label == name
    assert (method.exact, method.symmetric, method.needs_affinity) == PROPERTIES[name]


@pytest.mark.parametrize("name", ON_AFFINITIES)
def test_match_reports_solver_status_and_a_bound_no_smaller_than_the_value(name):
    affinity = np.random.default_rng(0).normal(size=(6, 6))
    found = match_affinity(affinity, name)
    assert found.solver == ("auction-float64" if name == "optimal" else name)
    assert found.status == ("optimal" if name in EXACT else "feasible")
    assert found.bound is None or found.bound >= found.value - 1e-9
    with pytest.raises(FrozenInstanceError):
        found.value = 0.0


@pytest.mark.parametrize("name", ON_AFFINITIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_matches_the_smaller_side_in_full(name, shape, kind):
    affinity = affinity_of_kind(kind, *shape, np.random.default_rng(1)).astype(np.float32)
    assert_is_matching(match_affinity(affinity, name).permutation, *shape)


@pytest.mark.parametrize("name", ON_AFFINITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_is_the_float64_sum_over_the_permutation(name, shape):
    affinity = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    found = match_affinity(affinity, name)
    by_hand = sum(float(affinity[row, column]) for row, column in enumerate(found.permutation) if column >= 0)
    assert found.value == pytest.approx(by_hand, rel=1e-14)
    assert isinstance(found.value, float)


@pytest.mark.parametrize("name", ON_AFFINITIES)
def test_value_keeps_terms_that_a_float32_sum_would_lose(name):
    # Off the diagonal everything is worse, so all methods pick the diagonal; next to 2^18, float32 drops 2^-8.
    affinity = np.full((32, 32), -(2.0**18), dtype=np.float32)
    np.fill_diagonal(affinity, [2.0**18] + [2.0**-8] * 30 + [-(2.0**18)])
    assert match_affinity(affinity, name).value == 30 * 2.0**-8


@pytest.mark.parametrize("name", ON_AFFINITIES)
@pytest.mark.parametrize("shape", [(6, 6), (4, 7)])
def test_symmetric_methods_give_equal_values_both_ways(name, shape):
    affinity = np.random.default_rng(3).normal(size=shape)
    assert match_affinity(affinity, name).value == pytest.approx(match_affinity(affinity.T, name).value, rel=1e-12)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_methods_reach_the_best_of_all_permutations(name, shape, kind):
    for seed in range(3):
        affinity = affinity_of_kind(kind, *shape, np.random.default_rng(seed))
        tolerance = 1e-9 * np.abs(affinity).max() * min(shape)
        assert abs(match_affinity(affinity, name).value - best_by_brute_force(affinity)) <= tolerance


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("shape", [(2, 5), (5, 2), (4, 6), (6, 4)])
def test_rectangular_matching_equals_padding_the_smaller_image_with_zero_vectors(name, shape):
    rng = np.random.default_rng(4)
    # All affinities are negative: a method that left locations of the smaller side out would get a larger value.
    x, y = np.abs(rng.normal(size=(shape[0], 3))), -np.abs(rng.normal(size=(shape[1], 3)))
    larger = max(shape)
    padded_x, padded_y = (np.vstack([tokens, np.zeros((larger - len(tokens), 3))]) for tokens in (x, y))
    assert match(x, y, name).value < 0
    assert match(x, y, name).value == pytest.approx(match(padded_x, padded_y, name).value, rel=1e-12)
    assert match(x, y, name).value == pytest.approx(best_by_brute_force(padded_x @ padded_y.T), rel=1e-12)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_planted_permutation_of_64_locations_is_recovered(name, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator).to(dtype)
    order = torch.randperm(64, generator=generator)
    found = match(x, x[order], name)
    # Location order[t] of x is location t of y.
    assert found.permutation.tolist() == torch.argsort(order).tolist()
    assert found.value == pytest.approx(float(x.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(kind=st.sampled_from(KINDS), rows=st.integers(1, 8), columns=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
@example(kind="normal", rows=5, columns=5, seed=0)
@example(kind="normal", rows=3, columns=6, seed=0)
def test_scipy_and_lap_agree_on_the_value(scale, dtype, kind, rows, columns, seed):
    affinity = (affinity_of_kind(kind, rows, columns, np.random.default_rng(seed)) * scale).astype(dtype)
    first, second = match_affinity(affinity, "scipy"), match_affinity(affinity, "lap")
    assert_is_matching(first.permutation, rows, columns)
    assert_is_matching(second.permutation, rows, columns)
    assert abs(first.value - second.value) <= 1e-9 * float(np.abs(affinity).max()) * min(rows, columns)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_the_scale_of_an_affinity_does_not_change_who_is_matched(name, scale):
    for seed in range(10):
        affinity = np.random.default_rng(seed).normal(size=(6, 6))
        expected = match_affinity(affinity, name).permutation
        assert match_affinity(affinity * scale, name).permutation.tolist() == expected.tolist()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_float32_tokens_of_extreme_scale_are_matched_like_ordinary_ones(name, scale):
    # Their products leave the range of float32; the tokens themselves are finite and ordinary in float64.
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(2, 7, 3))
    found = match((x * scale).astype(np.float32), (y * scale).astype(np.float32), name)
    assert found.permutation.tolist() == match(x, y, name).permutation.tolist()
    assert found.value == pytest.approx(match(x, y, name).value * scale**2, rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "expected"), [((3, 3), [0, 1, 2]), ((2, 4), [0, 1]), ((4, 2), [0, 1, -1, -1]), ((3, 1), [0, -1, -1])]
)
def test_identity_matches_equal_locations_and_leaves_the_surplus_out(shape, expected):
    affinity = np.random.default_rng(6).normal(size=shape)
    found = match_affinity(affinity, "identity")
    assert found.permutation.tolist() == expected
    assert found.value == pytest.approx(np.trace(affinity), rel=1e-12)


@pytest.mark.parametrize("locations", [(5, 5), (3, 5), (5, 3)])
def test_products_of_identity_equal_its_value_for_every_pair(locations):
    x, y = torch.randn(4, locations[0], 3).double(), torch.randn(2, locations[1], 3).double()
    products = get_matching("identity")[1].products(Locations(x), Locations(y))
    expected = [[match(a, b, "identity").value for b in y] for a in x]
    np.testing.assert_allclose(products, expected, rtol=1e-12)


def test_aligned_products_of_large_layers_do_not_depend_on_the_pieces_summed():
    # So many products that those of 1 024 features, of the 1 519 and 1 488, are summed at a time; and a few of them.
    x, y = torch.randn(2100, 49, 31), torch.randn(2000, 48, 31)
    few = np.einsum("isc,jsc->ij", x[:3, :48].double().numpy(), y[-2:].double().numpy())
    for found in (aligned_products(x, y)[:3, -2:], aligned_products(x[:3], y[-2:])):
        np.testing.assert_allclose(found, few, rtol=1e-12, atol=1e-11)
    norms = x.double().square().sum(dim=(1, 2)).numpy()
    np.testing.assert_allclose(squared_norms(x), norms, rtol=1e-12)
    np.testing.assert_allclose(squared_norms(x[:3]), norms[:3], rtol=1e-12)


@pytest.mark.parametrize("layout", ["NSC", "NCS", "part"])
@pytest.mark.parametrize("locations", [300, 3000])
def test_aligned_products_of_any_layout_are_those_of_float64(locations, layout):
    generator = torch.Generator().manual_seed(0)
    if layout == "NCS":
        x, y = (torch.rand(n, 50, locations, generator=generator).transpose(1, 2) for n in (5, 4))
    elif layout == "part":
        x, y = (torch.rand(n, locations + 2, 50, generator=generator)[:, 2:] for n in (5, 4))
    else:
        x, y = (torch.rand(n, locations, 50, generator=generator) for n in (5, 4))
    # Up to 65 536 features all is float64; beyond, errors average out.
    bound = 1e-12 if locations == 300 else 5e-8
    expected = np.einsum("isc,jsc->ij", x.double().numpy(), y.double().numpy())
    np.testing.assert_allclose(aligned_products(x, y), expected, rtol=bound)
    np.testing.assert_allclose(aligned_products(x, y.contiguous()), expected, rtol=bound)
    np.testing.assert_allclose(squared_norms(x), (x.double().numpy() ** 2).sum(axis=(1, 2)), rtol=bound)
    if layout != "part":
        assert x.permute(*np.argsort([-s for s in x.stride()])).is_contiguous(), "or the layout is not what it says"


def test_methods_that_solve_pairs_one_by_one_say_so_when_asked_for_all_at_once():
    images = Locations(torch.ones(1, 2, 3))
    with pytest.raises(NotImplementedError, match="scipy solves pairs one by one"):
        get_matching("scipy")[1].products(images, images)


def test_matched_sum_of_rows_without_partner_adds_nothing():
    affinity = np.array([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]])
    assert matched_sums(affinity[None], np.array([[1, -1, 0]])).tolist() == [18.0]
    # -1 must not be read as "the last column".
    assert matched_sums(affinity[None], np.array([[-1, -1, -1]])).tolist() == [0.0]


@pytest.mark.parametrize("name", ON_AFFINITIES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_their_position(name, bad):
    affinity = np.zeros((3, 4))
    affinity[2, 1] = bad
    with pytest.raises(MatchingError, match=rf"affinity\[2, 1\] is {bad}"):
        match_affinity(affinity, name)
    with pytest.raises(MatchingError, match=rf"x\[2, 1\] is {bad}"):
        match(affinity, np.zeros((3, 4)), name)
    with pytest.raises(MatchingError, match=rf"y\[2, 1\] is {bad}"):
        match(torch.zeros(3, 4), torch.from_numpy(affinity).float(), name)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int64]
)
def test_real_dtypes_of_tensors_are_matched_alike(dtype):
    rng = np.random.default_rng(7)
    # Small integers are exact in all of these types.
    x, y = rng.integers(-4, 5, size=(2, 6, 4))
    expected = best_by_brute_force(x @ y.T)
    assert match(torch.from_numpy(x).to(dtype), torch.from_numpy(y).to(dtype)).value == expected
    assert match_affinity(torch.from_numpy(x @ y.T).to(dtype)).value == expected


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int16", "int64", ">f4", ">f8"])
def test_real_dtypes_of_arrays_are_matched_alike(dtype):
    rng = np.random.default_rng(8)
    x, y = rng.integers(-4, 5, size=(2, 6, 4))
    expected = best_by_brute_force(x @ y.T)
    assert match(x.astype(dtype), y.astype(dtype)).value == expected
    assert match_affinity((x @ y.T).astype(dtype)).value == expected


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.float32, torch.float64),
        (torch.float16, torch.float64),
        (torch.bfloat16, torch.float16),
        (torch.int64, torch.float64),
    ],
)
def test_images_of_different_dtypes_can_be_matched(first, second):
    x, y = torch.from_numpy(np.random.default_rng(9).integers(-4, 5, size=(2, 6, 4)))
    expected = match(x.double(), y.double()).value
    assert match(x.to(first), y.to(second)).value == expected
    assert match(y.to(second), x.to(first)).value == expected


def test_a_tensor_and_an_array_of_integers_can_be_matched():
    x, y = np.random.default_rng(10).integers(-4, 5, size=(2, 6, 4))
    assert match(torch.from_numpy(x), y).value == best_by_brute_force(x @ y.T)


@pytest.mark.parametrize("name", ON_AFFINITIES)
def test_inputs_that_are_not_contiguous_give_the_same_matching(name):
    rng = np.random.default_rng(11)
    wide = rng.normal(size=(6, 12)).astype(np.float32)
    views = [wide[:, ::2], wide[::-1, :6], wide[:, 6:].T, np.asfortranarray(wide[:, :6])]
    for view in views:
        plain = match_affinity(np.ascontiguousarray(view), name)
        assert match_affinity(view, name).permutation.tolist() == plain.permutation.tolist()
        tokens = match(np.ascontiguousarray(view), np.ascontiguousarray(wide[:, 3:9]), name)
        assert match(view, wide[:, 3:9], name).permutation.tolist() == tokens.permutation.tolist()
    transposed = torch.from_numpy(wide[:, :6].copy()).T
    expected = match_affinity(transposed.contiguous(), name)
    assert match_affinity(transposed, name).permutation.tolist() == expected.permutation.tolist()


def test_inputs_are_left_as_they_were():
    affinity = np.random.default_rng(12).normal(size=(5, 5))
    kept = affinity.copy()
    for name in ON_AFFINITIES:
        match_affinity(affinity, name)
    np.testing.assert_array_equal(affinity, kept)


def test_tensors_that_require_gradients_can_be_matched():
    x = torch.randn(4, 3, requires_grad=True)
    assert match(x, x).permutation.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("wrong", "right"), [("optimul", "optimal"), ("identiti", "identity"), ("scipi", "scipy")])
def test_unknown_methods_are_refused_with_the_nearest_name(wrong, right):
    with pytest.raises(
        MatchingError, match=f"unknown matching '{wrong}'; nearest: '{right}'.*known: identity, optimal"
    ):
        match_affinity(np.eye(2), wrong)


@pytest.mark.parametrize("shape", [(3,), (0, 3), (3, 0), (2, 0, 3), (2, 2, 3, 3), ()])
def test_an_affinity_that_is_no_matrix_is_refused_with_its_shape(shape):
    with pytest.raises(MatchingError, match=r"affinity has shape \(S, T\).*found \("):
        match_affinity(np.zeros(shape))


@pytest.mark.parametrize("shape", [(3,), (0, 3), (3, 0), (2, 3, 3)])
def test_tokens_that_are_no_matrix_are_refused_with_their_name(shape):
    with pytest.raises(MatchingError, match=r"^x must hold tokens \(S, C\)"):
        match(np.zeros(shape), np.zeros((3, 3)))
    with pytest.raises(MatchingError, match=r"^y must hold tokens \(S, C\)"):
        match(np.zeros((3, 3)), np.zeros(shape))


def test_tokens_with_different_channels_are_refused_with_both_numbers():
    with pytest.raises(MatchingError, match="x has 4 channels and y has 5"):
        match(np.zeros((3, 4)), np.zeros((3, 5)))


@pytest.mark.parametrize("values", [np.ones((2, 2), dtype=complex), torch.ones(2, 2) * 1j, np.array([["a", "b"]])])
def test_values_that_are_no_real_numbers_are_refused(values):
    with pytest.raises(MatchingError, match=r"real numbers|complex numbers"):
        match_affinity(values)


def test_matching_errors_are_caught_as_project_errors_and_as_value_errors():
    for family in (RsmProbeError, ValueError):
        with pytest.raises(family, match="affinity has shape"):
            match_affinity(np.zeros(3))


@dataclass(frozen=True)
class Shifted(Matching):
    """Location s answers to location s + by."""

    by: int = 1
    name: ClassVar[str] = "shifted"
    exact: ClassVar[bool] = False
    symmetric: ClassVar[bool] = False
    needs_affinity: ClassVar[bool] = True
    growth: ClassVar[float] = 1.0

    def permutation(self, affinity):
        return (np.arange(len(affinity)) + self.by) % affinity.shape[1]


def test_a_method_object_is_used_with_its_own_options():
    affinity = np.arange(16.0).reshape(4, 4)
    found = match_affinity(affinity, Shifted(by=2))
    assert found.permutation.tolist() == [2, 3, 0, 1]
    assert (found.solver, found.status) == ("shifted", "feasible")
    assert found.value == affinity[0, 2] + affinity[1, 3] + affinity[2, 0] + affinity[3, 1]


def test_integers_that_float32_cannot_hold_keep_their_digits():
    assert match_affinity(np.array([[2**24 + 1]])).value == 2**24 + 1


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_tokens_whose_squares_are_no_numbers_are_refused(size):
    with pytest.raises(MatchingError, match=r"scale tokens to between 1e-150 and 1e150"):
        match(np.full((3, 2), size), np.ones((3, 2)))


@pytest.mark.parametrize("values", [[[1.0, 2.0], [3.0]], np.ones((2, 2), dtype=np.longdouble)])
def test_values_that_form_no_array_of_64_bits_are_refused(values):
    with pytest.raises(MatchingError, match=r"not an array of numbers|give \.astype\(numpy\.float64\)"):
        match_affinity(values)


def test_scores_cannot_be_certified():
    x = np.random.default_rng(0).normal(size=(5, 3))
    with pytest.raises(MatchingError, match="late-interaction is a score"):
        match(x, x, "late-interaction", certify=True)
    with pytest.raises(MatchingError, match="late-interaction is a score"):
        match_affinity(x @ x.T, "late-interaction", certify=True)


def test_matches_are_compared_as_objects():
    x = np.random.default_rng(0).normal(size=(5, 3))
    found = match(x, x)
    assert found == found
    assert found != match(x, x)
    assert hash(found)


@pytest.mark.parametrize(("locations", "channels", "offset"), [(9, 32, 100.0), (1, 64, 0.0), (49, 768, 3.0)])
def test_a_certificate_holds_for_exact_inner_products(locations, channels, offset):
    tokens = torch.randn(8, locations, channels, generator=torch.Generator().manual_seed(0))
    tokens[:, :, 0] += offset
    tokens += offset
    for i in range(8):
        for j in range(i):
            found = match(tokens[i], tokens[j], certify=True)
            affinity = tokens[i].double().numpy() @ tokens[j].double().numpy().T
            rows, columns = linear_sum_assignment(affinity, maximize=True)
            best = affinity[rows, columns].sum()
            slack = 1e-12 * abs(affinity).sum()
            assert found.value <= best + slack
            assert best <= found.bound + slack
            assert found.gap <= 1.1e-6 * float(tokens[i].norm() * tokens[j].norm())
            assert found.value == pytest.approx(float(found.affinities.sum()), rel=1e-12)


@pytest.mark.gpu
def test_what_an_option_cannot_do_for_a_single_pair_is_refused():
    x = torch.randn(9, 4)
    with pytest.raises(MatchingError, match=r"precision='float16' applies to batches of pairs"):
        match(x, x, Auction(precision="float16"))
    if torch.cuda.is_available():  # elsewhere the kernel runs in an interpreter
        with pytest.raises(MatchingError, match="the device is to solve the pairs"):
            match(x, x, Auction(where="device"))
    else:
        assert match(x, x, Auction(where="device")).solver == "auction-device"


@pytest.mark.parametrize("levels", [0, -5, 1, 2.5, 1 << 62])
def test_levels_that_ortools_cannot_count_in_are_refused(levels):
    pytest.importorskip("ortools")
    with pytest.raises(MatchingError, match="levels must be"):
        match(torch.randn(9, 4), torch.randn(9, 4), OrToolsAssignment(levels=levels))


def test_a_gap_that_is_no_number_is_refused():
    with pytest.raises(MatchingError, match=r"gap must lie in .*found 'a'"):
        Auction(gap="a")


NEVER_BELOW_IDENTITY = [
    "optimal",
    "scipy",
    "lap",
    "ortools",
    "rewindowed",
    Rewindowed(4),
    "batch-optimal",
    "topk-greedy",
]


@pytest.mark.parametrize("mean", [1e4, 1e6])
@pytest.mark.parametrize("method", NEVER_BELOW_IDENTITY, ids=str)
@pytest.mark.parametrize("shape", [(9, 9), (7, 9), (9, 7)])
def test_at_large_offsets_no_method_falls_below_the_identity(method, mean, shape):
    pytest.importorskip("ortools")
    if method == "topk-greedy" and shape[0] != shape[1]:
        return  # of unequal images it does not hold all, and promises nothing
    # Affinities in float32 cannot tell matchings apart here; sums in float64 can.
    for seed in range(5):
        x, y = (torch.randn(size, 32, generator=torch.Generator().manual_seed(k)) + mean
                for size, k in zip(shape, (seed, seed + 100), strict=True))  # fmt: skip
        found, identity = match(x, y, method), match(x, y, "identity")
        assert found.value >= identity.value
        assert found.bound >= found.value
        assert_is_matching(found.permutation, *shape)
        assert found.value == pytest.approx(np.nansum(found.affinities), rel=1e-15)
        if get_matching(method)[1].needs_affinity and method != "topk-greedy":
            affinity = x @ y.T
            assert match_affinity(affinity, method).value >= match_affinity(affinity, "identity").value
    # Windows read tokens, and rsm() takes the sum that they report.
    z = torch.randn(6, shape[0], 32, generator=torch.Generator().manual_seed(0)) + mean
    both = [rsm(z, matching=name, kernel="linear").values for name in (method, "identity")]
    assert (both[0] >= both[1] * (1 - 1e-15)).all()


def test_shifts_do_not_fall_below_the_identity_either():
    for seed in range(5):
        x, y = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(seed)) + 1e6
        assert match(x, y, "translation", grid=(3, 3)).value >= match(x, y, "identity").value


def test_methods_that_promise_nothing_keep_their_own_matching():
    # The greedy choice loses to the identity here, and says so.
    x = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    y = torch.tensor([[1.0, 0.0], [1.1, -9.0]])
    assert match(x, y, "greedy").value <= match(x, y, "optimal").value
    promise = ["optimal", "rewindowed", BatchOptimal(9), TopKGreedy(9)]
    for method in [*promise, "greedy", "identity", BatchOptimal(2), TopKGreedy(8)]:
        assert get_matching(method)[1].reaches_identity(9, 9) == (method in promise), method
    assert not TopKGreedy(9).reaches_identity(7, 9)
