"""The best circular shift against all shifts one by one, on square and other grids, and where there is no grid."""

import numpy as np
import pytest
import torch

from rsm_probe import Accumulator, Representation, match, match_affinity, rsm
from rsm_probe.errors import MatchingError
from rsm_probe.matching import translation
from rsm_probe.matching.protocol import Locations
from rsm_probe.matching.translation import Translation

GRIDS = [(1, 1), (1, 6), (6, 1), (2, 2), (2, 3), (4, 4), (3, 5), (5, 5), (4, 7), (7, 2)]


def all_shifts(x, y, grid):
    """(value, partner of every location) of every shift, by index arithmetic location by location."""
    height, width = grid
    found = []
    for down in range(height):
        for right in range(width):
            partners = [
                ((row + down) % height) * width + (column + right) % width
                for row in range(height)
                for column in range(width)
            ]
            value = sum(float(np.dot(x[s].astype(np.float64), y[t])) for s, t in enumerate(partners))
            found.append((value, partners))
    return found


def images(grid, seed=0, dtype=np.float32, count=2, channels=3):
    return np.random.default_rng(seed).normal(size=(count, grid[0] * grid[1], channels)).astype(dtype)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_best_of_all_shifts_is_found(grid, dtype):
    for seed in range(5):
        x, y = images(grid, seed, dtype)
        value, partners = max(all_shifts(x, y, grid))
        for found in (match(x, y, "translation", grid=grid), match(x, y, Translation(grid=grid))):
            assert found.value == pytest.approx(value, rel=1e-9)
            assert found.permutation.tolist() == partners
            assert found.status == "feasible"
            assert found.bound >= found.value
        assert match(y, x, Translation(grid)).value == pytest.approx(value, rel=1e-9)


def test_the_value_is_exact_where_float32_would_lose_it():
    x = np.full((9, 1), 2.0**12, np.float32)
    x[0] = 1.0
    # The next float32 below is 8 * 2^24.
    assert match(x, x, "translation").value == pytest.approx(8 * 2.0**24 + 1.0, rel=1e-12)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 7)])
def test_an_image_that_was_shifted_is_recovered(grid):
    x = images(grid)[0]
    for down in range(grid[0]):
        for right in range(grid[1]):
            moved = np.roll(x.reshape(*grid, -1), (down, right), axis=(0, 1)).reshape(x.shape)
            found = match(x, moved, "translation", grid=grid)
            np.testing.assert_array_equal(moved[found.permutation], x)
            assert found.value == pytest.approx((x.astype(np.float64) ** 2).sum(), rel=1e-12)
    everything = np.stack([x, moved, np.roll(moved.reshape(*grid, -1), 1, axis=1).reshape(x.shape)])
    np.testing.assert_allclose(rsm(everything, matching="translation", grid=grid).values, 1.0, rtol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("block", [1, 500, 128 << 20])
def test_all_pairs_at_once_equal_brute_force_pair_by_pair(grid, block, monkeypatch):
    monkeypatch.setattr(translation, "_BLOCK_BYTES", block)
    x, y = images(grid, 1, count=5), images(grid, 2, count=3)
    expected = [[max(all_shifts(a, b, grid))[0] for b in y] for a in x]
    tensors = Locations(torch.from_numpy(x), grid), Locations(torch.from_numpy(y), grid)
    np.testing.assert_allclose(Translation().products(*tensors), expected, rtol=1e-9)
    np.testing.assert_allclose(Translation(grid).products(*(Locations(t.tokens) for t in tensors)), expected, rtol=1e-9)
    for options in ({"matching": "translation", "grid": grid}, {"matching": Translation(grid)}):
        np.testing.assert_allclose(rsm(x, y, kernel="linear", **options).values, expected, rtol=1e-9)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_rsm_of_one_set_is_symmetric_and_an_image_is_itself(grid):
    z = images(grid, 3, count=6)
    found = rsm(z, matching="translation", grid=grid, kernel="linear").values
    np.testing.assert_array_equal(found, found.T)
    expected = [[max(all_shifts(a, b, grid))[0] for b in z] for a in z]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_accumulator_takes_the_grid_that_a_probe_found():
    z = images((2, 6), 4, count=6)
    with Accumulator(matchings=("translation",), keep=["a"], kernels=("linear",)) as accumulator:
        tokens = torch.from_numpy(z)
        accumulator.update({"a": Representation(tokens, tokens[:, :0], (2, 6))})
        found = accumulator.result().rsms.values[0, 0]
    np.testing.assert_allclose(found, [[max(all_shifts(a, b, (2, 6)))[0] for b in z] for a in z], rtol=1e-9)


@pytest.mark.parametrize("locations", [2, 6, 15])
def test_locations_that_form_no_square_need_a_grid(locations):
    x, y = images((1, locations))
    for use in (lambda: match(x, y, "translation"), lambda: rsm(x[None], matching="translation")):
        with pytest.raises(MatchingError, match=rf"{locations} locations form no square.*Translation\(grid=\(H, W\)\)"):
            use()


@pytest.mark.parametrize("grid", [(2, 3), (5, 5), (0, 16), (-4, -4)])
def test_a_grid_that_does_not_hold_the_locations_is_refused(grid):
    x, y = images((4, 3))
    with pytest.raises(MatchingError, match=r"grid (of .* does not hold 12 locations|is two whole numbers)"):
        match(x, y, "translation", grid=grid)
    with pytest.raises(MatchingError, match=r"grid of .* does not hold 12 locations|a grid is two whole numbers"):
        rsm(x[None], matching=Translation(grid))


@pytest.mark.parametrize("options", [{}, {"grid": (3, 3)}, {"grid": (4, 4)}])
def test_images_of_different_sizes_have_no_shift(options):
    x, y = images((3, 3))[0], images((4, 4))[0]
    with pytest.raises(MatchingError, match=r"shifts need equal grids|does not hold"):
        match(x, y, "translation", **options)
    with pytest.raises(MatchingError, match=r"shifts need equal grids|does not hold"):
        rsm(x[None], y[None], matching="translation", **options)


def test_an_affinity_alone_is_refused_with_what_to_use_instead():
    with pytest.raises(MatchingError, match=r"use match\(x, y, 'translation'\)"):
        match_affinity(np.ones((4, 4)), "translation")


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_tokens_does_not_change_the_shift(scale):
    x, y = images((4, 4), 6)
    found, expected = match(x * np.float32(scale), y * np.float32(scale), "translation"), match(x, y, "translation")
    assert found.permutation.tolist() == expected.permutation.tolist()
    assert found.value == pytest.approx(expected.value * scale**2, rel=1e-5)


def test_dead_and_constant_images_have_finite_values():
    z = np.stack([np.zeros((9, 2)), np.ones((9, 2)), -np.ones((9, 2))])
    np.testing.assert_allclose(rsm(z, matching="translation").values, [[0, 0, 0], [0, 1, -1], [0, -1, 1]], atol=1e-12)
    assert sorted(match(z[0], z[1], "translation").permutation.tolist()) == list(range(9))


@pytest.mark.parametrize("grid", [[3, 4], (-3, -4), (3, 4, 1), (2.4, 5.0)])
def test_whatever_is_no_pair_of_positive_integers_is_taken_or_refused_in_words(grid):
    x, y = images((3, 4))
    if isinstance(grid, list):
        assert match(x, y, "translation", grid=grid).value == match(x, y, "translation", grid=(3, 4)).value
    else:
        with pytest.raises(MatchingError):
            match(x, y, "translation", grid=grid)
