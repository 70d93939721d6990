"""Figures that no study draws: what is joined to what, and in which colour."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from rsm_probe import figures, match


@pytest.fixture
def ax():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def lines_of(ax):
    return np.array([np.asarray(segment) for segment in ax.collections[0].get_segments()])


def test_matched_locations_joins_the_centres_of_locations_that_answer_to_each_other(ax):
    # A grid of 2 x 3 on 60 x 90 pixels: cells of 30 x 30; the other image is half as high and beside it.
    pictures = np.zeros((60, 90, 3)), np.zeros((30, 90, 3))
    permutation, affinities = np.array([5, -1, 0, 3, 4, 1]), np.array([1.0, np.nan, 6.0, 2.0, 5.0, 3.0])
    figures.matched_locations(ax, pictures, ((2, 3), (2, 3)), permutation, affinities)
    segments = lines_of(ax)
    assert len(segments) == 5  # one location has no partner
    offset = 90 + 0.06 * 90
    # The strongest is drawn last: location 2 (first row, third column) of one image, location 0 of the other.
    np.testing.assert_allclose(segments[-1], [[75, 15], [offset + 15, 7.5]])
    np.testing.assert_allclose(segments[0], [[15, 15], [offset + 75, 22.5]])
    assert ax.collections[0].get_array().tolist() == [1.0, 2.0, 3.0, 5.0, 6.0]


def test_matched_locations_draws_the_largest_affinities_only(ax):
    x = np.random.default_rng(0).normal(size=(16, 3))
    found = match(x, x[::-1].copy())
    figures.matched_locations(
        ax, (np.zeros((8, 8)), np.zeros((8, 8))), ((4, 4), (4, 4)), found.permutation, found.affinities, most=3
    )
    assert ax.collections[0].get_array().tolist() == sorted(found.affinities)[-3:]


def test_affinities_of_a_match_add_up_to_its_value():
    x, y = np.random.default_rng(1).normal(size=(2, 9, 4))
    found = match(x, y[:6])
    assert np.isnan(found.affinities).sum() == 3
    assert np.nansum(found.affinities) == pytest.approx(found.value, rel=1e-12)
