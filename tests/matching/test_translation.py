"""The best circular shift against all shifts one by one, on square and other grids, and where there is no grid."""

import numpy as np
import pytest
import torch
from stores import captured

from rsm_probe import Accumulator, all_pairs, match, match_affinity, nearest, rsm
from rsm_probe.errors import MatchingError
from rsm_probe.matching.matching import Locations
from rsm_probe.matching.methods.translation import Translation
from rsm_probe.probe import Representation

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
    assert match(x, x, "translation", grid=(3, 3)).value == pytest.approx(8 * 2.0**24 + 1.0, rel=1e-12)


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
def test_all_pairs_at_once_equal_brute_force_pair_by_pair(grid, block):
    x, y = images(grid, 1, count=5), images(grid, 2, count=3)
    expected = [[max(all_shifts(a, b, grid))[0] for b in y] for a in x]
    tensors = Locations(torch.from_numpy(x), grid), Locations(torch.from_numpy(y), grid)
    bare = [Locations(images.tokens) for images in tensors]
    for method, sides in ((Translation(), tensors), (Translation(grid), bare)):
        np.testing.assert_allclose(method.products(*sides, block_bytes=block), expected, rtol=1e-9)
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


@pytest.mark.parametrize("locations", [2, 6, 9, 49])
def test_a_grid_that_is_not_known_is_not_guessed(locations, tmp_path):
    # 49 locations may be 7 x 7, or a sequence.
    z = torch.from_numpy(images((1, locations), count=4))
    layer = captured(tmp_path / "c.zarr", z)
    bare = Representation(z, z[:, :0], None)

    def accumulated(method):
        with Accumulator(matchings=(method,), keep=["a"], kernels=("linear",)) as accumulator:
            accumulator.update({"a": bare})
            return accumulator.result().rsms.values[0, 0]

    uses = {
        "match": lambda method: match(z[0], z[1], method),
        "rsm": lambda method: rsm(z, matching=method),
        "nearest": lambda method: nearest(z[:2], z, 2, method),
        "all_pairs": lambda method: all_pairs(layer, matching=method),
        "nearest of captures": lambda method: nearest(layer, layer, 2, method),
        "accumulator": accumulated,
    }
    for use in uses.values():
        with pytest.raises(MatchingError, match=rf"the grid of these {locations} locations is unknown"):
            use("translation")
        use(Translation(grid=(1, locations)))  # what the message says
    match(z[0], z[1], "translation", grid=(1, locations))
    rsm(z, matching="translation", grid=(1, locations))


def test_one_location_needs_no_grid():
    z = torch.randn(4, 1, 3)
    expected = (z[:, 0].double() @ z[:, 0].double().T).numpy()
    assert match(z[0], z[1], "translation").value == pytest.approx(expected[0, 1])
    np.testing.assert_allclose(rsm(z, matching="translation", kernel="linear").values, expected, rtol=1e-6)
    assert nearest(z[:2], z, 2, "translation")["index"].shape == (2, 2)


@pytest.mark.parametrize("grid", [(2, 3, 4), (4, 1, 3), (1, 1, 1), (6,), (2, 2, 2, 2)])
def test_videos_and_sequences_move_along_all_axes(grid):
    x, y = np.random.default_rng(0).normal(size=(2, np.prod(grid), 3)).astype(np.float32)
    axes = tuple(range(len(grid)))
    pictures = [side.reshape(*grid, 3).astype(np.float64) for side in (x, y)]
    shifts = list(np.ndindex(grid))
    values = [(pictures[0] * np.roll(pictures[1], [-by for by in shift], axes)).sum() for shift in shifts]
    for found in (match(x, y, "translation", grid=grid), match(x, y, Translation(grid))):
        assert found.value == pytest.approx(max(values), rel=1e-9)
        moved = np.roll(np.arange(len(x)).reshape(grid), [-by for by in shifts[int(np.argmax(values))]], axes)
        assert found.permutation.tolist() == moved.ravel().tolist()
    both = rsm(x[None], y[None], matching="translation", kernel="linear", grid=grid).values
    assert both[0, 0] == pytest.approx(max(values), rel=1e-6)


@pytest.mark.parametrize("grid", [(2, 3), (5, 5), (0, 16), (-4, -4)])
def test_a_grid_that_does_not_hold_the_locations_is_refused(grid):
    x, y = images((4, 3))
    with pytest.raises(MatchingError, match=r"grid (of .* does not hold 12 locations|must be at least 1)"):
        match(x, y, "translation", grid=grid)
    with pytest.raises(MatchingError, match=r"grid of .* does not hold 12 locations|grid must be at least 1"):
        rsm(x[None], matching=Translation(grid))


@pytest.mark.parametrize("options", [{}, {"grid": (3, 3)}, {"grid": (4, 4)}])
def test_images_of_different_sizes_have_no_shift(options):
    x, y = images((3, 3))[0], images((4, 4))[0]
    with pytest.raises(MatchingError, match=r"shifts need equal grids|does not hold|is unknown"):
        match(x, y, "translation", **options)
    with pytest.raises(MatchingError, match=r"shifts need equal grids|does not hold|is unknown"):
        rsm(x[None], y[None], matching="translation", **options)


def test_an_affinity_alone_is_refused_with_what_to_use_instead():
    with pytest.raises(MatchingError, match=r"use match\(x, y, 'translation'\)"):
        match_affinity(np.ones((4, 4)), "translation")


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_tokens_does_not_change_the_shift(scale):
    x, y = images((4, 4), 6)
    scaled, method = np.float32(scale), Translation((4, 4))
    found, expected = match(x * scaled, y * scaled, method), match(x, y, method)
    assert found.permutation.tolist() == expected.permutation.tolist()
    assert found.value == pytest.approx(expected.value * scale**2, rel=1e-5)


def test_dead_and_constant_images_have_finite_values():
    z = np.stack([np.zeros((9, 2)), np.ones((9, 2)), -np.ones((9, 2))])
    np.testing.assert_allclose(
        rsm(z, matching=Translation((3, 3))).values, [[0, 0, 0], [0, 1, -1], [0, -1, 1]], atol=1e-12
    )
    assert sorted(match(z[0], z[1], Translation((3, 3))).permutation.tolist()) == list(range(9))


@pytest.mark.parametrize("grid", [[3, 4], np.array([3, 4]), (np.int64(3), 4), torch.Size([3, 4])])
def test_any_sequence_of_whole_numbers_is_a_grid(grid):
    x, y = images((3, 4))
    assert match(x, y, "translation", grid=grid).value == match(x, y, "translation", grid=(3, 4)).value
    assert Translation(grid) == Translation((3, 4))
    assert repr(Translation(grid)) == "Translation(grid=(3, 4))"


@pytest.mark.parametrize("grid", [(-3, -4), (2.4, 5.0), (), 12, "34", ("a", 4), (True, 12), (None, 12), {3: 4}, np.nan])
def test_anything_else_is_refused_in_words(grid):
    x, y = images((3, 4))
    for use in (lambda: match(x, y, "translation", grid=grid), lambda: match(x, y, "identity", grid=grid),
                lambda: Translation(grid)):  # fmt: skip
        with pytest.raises(MatchingError, match="grid"):
            use()
