"""RSMs: invariances, an oracle in plain loops, databases of other sizes, storage."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.optimize import linear_sum_assignment

from rsm_probe import RSM, rsm
from rsm_probe.errors import ComparisonError, CostError, MatchingError, RepresentationError, StorageError
from rsm_probe.matching.methods.library_solvers import ScipyAssignment
from rsm_probe.similarity.kernels import RBF

KERNELS = ["linear", "cosine", "rbf"]
MATCHINGS = ["identity", "optimal", "lap"]
CENTERINGS = [None, "location-mean", "channel-mean"]


def random_tokens(images, locations, channels=5, seed=0):
    """Tokens whose mean depends on the location, as it does in a network."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(images, locations, channels)) + rng.normal(size=(1, locations, channels))


def shuffled(tokens, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([image[rng.permutation(len(image))] for image in tokens])


def centred(tokens, mean_of, centering):
    if centering is None:
        return tokens
    return tokens - mean_of.mean(axis=(0,) if centering == "location-mean" else (0, 1), keepdims=True)


def kernel_by_loops(products, norms_x, norms_y, kernel, same):
    distances = np.array(
        [[n + m - 2 * g for m, g in zip(norms_y, row, strict=True)] for n, row in zip(norms_x, products, strict=True)]
    )
    if kernel == "linear":
        return products
    if kernel == "cosine":
        return products / np.sqrt(np.outer(norms_x, norms_y))
    off_diagonal = [d for (i, j), d in np.ndenumerate(distances) if not same or i != j]
    return np.exp(-distances / (2 * np.median(off_diagonal)))


def rsm_by_loops(x, y, matching, kernel, same):
    products = np.zeros((len(x), len(y)))
    for i in range(len(x)):
        for j in range(len(y)):
            affinity = x[i] @ y[j].T
            if matching == "identity":
                shared = min(affinity.shape)
                rows = columns = np.arange(shared)
            else:
                rows, columns = linear_sum_assignment(affinity, maximize=True)
            products[i, j] = affinity[rows, columns].sum()
    return kernel_by_loops(products, (x**2).sum(axis=(1, 2)), (y**2).sum(axis=(1, 2)), kernel, same)


@dataclass(frozen=True)
class NeverCalled(ScipyAssignment):
    def permutation(self, affinity):
        raise AssertionError("pairs were matched")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize("centering", CENTERINGS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rsm_equals_plain_loops(kernel, matching, centering, dtype):
    z = random_tokens(6, 9)
    found = rsm(z.astype(dtype), matching=matching, kernel=kernel, centering=centering).values
    x = centred(z, z, centering)
    expected = rsm_by_loops(x, x, matching, kernel, same=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert found.dtype == np.float64


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize("locations", [(9, 9), (9, 4), (4, 9)])
@pytest.mark.parametrize("centering", [None, "channel-mean"])
def test_rsm_of_queries_and_a_database_equals_plain_loops(kernel, matching, locations, centering):
    z, other = random_tokens(4, locations[0]), random_tokens(5, locations[1], seed=1)
    found = rsm(z, other, matching=matching, kernel=kernel, centering=centering)
    # Both are centred by the mean of the database.
    x, y = centred(z, other, centering), centred(other, other, centering)
    expected = rsm_by_loops(x, y, matching, kernel, same=False)
    np.testing.assert_allclose(found.values, expected, rtol=0, atol=1e-9 * np.abs(expected).max())
    assert (found.ids, found.other_ids) == (list("0123"), list("01234"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("centering", [None, "channel-mean"])
@pytest.mark.parametrize("matching", ["optimal", "lap"])
def test_semantic_rsm_does_not_change_when_locations_of_any_image_are_shuffled(kernel, centering, matching):
    z = random_tokens(7, 12)
    plain, moved = (
        rsm(tokens, matching=matching, kernel=kernel, centering=centering).values for tokens in (z, shuffled(z))
    )
    np.testing.assert_allclose(moved, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
def test_semantic_rsm_of_queries_and_a_database_does_not_change_when_either_is_shuffled(kernel):
    z, other = random_tokens(4, 12), random_tokens(5, 7, seed=1)
    plain = rsm(z, other, kernel=kernel).values
    np.testing.assert_allclose(rsm(shuffled(z), other, kernel=kernel).values, plain, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(rsm(z, shuffled(other), kernel=kernel).values, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("matching", "centering"),
    [
        ("identity", None),
        ("identity", "channel-mean"),
        ("identity", "location-mean"),
        # The mean of a location mixes other locations once they are shuffled: not even optimal matching undoes that.
        ("optimal", "location-mean"),
    ],
)
def test_shuffling_locations_changes_spatial_rsms_and_those_centred_by_location(matching, centering):
    z = random_tokens(7, 12)
    plain, moved = (rsm(tokens, matching=matching, centering=centering).values for tokens in (z, shuffled(z)))
    assert np.abs(moved - plain).max() > 0.05


@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize("centering", CENTERINGS)
def test_one_permutation_of_locations_for_all_images_changes_nothing(matching, centering):
    z = random_tokens(6, 9)
    order = np.random.default_rng(0).permutation(9)
    plain, moved = (rsm(tokens, matching=matching, centering=centering).values for tokens in (z, z[:, order]))
    np.testing.assert_allclose(moved, plain, rtol=1e-9, atol=1e-9)


def special_tokens(kind, locations, seed):
    rng = np.random.default_rng(seed)
    if kind == "duplicate images":
        z = rng.normal(size=(6, locations, 5))
        z[3], z[5] = z[0], z[1]
        return z
    if kind == "few distinct locations":
        # Many optimal permutations, and terms of very different size, so that sums depend on their order.
        distinct = rng.lognormal(0, 2, size=(3, 5)) * rng.choice([-1, 1], size=(3, 5))
        return distinct[rng.integers(0, 3, size=(6, locations))]
    if kind == "dead locations":
        return np.maximum(rng.normal(size=(6, locations, 5)) - 1.0, 0.0)
    return rng.normal(size=(6, locations, 5))


@pytest.mark.parametrize("locations", [1, 4, 16])
@pytest.mark.parametrize("kind", ["random", "duplicate images", "few distinct locations", "dead locations"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_semantic_products_are_nowhere_below_spatial_ones(locations, kind, dtype):
    for seed in range(20):
        z = special_tokens(kind, locations, seed).astype(dtype)
        semantic, spatial = (rsm(z, matching=m, kernel="linear", workers=1).values for m in ("optimal", "identity"))
        # Without tolerance: retrieval and bounds rely on it in every entry.
        assert (semantic >= spatial).all()
        if locations == 1:
            np.testing.assert_array_equal(semantic, spatial)


def test_semantic_similarity_of_an_image_and_its_shuffled_copy_is_one():
    image = random_tokens(1, 16)
    z = np.concatenate([image, shuffled(image, seed=3), random_tokens(1, 16, seed=1)])
    semantic, spatial = (rsm(z, matching=m).values for m in ("optimal", "identity"))
    assert semantic[0, 1] == pytest.approx(1.0, abs=1e-12)
    assert spatial[0, 1] < 0.9


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize("centering", CENTERINGS)
def test_rsms_of_one_set_are_symmetric_with_self_similarity_on_the_diagonal(kernel, matching, centering):
    z = random_tokens(6, 8).astype(np.float32)
    values = rsm(z, matching=matching, kernel=kernel, centering=centering).values
    np.testing.assert_array_equal(values, values.T)
    norms = (centred(z.astype(np.float64), z.astype(np.float64), centering) ** 2).sum(axis=(1, 2))
    expected = norms if kernel == "linear" else np.ones(6)
    np.testing.assert_allclose(np.diagonal(values), expected, rtol=1e-6 if kernel == "linear" else 1e-15)


@pytest.mark.parametrize("matching", MATCHINGS)
def test_linear_diagonal_is_the_squared_norm_in_float64(matching):
    z = random_tokens(4, 30, channels=40).astype(np.float32)
    values = rsm(z, matching=matching, kernel="linear").values
    np.testing.assert_allclose(np.diagonal(values), (z.astype(np.float64) ** 2).sum(axis=(1, 2)), rtol=1e-13)


@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize("shape", [(9, 4), (64, 16), (100, 37)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rbf_of_copies_of_one_image_is_one(matching, shape, dtype):
    for seed in range(5):
        z = np.repeat(np.random.default_rng(seed).normal(size=(1, *shape)).astype(dtype), 5, axis=0)
        # Distances of copies are rounding noise; a width taken from that noise would make them look unlike.
        np.testing.assert_allclose(rsm(z, matching=matching, kernel="rbf").values, np.ones((5, 5)), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_semantic_rbf_of_shuffled_copies_of_one_image_is_one(dtype):
    # As above, where the noise is that of affinities in the precision of the tokens.
    z = shuffled(np.repeat(np.random.default_rng(0).normal(size=(1, 64, 32)), 5, axis=0)).astype(dtype)
    np.testing.assert_allclose(rsm(z, kernel="rbf").values, np.ones((5, 5)), atol=1e-6)


@pytest.mark.parametrize("kernel", ["cosine", "rbf"])
def test_a_copy_of_an_image_is_as_similar_as_the_image_itself(kernel):
    z = special_tokens("duplicate images", 16, 0).astype(np.float32)
    values = rsm(z, kernel=kernel).values
    np.testing.assert_allclose(values[0, 3], 1.0, rtol=1e-12)
    np.testing.assert_allclose(values[0], values[3], rtol=0, atol=1e-6)


def test_an_image_of_zeros_has_cosine_zero_with_every_image():
    z = random_tokens(4, 6)
    z[2] = 0.0
    values = rsm(z).values
    assert (values[2] == 0).all()
    assert (values[:, 2] == 0).all()
    assert values[0, 0] == pytest.approx(1.0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize("locations", [(4, 9), (9, 4), (1, 6), (6, 1)])
def test_other_numbers_of_locations_equal_padding_with_zero_vectors(kernel, matching, locations):
    rng = np.random.default_rng(2)
    # Positive against negative: affinities are all below 0, and yet the whole smaller image is matched.
    z, other = np.abs(rng.normal(size=(3, locations[0], 5))), -np.abs(rng.normal(size=(4, locations[1], 5)))
    larger = max(locations)
    padded = [np.pad(tokens, ((0, 0), (0, larger - tokens.shape[1]), (0, 0))) for tokens in (z, other)]
    found, expected = (rsm(a, b, matching=matching, kernel=kernel).values for a, b in ((z, other), padded))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    if kernel == "linear":
        assert (found < 0).all()


@pytest.mark.parametrize("centering", ["location-mean", "channel-mean"])
def test_the_mean_of_the_database_centres_both_sides(centering):
    z, other = random_tokens(3, 6), random_tokens(5, 6, seed=1) + 3.0
    found = rsm(z, other, centering=centering).values
    expected = rsm(centred(z, other, centering), centred(other, other, centering)).values
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    own_mean = rsm(centred(z, z, centering), centred(other, other, centering)).values
    assert np.abs(found - own_mean).max() > 0.05


def test_a_mean_per_location_needs_equal_numbers_of_locations():
    with pytest.raises(RepresentationError, match=r"shape \(1, 6, 5\).*\(3, 4, 5\).*channel-mean"):
        rsm(random_tokens(3, 4), random_tokens(5, 6), centering="location-mean")


@pytest.mark.parametrize("first", KERNELS)
@pytest.mark.parametrize("second", KERNELS)
@pytest.mark.parametrize("others", [None, (5, 6), (4, 9), (4, 6)])
def test_with_kernel_equals_computing_anew(first, second, others):
    z = random_tokens(4, 6)
    other = None if others is None else random_tokens(*others, seed=1)
    found, expected = rsm(z, other, kernel=first).with_kernel(second), rsm(z, other, kernel=second)
    np.testing.assert_array_equal(found.values, expected.values)
    assert found.attributes == expected.attributes


def test_with_kernel_takes_a_kernel_with_options_and_leaves_the_rsm_as_it_was():
    z = random_tokens(4, 6)
    linear = rsm(z, kernel="linear")
    kept = linear.values.copy()
    found = linear.with_kernel(RBF(sigma2=20.0))
    np.testing.assert_array_equal(found.values, rsm(z, kernel=RBF(sigma2=20.0)).values)
    np.testing.assert_array_equal(linear.values, kept)
    assert linear.attributes["kernel"] == "linear"


def test_with_kernel_needs_the_inner_products():
    with pytest.raises(ComparisonError, match="no inner products"):
        RSM.from_array(np.eye(3)).with_kernel("rbf")


@pytest.mark.parametrize("kernel", ["linear", "cosine"])
def test_smallest_eigenvalue_is_numpys_and_below_zero_for_some_semantic_rsms(kernel):
    smallest = []
    for seed in range(20):
        z = np.random.default_rng(seed).normal(size=(12, 9, 2))
        semantic = rsm(z, kernel=kernel)
        smallest.append(semantic.smallest_eigenvalue)
        assert smallest[-1] == pytest.approx(np.linalg.eigvalsh(semantic.values).min(), abs=1e-12)
        # Spatio-semantic RSMs are Gram matrices: positive semi-definite up to rounding.
        assert rsm(z, kernel=kernel, matching="identity").smallest_eigenvalue > -1e-9
    assert min(smallest) < -1e-3


@pytest.mark.parametrize("ids", [None, [*"abc"]])
def test_rsms_of_two_sets_have_no_eigenvalues(ids):
    # Two sets of equally many images are still two sets, even where nobody named them.
    other_ids = None if ids is None else [*"xyz"]
    with pytest.raises(ComparisonError, match="one set of images has eigenvalues"):
        _ = rsm(random_tokens(3, 4), random_tokens(3, 4, seed=1), ids=ids, other_ids=other_ids).smallest_eigenvalue


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tokens_are_computed_in_float32(dtype):
    z = torch.from_numpy(random_tokens(5, 6)).to(dtype)
    for matching in MATCHINGS:
        np.testing.assert_array_equal(rsm(z, matching=matching).values, rsm(z.float(), matching=matching).values)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int16", "int64", "uint8", ">f4", ">f8"])
def test_arrays_of_real_numbers_are_accepted(dtype):
    z = np.random.default_rng(3).integers(0, 8, size=(4, 5, 3))
    np.testing.assert_allclose(rsm(z.astype(dtype)).values, rsm(torch.from_numpy(z).double()).values, rtol=1e-6)


def test_tokens_that_require_gradients_or_are_views_are_accepted_and_left_as_they_were():
    z = torch.from_numpy(random_tokens(4, 6))
    expected = rsm(z).values
    channels_first = z.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    kept = channels_first.detach().clone()
    np.testing.assert_allclose(rsm(channels_first, centering=None).values, expected, rtol=1e-12)
    rsm(channels_first, centering="location-mean")
    assert torch.equal(channels_first.detach(), kept)


def test_flipped_arrays_are_accepted():
    z = random_tokens(4, 6)
    found = rsm(z[:, ::-1], z[::-1], matching="identity").values
    np.testing.assert_array_equal(found, rsm(z[:, ::-1].copy(), z[::-1].copy(), matching="identity").values)


@pytest.mark.parametrize("matching", MATCHINGS)
def test_tokens_and_database_of_different_precision_are_accepted(matching):
    z, other = random_tokens(4, 6), random_tokens(3, 6, seed=1)
    for first, second in ((np.float32, np.float64), (np.float64, np.float32), (np.float16, np.float32)):
        a, b = z.astype(first), other.astype(second)
        # Neither side loses digits to the other.
        common = np.result_type(first, second)
        expected = rsm(a.astype(common), b.astype(common), matching=matching).values
        np.testing.assert_array_equal(rsm(a, b, matching=matching).values, expected)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
@pytest.mark.parametrize("matching", MATCHINGS)
def test_float32_tokens_of_extreme_scale_have_the_similarities_of_ordinary_ones(scale, matching):
    z = random_tokens(5, 6)
    for kernel in ("cosine", "rbf"):
        found = rsm((z * scale).astype(np.float32), matching=matching, kernel=kernel).values
        np.testing.assert_allclose(found, rsm(z, matching=matching, kernel=kernel).values, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_the_image(bad):
    z = random_tokens(4, 3)
    z[2, 1, 0] = bad
    with pytest.raises(RepresentationError, match=r"^z holds NaN or infinity, first in image 2$"):
        rsm(z)
    with pytest.raises(RepresentationError, match="z holds NaN or infinity, first in image cat"):
        rsm(z, ids=["ant", "bee", "cat", "dog"])
    with pytest.raises(RepresentationError, match="other holds NaN or infinity, first in image emu"):
        rsm(random_tokens(2, 3), z, other_ids=["yak", "owl", "emu", "fox"])


def test_too_few_ids_are_reported_even_where_an_unnamed_image_is_not_finite():
    z = random_tokens(4, 3)
    z[3] = np.nan
    with pytest.raises((ComparisonError, RepresentationError), match=r"ids holds 2 names for 4 images|image 3"):
        rsm(z, ids=["a", "b"])


@pytest.mark.parametrize("shape", [(4, 3), (3,), (0, 3, 2), (4, 0, 2), (4, 3, 0), (2, 4, 3, 3)])
def test_tokens_of_the_wrong_shape_are_refused_with_their_shape(shape):
    with pytest.raises(RepresentationError, match=r"^z must hold tokens \(N, S, C\), found shape \(\d"):
        rsm(np.zeros(shape))
    with pytest.raises(RepresentationError, match=r"^other must hold tokens \(N, S, C\), found shape \(\d"):
        rsm(np.zeros((2, 3, 2)), np.zeros(shape))


@pytest.mark.parametrize(("values", "kind"), [({"layer1": np.zeros((2, 2, 2))}, "dict"), ([[[1.0]]], "list")])
def test_what_is_no_array_is_refused_with_its_type(values, kind):
    with pytest.raises(RepresentationError, match=f"z must be an array of tokens.*found {kind}"):
        rsm(values)


@pytest.mark.parametrize(
    "values",
    [np.ones((2, 3, 4)) * 1j, torch.ones(2, 3, 4) * 1j, np.full((2, 3, 4), "a")],
    ids=["array", "tensor", "text"],
)
@pytest.mark.parametrize("matching", ["identity", "optimal"])
def test_tokens_that_are_no_real_numbers_are_refused(values, matching):
    with pytest.raises(RepresentationError, match=r"\bz\b"):
        rsm(values, matching=matching)


def test_a_database_of_another_layer_is_refused_with_both_numbers_of_channels():
    with pytest.raises(RepresentationError, match="z has 5 channels and other has 6"):
        rsm(random_tokens(3, 4, channels=5), random_tokens(3, 4, channels=6))


def test_unknown_names_are_refused_with_the_nearest():
    z = random_tokens(3, 4)
    with pytest.raises(MatchingError, match="unknown matching 'optimum'; nearest: 'optimal'"):
        rsm(z, matching="optimum")
    with pytest.raises(ComparisonError, match="unknown kernel 'cosinus'; nearest: 'cosine'"):
        rsm(z, kernel="cosinus")
    with pytest.raises(RepresentationError, match="unknown centering 'location_mean'; nearest: 'location-mean'"):
        rsm(z, centering="location_mean")


def test_a_budget_below_one_affinity_is_refused():
    with pytest.raises(CostError, match="6 x 6 locations"):
        rsm(random_tokens(3, 6), memory=10)


def test_workers_and_memory_do_not_change_a_bit():
    z = random_tokens(8, 10).astype(np.float32)
    np.testing.assert_array_equal(rsm(z, workers=1, memory=400).values, rsm(z, workers=4).values)


def test_wrong_ids_are_refused_before_any_pair_is_matched():
    # Matching may take hours; a wrong list of names must not be found out after it.
    for ids, message in ((["a", "b"], "ids holds 2 names for 3 images"), (["a", "b", "a"], "'a' more than once")):
        with pytest.raises(ComparisonError, match=message):
            rsm(random_tokens(3, 4), matching=NeverCalled(), ids=ids)
    with pytest.raises(ComparisonError, match="other_ids holds 1 names for 2 images"):
        rsm(random_tokens(3, 4), random_tokens(2, 4), matching=NeverCalled(), other_ids=["a"])


def test_wrong_ids_are_refused():
    z = random_tokens(3, 4)
    with pytest.raises(ComparisonError, match="ids holds 2 names for 3 images"):
        rsm(z, ids=["a", "b"])
    with pytest.raises(ComparisonError, match="ids names image 'b' more than once"):
        rsm(z, ids=["a", "b", "b"])
    with pytest.raises(ComparisonError, match="other_ids holds 3 names for 2 images"):
        rsm(z, z[:2], other_ids=["a", "b", "c"])


def test_an_rsm_knows_its_images_and_how_it_came_about():
    found = rsm(random_tokens(3, 4), matching="lap", kernel="rbf", centering="channel-mean", ids=["a", "b", "c"])
    assert found.ids == found.other_ids == ["a", "b", "c"]
    assert found.attributes == {"matching": "lap", "kernel": "rbf", "centering": "channel-mean"}
    assert repr(found).startswith("RSM(3 x 3 images, matching='lap'")
    between = rsm(random_tokens(3, 4), random_tokens(2, 4), ids=["a", "b", "c"])
    assert (between.ids, between.other_ids) == (["a", "b", "c"], ["0", "1"])


def test_an_rsm_is_an_array_to_numpy():
    found = rsm(random_tokens(3, 4))
    np.testing.assert_array_equal(np.asarray(found), found.values)
    assert np.asarray(found, dtype=np.float32).dtype == np.float32
    copied = np.array(found)
    copied[:] = 0
    assert found.values[0, 0] == pytest.approx(1.0)


def test_from_array_wraps_a_matrix_with_its_names():
    values = np.array([[1, 2], [2, 5]])
    found = RSM.from_array(values, ids=["a", "b"])
    np.testing.assert_array_equal(found.values, values)
    assert found.values.dtype == np.float64
    assert (found.ids, found.other_ids) == (["a", "b"], ["a", "b"])
    values[0, 0] = 99
    assert found.values[0, 0] == 1.0
    between = RSM.from_array(np.arange(6.0).reshape(2, 3), ids=["a", "b"], other_ids=["x", "y", "z"])
    assert (between.ids, between.other_ids) == (["a", "b"], ["x", "y", "z"])


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        (np.zeros(3), {}, r"shape \(N, M\), found \(3,\)"),
        (np.zeros((0, 0)), {}, r"shape \(N, M\), found \(0, 0\)"),
        (np.zeros((2, 2, 2)), {}, r"found \(2, 2, 2\)"),
        (np.array([[1.0, np.nan], [0.0, 1.0]]), {}, "images 0 and 1 is nan"),
        (np.array([[1.0, 0.0], [np.inf, 1.0]]), {}, "images 1 and 0 is inf"),
        (np.zeros((2, 3)), {}, r"square, found \(2, 3\); give other_ids"),
        (np.array([[1.0, 0.2], [0.3, 1.0]]), {}, "symmetric"),
        # What counts as symmetric is relative to the size of the values.
        (np.array([[1.0, 0.2], [0.3, 1.0]]) * 1e-12, {}, "symmetric"),
        (np.eye(2), {"ids": ["a"]}, "ids holds 1 names for 2 images"),
        (np.eye(2), {"ids": ["a", "a"]}, "ids names image 'a' more than once"),
        (np.zeros((2, 3)), {"other_ids": ["x", "y"]}, "other_ids holds 2 names for 3 images"),
        (np.zeros((2, 2)), {"other_ids": ["x", "x"]}, "other_ids names image 'x' more than once"),
    ],
)
def test_from_array_refuses_what_is_no_rsm(values, names, message):
    with pytest.raises(ComparisonError, match=message):
        RSM.from_array(values, **names)


def test_from_array_allows_rounding_in_symmetry():
    values = np.array([[1.0, 0.3], [np.float64(np.float32(0.3)), 1.0]])
    assert RSM.from_array(values).values[0, 1] == 0.3


@pytest.mark.parametrize("others", [None, (3, 7)])
def test_what_is_saved_is_opened_again(tmp_path, others):
    other = None if others is None else random_tokens(*others, seed=1)
    kept = rsm(random_tokens(4, 5), other, kernel="linear", ids=["a/1.png", "b 2", "ü", "d"])
    kept.save(tmp_path / "deep" / "rsm.zarr")
    found = RSM.open(tmp_path / "deep" / "rsm.zarr")
    assert found.dataset.identical(kept.dataset)
    assert (found.ids, found.other_ids, found.attributes) == (kept.ids, kept.other_ids, kept.attributes)
    np.testing.assert_array_equal(found.with_kernel("cosine").values, kept.with_kernel("cosine").values)


def test_saved_rsms_open_in_plain_xarray_and_are_replaced_in_place(tmp_path):
    path = tmp_path / "rsm.zarr"
    RSM.from_array(np.eye(4)).save(path)
    RSM.from_array(2 * np.eye(3), ids=["a", "b", "c"]).save(str(path))
    with xr.open_zarr(path, chunks=None) as dataset:
        np.testing.assert_array_equal(dataset["similarity"].values, 2 * np.eye(3))
        assert dataset["image_a"].values.tolist() == ["a", "b", "c"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["rsm.zarr"]


def test_a_path_without_an_rsm_is_refused_with_its_name(tmp_path):
    with pytest.raises(StorageError, match=r"nowhere\.zarr"):
        RSM.open(tmp_path / "nowhere.zarr")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(StorageError, match=r"empty\.zarr"):
        RSM.open(tmp_path / "empty.zarr")


def test_stored_data_without_similarities_is_refused_with_its_name(tmp_path):
    xr.Dataset({"accuracy": ("epoch", np.ones(3))}).to_zarr(tmp_path / "training.zarr", zarr_format=2)
    with pytest.raises(StorageError, match=r"training\.zarr"):
        RSM.open(tmp_path / "training.zarr")


def test_a_single_image_has_an_rsm():
    z = random_tokens(1, 4)
    for kernel in KERNELS:
        values = rsm(z, kernel=kernel).values
        np.testing.assert_allclose(values, [[(z**2).sum() if kernel == "linear" else 1.0]])


def test_options_of_what_is_not_there_are_refused():
    z = torch.randn(4, 9, 5)
    with pytest.raises(ComparisonError, match="other_ids was given without other"):
        rsm(z, other_ids=list("abcd"))
