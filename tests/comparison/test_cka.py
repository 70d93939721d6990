"""CKA against textbook formulas, other packages and what is known of its estimators."""

from itertools import permutations

import numpy as np
import pytest
import repsim
import rsatoolbox
import torch
from ckatorch.core import cka_base
from scipy.spatial.distance import pdist
from scipy.stats import ortho_group

from rsm_probe import RSM, RsmProbeError, cka, rsm
from rsm_probe.comparison.alignment import ESTIMATORS, cka_grid, get_estimator, hsic
from rsm_probe.errors import ComparisonError


def related_features(images, first=7, second=5, noise=1.0, seed=0):
    """Two sets of features over the same images that share part of their variance."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(images, first)) * rng.uniform(0.2, 3.0, size=first)
    return x, x @ rng.normal(size=(first, second)) / np.sqrt(first) + noise * rng.normal(size=(images, second))


def gram(features):
    return features @ features.T


def related_rsms(images, **options):
    x, y = related_features(images, **options)
    return gram(x), gram(y)


def textbook_biased(k, l):  # noqa: E741
    n = len(k)
    h = np.eye(n) - np.ones((n, n)) / n
    return np.trace(k @ h @ l @ h) / (n - 1) ** 2


def textbook_unbiased(k, l):  # noqa: E741
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    one = np.ones(n)
    products = np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return (products - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


def unbiased_over_tuples(k, l):  # noqa: E741
    """HSIC_1 as what it estimates: the mean over all ordered quadruples of different images."""
    terms = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in permutations(range(len(k)), 4)]
    return np.mean(terms)


TEXTBOOK = {"biased": textbook_biased, "unbiased": textbook_unbiased}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("images", [4, 5, 17, 60])
def test_hsic_and_cka_equal_the_textbook_formulas(estimator, images):
    k, l = related_rsms(images)  # noqa: E741
    formula = TEXTBOOK[estimator]
    assert hsic(k, l, estimator) == pytest.approx(formula(k, l), rel=1e-9)
    expected = formula(k, l) / np.sqrt(formula(k, k) * formula(l, l))
    assert cka(k, l, estimator) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_formulas_hold_for_rsms_that_are_not_positive_semi_definite(estimator):
    rng = np.random.default_rng(1)
    k, l = (a + a.T for a in rng.normal(size=(2, 9, 9)))  # noqa: E741
    assert np.linalg.eigvalsh(k)[0] < 0
    assert hsic(k, l, estimator) == pytest.approx(TEXTBOOK[estimator](k, l), rel=1e-9)


def test_unbiased_hsic_is_the_mean_over_quadruples_of_different_images():
    k, l = related_rsms(7)  # noqa: E741
    assert hsic(k, l, "unbiased") == pytest.approx(unbiased_over_tuples(k, l), rel=1e-9)
    assert hsic(k, k, "unbiased") == pytest.approx(unbiased_over_tuples(k, k), rel=1e-9)


def test_unbiased_is_the_default():
    k, l = related_rsms(12)  # noqa: E741
    assert cka(k, l) == cka(k, l, "unbiased") != cka(k, l, "biased")
    assert hsic(k, l) == hsic(k, l, "unbiased") != hsic(k, l, "biased")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("images", [10, 150])
def test_linear_cka_equals_ckatorch(estimator, images):
    x, y = related_features(images)
    expected = cka_base(torch.from_numpy(x), torch.from_numpy(y), "linear", unbiased=estimator == "unbiased")
    assert cka(gram(x), gram(y), estimator) == pytest.approx(float(expected), abs=1e-9)


def test_biased_linear_cka_equals_rsatoolbox_on_squared_distances():
    x, y = related_features(40)
    first, second = (rsatoolbox.rdm.RDMs(pdist(features, "sqeuclidean")[None]) for features in (x, y))
    expected = float(rsatoolbox.rdm.compare(first, second, method="cosine_cov")[0, 0])
    assert cka(gram(x), gram(y), "biased") == pytest.approx(expected, abs=1e-9)


def test_hsic_and_biased_cka_equal_repsim():
    x, y = related_features(40)
    k, l = gram(x), gram(y)  # noqa: E741
    assert cka(k, l, "biased") == pytest.approx(repsim.cka([x, y], "linear", "gretton")[0, 1], abs=1e-9)
    assert hsic(k, l, "biased") == pytest.approx(repsim.hsic([x, y], "linear", "gretton")[0, 1], rel=1e-9)
    # Its CKA of the estimator "song" divides by another estimator's HSIC; off the diagonal its HSIC is sound.
    assert hsic(k, l, "unbiased") == pytest.approx(repsim.hsic([x, y], "linear", "song")[0, 1], rel=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_cka_of_rsms_made_here_equals_cka_of_features_elsewhere(estimator):
    x, y = related_features(20, first=12, second=10)
    first = rsm(x.reshape(20, 4, 3), matching="identity", kernel="linear")
    second = rsm(y.reshape(20, 2, 5), matching="identity", kernel="linear")
    expected = cka_base(torch.from_numpy(x), torch.from_numpy(y), "linear", unbiased=estimator == "unbiased")
    assert cka(first, second, estimator) == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_cka_of_an_rsm_with_itself_is_one(estimator):
    for images in (4, 30):
        k, l = related_rsms(images)  # noqa: E741
        assert cka(k, k, estimator) == pytest.approx(1.0, abs=1e-12)
        assert cka(l, 3.0 * l + 5.0, estimator) == pytest.approx(1.0, abs=1e-12)
        assert cka(k, -k, estimator) == pytest.approx(-1.0, abs=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_cka_and_hsic_are_symmetric(estimator):
    k, l = related_rsms(15)  # noqa: E741
    assert cka(k, l, estimator) == pytest.approx(cka(l, k, estimator), rel=1e-14)
    assert hsic(k, l, estimator) == pytest.approx(hsic(l, k, estimator), rel=1e-14)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 7.0, 1e20])
def test_cka_is_invariant_to_isotropic_scaling(estimator, scale):
    x, y = related_features(20)
    assert cka(gram(scale * x), gram(y), estimator) == pytest.approx(cka(gram(x), gram(y), estimator), rel=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_cka_is_invariant_to_rotations_of_features_but_not_to_any_linear_map(estimator):
    x, y = related_features(20)
    plain = cka(gram(x), gram(y), estimator)
    rotation = ortho_group.rvs(x.shape[1], random_state=0)
    assert cka(gram(x @ rotation), gram(y), estimator) == pytest.approx(plain, rel=1e-10)
    stretched = x @ rotation * np.linspace(0.1, 5.0, x.shape[1])
    assert abs(cka(gram(stretched), gram(y), estimator) - plain) > 0.01


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_cka_is_invariant_to_one_permutation_of_all_images_only(estimator):
    k, l = related_rsms(20, noise=0.2)  # noqa: E741
    order = np.random.default_rng(2).permutation(20)
    moved = k[np.ix_(order, order)]
    plain = cka(k, l, estimator)
    assert cka(moved, l[np.ix_(order, order)], estimator) == pytest.approx(plain, rel=1e-10)
    assert cka(moved, l, estimator) < plain - 0.2


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shift", [1.0, -7.5, 1e3, 1e6])
def test_adding_a_constant_to_an_rsm_changes_nothing(estimator, shift):
    k, l = related_rsms(20)  # noqa: E741
    assert cka(k + shift, l, estimator) == pytest.approx(cka(k, l, estimator), rel=1e-8)
    assert hsic(k + shift, l, estimator) == pytest.approx(hsic(k, l, estimator), rel=1e-8)


def test_uncentred_features_are_centred():
    x, y = related_features(20)
    for estimator in ESTIMATORS:
        assert cka(gram(x + 10.0), gram(y), estimator) == pytest.approx(cka(gram(x), gram(y), estimator), rel=1e-9)


@pytest.mark.parametrize("diagonal", [0.0, 1.0, -50.0, 1e6])
def test_the_diagonal_does_not_matter_for_unbiased_cka(diagonal):
    k, l = related_rsms(20)  # noqa: E741
    other = k.copy()
    np.fill_diagonal(other, diagonal)
    assert cka(other, l) == pytest.approx(cka(k, l), rel=1e-8)
    assert hsic(other, l) == pytest.approx(hsic(k, l), rel=1e-8)
    assert abs(cka(other, l, "biased") - cka(k, l, "biased")) > 1e-3


def test_a_very_large_diagonal_does_not_make_an_rsm_constant_for_unbiased_cka():
    k, l = related_rsms(20)  # noqa: E741
    other = k.copy()
    np.fill_diagonal(other, 1e9)
    assert cka(other, l) == pytest.approx(cka(k, l), rel=1e-5)


def independent_ckas(estimator, features, draws, images=30):
    rng = np.random.default_rng(3)
    return np.array(
        [
            cka(gram(rng.normal(size=(images, features))), gram(rng.normal(size=(images, features))), estimator)
            for _ in range(draws)
        ]
    )


@pytest.mark.parametrize(("features", "draws"), [(10, 400), (1000, 100)])
def test_unbiased_cka_of_independent_data_is_zero_on_average(features, draws):
    values = independent_ckas("unbiased", features, draws)
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(draws)
    assert values.min() < 0 < values.max()
    assert values.std() < 0.1


def test_biased_cka_of_independent_data_grows_to_one_with_the_features():
    means = [independent_ckas("biased", features, 5).mean() for features in (10, 100, 10_000)]
    assert means[0] < 0.4 < means[1] < 0.9 < means[2]
    assert abs(independent_ckas("unbiased", 10_000, 5).mean()) < 0.05


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rows_give_hsic_as_inner_products(estimator):
    rng = np.random.default_rng(4)
    rsms = np.stack([gram(rng.normal(size=(9, 4))) for _ in range(3)])
    rows = get_estimator(estimator).rows(rsms)
    assert rows.dtype == np.float64
    assert rows.shape[0] == 3
    assert rows.shape[1] <= 45
    expected = [[TEXTBOOK[estimator](k, l) for l in rsms] for k in rsms]  # noqa: E741
    np.testing.assert_allclose(rows @ rows.T, expected, rtol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rows_leave_the_rsms_as_they_were_and_take_float32(estimator):
    rsms = np.stack(related_rsms(9)).astype(np.float32)
    kept = rsms.copy()
    rows = get_estimator(estimator).rows(rsms)
    np.testing.assert_array_equal(rsms, kept)
    np.testing.assert_array_equal(rows, get_estimator(estimator).rows(rsms.astype(np.float64)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_grid_from_rows_equals_cka_of_each_pair(estimator):
    rng = np.random.default_rng(5)
    base = rng.normal(size=(14, 6))
    rsms = np.stack([gram(base + noise * rng.normal(size=(14, 6))) for noise in (0.0, 0.3, 1.0, 3.0)])
    rows = get_estimator(estimator).rows(rsms)
    grid = cka_grid(rows @ rows.T)
    expected = [[cka(k, l, estimator) for l in rsms] for k in rsms]  # noqa: E741
    np.testing.assert_allclose(grid, expected, rtol=1e-12)
    np.testing.assert_array_equal(np.diagonal(grid), np.ones(4))


def batches(images, size):
    return [slice(start, start + size) for start in range(0, images, size)]


def summed_cka(k, l, size, estimator):  # noqa: E741
    """Mini-batch CKA: HSICs are summed over batches before they are divided."""
    chosen = get_estimator(estimator)
    sums = np.zeros((2, 2))
    for part in batches(len(k), size):
        rows = chosen.rows(np.stack([k[part, part], l[part, part]]))
        sums += rows @ rows.T
    return cka_grid(sums)[0, 1]


@pytest.mark.parametrize("seed", range(3))
def test_the_ratio_of_summed_unbiased_hsics_over_batches_is_close_to_the_whole(seed):
    k, l = related_rsms(1024, first=30, second=20, noise=1.5, seed=seed)  # noqa: E741
    whole = cka(k, l)
    by_batches = summed_cka(k, l, 8, "unbiased")
    assert by_batches == pytest.approx(whole, abs=0.05)
    # The mean of the batches' biased CKA is far above it: few images make everything look alike.
    averaged = np.mean([cka(k[part, part], l[part, part], "biased") for part in batches(1024, 8)])
    assert averaged > whole + 0.15
    assert abs(by_batches - whole) < abs(averaged - whole) / 4


def test_batches_of_equal_images_in_another_order_sum_to_the_same_value():
    k, l = related_rsms(24)  # noqa: E741
    order = np.concatenate([np.random.default_rng(6).permutation(8) + 8 * part for part in (2, 0, 1)])
    shuffled = summed_cka(k[np.ix_(order, order)], l[np.ix_(order, order)], 8, "unbiased")
    assert shuffled == pytest.approx(summed_cka(k, l, 8, "unbiased"), rel=1e-10)


# 0.1 is no binary fraction: its mean is off by rounding, which must not be taken for variance.
CONSTANT = {
    "ones": np.ones((8, 8)),
    "tenths": np.full((8, 8), 0.1),
    "zeros": np.zeros((8, 8)),
    "large": np.full((8, 8), 1e12 / 3),
    "sums of one number per image": np.add.outer(np.arange(8) / 7, np.arange(8) / 7),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", CONSTANT)
def test_cka_of_a_constant_rsm_is_refused_and_its_hsic_is_zero(estimator, name):
    k, _ = related_rsms(8)
    with pytest.raises(ComparisonError, match="first RSM is constant"):
        cka(CONSTANT[name], k, estimator)
    with pytest.raises(ComparisonError, match="second RSM is constant"):
        cka(k, CONSTANT[name], estimator)
    assert hsic(k, CONSTANT[name], estimator) == 0.0


def test_an_rsm_that_differs_on_the_diagonal_only_is_constant_for_unbiased_cka():
    k, _ = related_rsms(8)
    with pytest.raises(ComparisonError, match="first RSM is constant"):
        cka(np.diag(np.arange(8.0)), k, "unbiased")
    assert cka(np.diag(np.arange(8.0)), k, "biased") > 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant_rsm_is_nan_in_the_grid_and_leaves_the_others_alone(estimator, name):
    k, l = related_rsms(8)  # noqa: E741
    rows = get_estimator(estimator).rows(np.stack([k, CONSTANT[name], l]))
    assert (rows[1] == 0).all()
    grid = cka_grid(rows @ rows.T)
    assert np.isnan(grid[1]).all()
    assert np.isnan(grid[:, 1]).all()
    assert grid[0, 2] == pytest.approx(cka(k, l, estimator), rel=1e-12)
    assert grid[0, 0] == grid[2, 2] == 1.0


def test_sums_of_hsic_that_are_not_above_zero_are_nan_in_the_grid():
    sums = np.array([[4.0, 1.0, 2.0], [1.0, -1e-9, 0.5], [2.0, 0.5, 9.0]])
    kept = sums.copy()
    grid = cka_grid(sums)
    assert np.isnan(grid[1]).all()
    assert np.isnan(grid[:, 1]).all()
    np.testing.assert_allclose(grid[np.ix_([0, 2], [0, 2])], [[1.0, 1 / 3], [1 / 3, 1.0]])
    np.testing.assert_array_equal(sums, kept)


@pytest.mark.parametrize(("estimator", "images"), [("unbiased", 3), ("unbiased", 2), ("biased", 1)])
def test_too_few_images_are_refused_with_both_numbers(estimator, images):
    k = gram(np.random.default_rng(7).normal(size=(images, 3)))
    fewest = {"unbiased": 4, "biased": 2}[estimator]
    for function in (cka, hsic):
        with pytest.raises(ComparisonError, match=f"{estimator} CKA needs at least {fewest} images.*found {images}"):
            function(k, k, estimator)


def test_the_fewest_images_are_enough():
    k, l = related_rsms(4)  # noqa: E741
    assert -1 - 1e-12 <= cka(k, l, "unbiased") <= 1 + 1e-12
    assert abs(cka(k[:2, :2], l[:2, :2], "biased")) == pytest.approx(1.0)


def with_entry(position, value, images=5):
    k, _ = related_rsms(images)
    k[position] = value
    return k


GOOD = related_rsms(5)[1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.ones(5), r"RSM has shape \(5,\)"),
        (np.ones((5, 4)), r"RSM has shape \(5, 4\)"),
        (np.ones((1, 5, 5)), r"RSM has shape \(1, 5, 5\)"),
        (with_entry((1, 3), np.nan), "RSM holds nan for images 1 and 3"),
        (with_entry((4, 0), -np.inf), "RSM holds -inf for images 4 and 0"),
        (with_entry((2, 1), 77.0), "RSM is not symmetric"),
    ],
)
@pytest.mark.parametrize("function", [cka, hsic])
def test_what_is_no_rsm_is_refused_with_its_side_and_position(function, wrong, message):
    with pytest.raises(ComparisonError, match=f"first {message}"):
        function(wrong, GOOD)
    with pytest.raises(ComparisonError, match=f"second {message}"):
        function(GOOD, wrong)


def test_rsms_of_different_numbers_of_images_are_refused_with_both_numbers():
    with pytest.raises(ComparisonError, match="hold 5 and 6 images"):
        cka(related_rsms(5)[0], related_rsms(6)[0])


def test_rsms_of_different_images_are_refused_with_the_first_position():
    k, l = related_rsms(5)  # noqa: E741
    first = RSM.from_array(k, ids=list("abcde"))
    for other, position in (("abxde", 2), ("abced", 3), ("xbcde", 0)):
        with pytest.raises(ComparisonError, match=f"different images or another order, first at position {position}"):
            cka(first, RSM.from_array(l, ids=list(other)))
    with pytest.raises(ComparisonError, match="first at position 4"):
        cka(first, RSM.from_array(l[:4, :4], ids=list("abcd")))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rsms_tensors_lists_and_arrays_can_be_mixed(estimator):
    k, l = related_rsms(6)  # noqa: E741
    expected = cka(k, l, estimator)
    named = RSM.from_array(k, ids=list("abcdef"))
    assert cka(named, RSM.from_array(l, ids=list("abcdef")), estimator) == expected
    assert cka(named, l, estimator) == cka(l, named, estimator) == expected
    assert cka(torch.from_numpy(k), l.tolist(), estimator) == expected
    assert cka(k.astype(np.float32), l, estimator) == pytest.approx(expected, rel=1e-5)
    assert isinstance(cka(named, l, estimator), float)


def test_the_rsm_of_queries_and_a_database_is_refused():
    z = np.random.default_rng(8).normal(size=(9, 4, 3))
    between = rsm(z[:5], z[5:], kernel="linear")
    with pytest.raises(ComparisonError, match=r"first RSM has shape \(5, 4\)"):
        cka(between, between)


def test_semantic_and_spatial_rsms_of_one_layer_can_be_compared():
    z = np.random.default_rng(9).normal(size=(12, 9, 4))
    semantic, spatial = (rsm(z, matching=matching, kernel="linear") for matching in ("optimal", "identity"))
    for estimator in ESTIMATORS:
        assert cka(semantic, spatial, estimator) == pytest.approx(
            cka(semantic.values, spatial.values, estimator), rel=1e-14
        )
    # Only one of them knows about places, so they are not the same.
    assert cka(semantic, spatial) < 0.95


def test_unknown_estimators_are_refused_with_the_nearest_name():
    with pytest.raises(
        ComparisonError, match=r"unknown estimator 'unbiassed'; nearest: 'unbiased'.*known: unbiased, biased"
    ):
        cka(GOOD, GOOD, "unbiassed")
    assert list(ESTIMATORS) == ["unbiased", "biased"]


def test_an_estimator_object_can_be_given():
    k, l = related_rsms(6)  # noqa: E741
    assert cka(k, l, get_estimator("biased")) == cka(k, l, "biased")


def test_comparison_errors_are_project_errors_and_value_errors():
    for family in (RsmProbeError, ValueError):
        with pytest.raises(family, match="RSM is constant"):
            cka(np.ones((5, 5)), GOOD)


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e160, 1e300])
def test_cka_does_not_depend_on_the_size_of_numbers(scale):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 12, 5))
    k, l = x @ x.T, y @ y.T  # noqa: E741
    assert cka(k * scale, l) == pytest.approx(cka(k, l), rel=1e-12)
    assert cka(l, k * scale) == pytest.approx(cka(l, k), rel=1e-12)


def test_rsms_in_bfloat16_are_numbers_too():
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    k = (x @ x.T).bfloat16()
    assert cka(k, x @ x.T) == pytest.approx(cka(k.double(), x @ x.T), rel=1e-12)
