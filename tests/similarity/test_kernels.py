"""Kernels from inner products and norms, against direct computation on permuted tokens."""

import numpy as np
import pytest

from rsm_probe.errors import ComparisonError
from rsm_probe.similarity.kernels import RBF, Cosine, Linear, get_kernel, kernel_names


def direct_cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def direct_rbf(a, b, sigma2):
    return np.exp(-np.sum((a - b) ** 2) / (2 * sigma2))


@pytest.fixture
def permuted():
    """Images x, and for every pair (i, j) image j of y with its locations in another order."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 6, 3)), rng.normal(size=(5, 6, 3)) + 0.5
    orders = np.array([[rng.permutation(6) for _ in y] for _ in x])
    moved = np.array([[y[j][orders[i, j]] for j in range(5)] for i in range(4)])
    products = np.einsum("isc,ijsc->ij", x, moved)
    norms = (x**2).sum(axis=(1, 2)), (y**2).sum(axis=(1, 2))
    return x.reshape(4, -1), moved.reshape(4, 5, -1), products, norms


@pytest.mark.parametrize(
    ("kernel", "direct"),
    [
        (Linear(), lambda a, b: a @ b),
        (Cosine(), direct_cosine),
        (RBF(sigma2=7.0), lambda a, b: direct_rbf(a, b, 7.0)),
        (RBF(sigma2=0.5), lambda a, b: direct_rbf(a, b, 0.5)),
    ],
    ids=["linear", "cosine", "rbf 7", "rbf 0.5"],
)
def test_kernels_from_products_equal_direct_computation_on_permuted_tokens(permuted, kernel, direct):
    x, moved, products, norms = permuted
    expected = [[direct(x[i], moved[i, j]) for j in range(5)] for i in range(4)]
    np.testing.assert_allclose(kernel(products, *norms, same=False), expected, rtol=1e-10)


def test_rbf_of_two_sets_takes_the_median_of_squared_distances_over_all_entries(permuted):
    x, moved, products, norms = permuted
    sigma2 = np.median([np.sum((x[i] - moved[i, j]) ** 2) for i in range(4) for j in range(5)])
    expected = [[direct_rbf(x[i], moved[i, j], sigma2) for j in range(5)] for i in range(4)]
    np.testing.assert_allclose(RBF()(products, *norms, same=False), expected, rtol=1e-10)


def test_rbf_of_one_set_takes_the_median_of_squared_distances_without_the_diagonal():
    x = np.random.default_rng(1).normal(size=(4, 7))
    distances = np.array([[np.sum((a - b) ** 2) for b in x] for a in x])
    sigma2 = np.median(distances[np.triu_indices(4, 1)])
    # The case is chosen well only if the diagonal's zeros would move the median.
    assert sigma2 != pytest.approx(np.median(distances))
    norms = (x**2).sum(axis=1)
    np.testing.assert_allclose(
        RBF()(x @ x.T, norms, norms, same=True), np.exp(-distances / (2 * sigma2)), rtol=1e-10, atol=1e-14
    )


def test_same_decides_whether_zero_distances_on_the_diagonal_count():
    x = np.random.default_rng(2).normal(size=(3, 4))
    norms = (x**2).sum(axis=1)
    among_themselves, as_two_sets = (RBF()(x @ x.T, norms, norms, same=same) for same in (True, False))
    # With the diagonal the median is smaller, so the width is smaller, and so are similarities of different images.
    assert (as_two_sets[np.triu_indices(3, 1)] < among_themselves[np.triu_indices(3, 1)]).all()


def test_rbf_similarities_do_not_depend_on_the_scale_of_the_tokens():
    x = np.random.default_rng(3).normal(size=(5, 4))
    plain, scaled = (RBF()(z @ z.T, (z**2).sum(1), (z**2).sum(1), same=True) for z in (x, 1e-6 * x))
    np.testing.assert_allclose(plain, scaled, rtol=1e-9)


def test_cosine_of_a_zero_image_is_zero():
    products = np.array([[0.0, 0.0], [0.0, 4.0]])
    norms = np.array([0.0, 4.0])
    np.testing.assert_array_equal(Cosine()(products, norms, norms, same=True), [[0.0, 0.0], [0.0, 1.0]])


def test_cosine_is_clipped_where_rounding_exceeds_the_norms():
    products = np.array([[1.0 + 1e-7, -1.0 - 1e-7], [0.5, -0.5]])
    values = Cosine()(products, np.ones(2), np.ones(2), same=False)
    np.testing.assert_array_equal(values, [[1.0, -1.0], [0.5, -0.5]])


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_cosine_of_norms_whose_product_leaves_float64_is_still_right(scale):
    norms = np.array([scale, scale]) * scale
    products = np.array([[1.0, 0.25]]) * scale * scale
    np.testing.assert_allclose(Cosine()(products, norms[:1], norms, same=False), [[1.0, 0.25]], rtol=1e-12)


def test_negative_squared_distances_from_rounding_count_as_zero():
    norms = np.array([1.0, 1.0])
    products = np.array([[1.0, 1.0 + 1e-6], [1.0 + 1e-6, 1.0]])
    np.testing.assert_array_equal(RBF(sigma2=1e-9)(products, norms, norms, same=True), np.ones((2, 2)))


def test_rbf_with_a_median_of_zero_is_one_at_distance_zero_and_zero_elsewhere():
    # Three equal images and one other: half of the six distances are 0, and with five equal ones the median is 0.
    x = np.array([[1.0, 0.0]] * 5 + [[0.0, 1.0]])
    norms = (x**2).sum(axis=1)
    expected = np.array([[float((a == b).all()) for b in x] for a in x])
    np.testing.assert_array_equal(RBF()(x @ x.T, norms, norms, same=True), expected)
    np.testing.assert_array_equal(RBF()(x @ x.T, norms, norms, same=False), expected)


def test_rbf_of_a_single_image_with_itself_is_one():
    assert RBF()(np.array([[4.0]]), np.array([4.0]), np.array([4.0]), same=True).tolist() == [[1.0]]


@pytest.mark.parametrize("sigma2", [0, 0.0, -1.0, float("nan"), -float("inf")])
def test_widths_that_are_not_above_zero_are_refused(sigma2):
    with pytest.raises(ComparisonError, match=f"sigma2.*(above 0|finite number), found {sigma2}"):
        RBF(sigma2=sigma2)


@pytest.mark.parametrize("name", kernel_names())
def test_kernels_neither_change_nor_share_the_products(name):
    x = np.random.default_rng(4).normal(size=(4, 3))
    products, norms = x @ x.T, (x**2).sum(axis=1)
    kept = products.copy()
    values = get_kernel(name)(products, norms, norms, same=True)
    values[:] = 77.0
    np.testing.assert_array_equal(products, kept)


@pytest.mark.parametrize("name", kernel_names())
def test_kernels_give_float64_of_the_shape_of_the_products(name):
    values = get_kernel(name)(np.ones((2, 3)), np.full(2, 2.0), np.full(3, 2.0), same=False)
    assert values.shape == (2, 3)
    assert values.dtype == np.float64
    assert get_kernel(name).name == name


def test_kernels_by_name_are_the_three_of_the_paper():
    assert kernel_names() == ["linear", "cosine", "rbf"]
    assert (get_kernel("linear"), get_kernel("cosine"), get_kernel("rbf")) == (Linear(), Cosine(), RBF())


def test_a_kernel_object_keeps_its_options():
    assert get_kernel(RBF(sigma2=3.0)).sigma2 == 3.0


@pytest.mark.parametrize(("wrong", "right"), [("lineer", "linear"), ("cosin", "cosine"), ("rfb", "rbf")])
def test_unknown_kernels_are_refused_with_the_nearest_name(wrong, right):
    with pytest.raises(ComparisonError, match=f"unknown kernel '{wrong}'; nearest: '{right}'.*known: linear, cosine"):
        get_kernel(wrong)
