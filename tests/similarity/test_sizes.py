"""Images of very different size in one set: each is scaled by itself, so that none vanishes beside the others."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from stores import captured

import rsm_probe
from rsm_probe.errors import MatchingError
from rsm_probe.matching.methods.optimal import Auction
from rsm_probe.matching.methods.translation import Translation
from rsm_probe.matching.registry import get_matching
from rsm_probe.matching.scaling import each_rescaled, in_half_precision
from rsm_probe.pairs.pair_loop import match_sides
from rsm_probe.pairs.sides import Side
from rsm_probe.pairs.timing import seconds_per_pair
from rsm_probe.similarity.kernels import RBF

SHIFTS = Translation(grid=(3, 3))
MATCHINGS = ["identity", "optimal", "greedy", "batch-optimal", "rewindowed", "topk-greedy", SHIFTS, "scipy"]
SIZES = 2.0 ** torch.tensor([0, -80, 80, -100, 45, -45])


def drawn(images=6, locations=9, seed=0):
    return torch.randn(images, locations, 5, generator=torch.Generator().manual_seed(seed))


def sized(tokens, sizes=SIZES):
    return tokens * sizes[: len(tokens), None, None]


def oracle(x, y, matching, kernel):
    """Similarities (N, M) in float64."""
    x, y = (part.double().numpy() for part in (x, y))
    products = np.empty((len(x), len(y)))
    for i, j in np.ndindex(products.shape):
        affinity = x[i] @ y[j].T
        scale = np.abs(affinity).max()
        rows, columns = linear_sum_assignment(affinity / scale, maximize=True)
        rows, columns = (rows, rows) if matching == "identity" else (rows, columns)
        products[i, j] = affinity[rows, columns].sum()
    norms = [(part**2).sum(axis=(1, 2)) for part in (x, y)]
    if kernel == "linear":
        return products
    if kernel == "cosine":
        return products / np.sqrt(norms[0])[:, None] / np.sqrt(norms[1])
    return np.exp(-(norms[0][:, None] + norms[1] - 2 * products) / (2 * kernel.sigma2))


@pytest.mark.parametrize("matching", ["identity", "optimal"])
@pytest.mark.parametrize("kernel", ["linear", "cosine", RBF(3e-40), RBF(40.0), RBF(5e60)])
@pytest.mark.parametrize("decades", [(0, -24, -24, -24), (-30, 0, 5, 30), (30, -30, -30, 1)])
def test_as_in_float64(matching, kernel, decades):
    sizes = 10.0 ** torch.tensor(decades)
    x, y = sized(drawn(4), sizes), sized(drawn(4, 9, seed=1), sizes.flip(0))
    expected = oracle(x, y, matching, kernel)
    found = rsm_probe.rsm(x, y, matching, kernel).values
    np.testing.assert_allclose(found, expected, rtol=3e-5, atol=0 if kernel == "linear" else 1e-6)


@pytest.mark.parametrize("matching", MATCHINGS, ids=str)
@pytest.mark.parametrize("kind", ["one set", "two sets", "more locations"])
def test_cosines_do_not_depend_on_the_sizes_of_images(matching, kind):
    more = 7 if kind == "more locations" and matching is not SHIFTS else 0  # shifts need equal grids
    x, y = drawn(), None if kind == "one set" else drawn(5, 9 + more, seed=1)
    expected = rsm_probe.rsm(x, y, matching).values
    found = rsm_probe.rsm(sized(x), None if y is None else sized(y, SIZES.flip(0)), matching).values
    np.testing.assert_array_equal(found, expected)


def test_scores_grow_with_each_image_by_itself():
    x, sizes = drawn(), SIZES.double().numpy()
    expected = rsm_probe.rsm(x, matching="late-interaction", kernel="linear").values * sizes[:, None] * sizes
    found = rsm_probe.rsm(sized(x), matching="late-interaction", kernel="linear").values
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("centering", ["location-mean", "channel-mean"])
def test_a_mean_that_is_subtracted_does_not_hide_the_sizes(centering):
    x = torch.cat([drawn(3) * 1e-24, -drawn(3) * 1e-24, drawn(2, seed=1), -drawn(2, seed=1)])  # of mean 0
    found = rsm_probe.rsm(x, centering=centering).values[:6, :6]
    np.testing.assert_allclose(found, rsm_probe.rsm(x).values[:6, :6], atol=1e-6)
    assert np.abs(found[0, 1:]).max() > 0.1


def test_products_of_rounded_tokens():
    x, method = drawn(), Auction(precision="float16")
    expected = rsm_probe.rsm(x, matching=method).values
    for sizes in (SIZES, 2.0 ** torch.tensor([0, -40, 20, -30, -45, 10])):
        np.testing.assert_array_equal(rsm_probe.rsm(sized(x, sizes), matching=method).values, expected)


@pytest.mark.parametrize("matching", ["identity", "optimal", SHIFTS])
def test_tiles_in_memory_and_on_disk(tmp_path, matching):
    x, y = sized(drawn()), sized(drawn(5, seed=1), SIZES.flip(0))
    method = get_matching(matching)[1]
    for other in (None, y):
        expected = rsm_probe.rsm(x, other, matching, "linear").dataset
        rows = Side.of(x)
        tile = match_sides(rows, rows if other is None else Side.of(other), method)
        for found, name in ((tile.products, "product"), (tile.norms_x, "norm_a"), (tile.norms_y, "norm_b")):
            np.testing.assert_allclose(found, expected[name].values, rtol=1e-6)
        assert (tile.bounds >= tile.products).all()
        if matching == "optimal":
            scale = np.sqrt(tile.norms_x[:, None] * tile.norms_y)
            assert ((tile.bounds - tile.products) <= 1e-5 * scale).all()
    layers = captured(tmp_path / "x.zarr", x), captured(tmp_path / "y.zarr", y)
    pairs = rsm_probe.all_pairs(*layers, matching=matching, tile=2)
    np.testing.assert_allclose(pairs["product"].values, expected["product"].values, rtol=1e-6)


@pytest.mark.parametrize("kernel", ["linear", "cosine", RBF(40.0)])
@pytest.mark.parametrize("matching", ["identity", "optimal", "greedy"])
@pytest.mark.parametrize("memory", ["2GB", 3000])
def test_neighbours_are_those_of_brute_force(kernel, matching, memory):
    generator = torch.Generator().manual_seed(2)
    kinds = torch.randn(3, 9, 5, generator=generator)
    x, y = (kinds[torch.arange(n) % 3] + 0.5 * drawn(n, seed=n) for n in (6, 30))
    x, y = (part * SIZES[torch.randint(6, (len(part),), generator=generator), None, None] for part in (x, y))
    found = rsm_probe.nearest(x, y, 5, matching, kernel, memory=memory)
    full = rsm_probe.rsm(x, y, matching, kernel).values
    best = -np.sort(-full, axis=1)[:, :5]
    np.testing.assert_allclose(found["similarity"].values, best, rtol=1e-6, atol=1e-12)
    np.testing.assert_array_equal(np.take_along_axis(full, found["index"].values, axis=1), best)


def test_neighbours_of_float64_images_at_the_ends_of_the_range():
    x, y = drawn(4, seed=1).double(), drawn(20, seed=2).double()
    expected = rsm_probe.nearest(x, y, 3)
    found = rsm_probe.nearest(x * 1e-140, y * 1e140, 3)
    np.testing.assert_array_equal(found["index"].values, expected["index"].values)


def test_locations_of_very_different_size_within_an_image():
    x = drawn()
    x[:, 0] *= 1e-24
    x[1:3] *= 1e20
    expected = oracle(x, x, "optimal", "cosine")
    np.testing.assert_allclose(rsm_probe.rsm(x).values, expected, atol=1e-6)


def test_sets_of_ordinary_images_are_not_copied():
    for tokens in (drawn(), drawn().mT, drawn()[:, 1:, :3], torch.zeros(2, 3, 4)):
        found, units = each_rescaled(tokens)
        assert found is tokens
        assert (units == 1).all()


def test_ordinary_images_keep_every_bit_beside_others():
    x = drawn()
    x[3] = 0
    kept = x.clone()
    scaled, units = each_rescaled(sized(x))
    assert torch.equal(x, kept)
    np.testing.assert_array_equal(units[[0, 3, 4, 5]], [1, 1, 1, 1])
    assert torch.equal(scaled[[0, 3]], x[[0, 3]])
    assert torch.equal(scaled.double() * torch.from_numpy(units)[:, None, None], sized(x).double())


def test_half_precision_keeps_digits_of_the_smallest_images():
    x = drawn() * torch.tensor([1, 1e-14, 1e14, 1e-7, 3, 1e-10])[:, None, None]
    rounded, units = in_half_precision(x)
    np.testing.assert_allclose(rounded.double() * torch.from_numpy(units)[:, None, None], x, rtol=2**-11)


def test_what_does_not_fit_is_refused_with_the_image():
    x = drawn().double()
    x[2] *= 1e-170
    for call in (lambda: rsm_probe.rsm(x), lambda: rsm_probe.nearest(x, x, 1)):
        with pytest.raises(MatchingError, match=r"the largest token of image 2 is .*e-170; scale tokens to between"):
            call()


@pytest.mark.parametrize("size", [1e-30, 1e20, 1e30])
def test_pairs_of_any_size_can_be_timed(size):
    assert seconds_per_pair(drawn() * size, get_matching("scipy")[1]) > 0
