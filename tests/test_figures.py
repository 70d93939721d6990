"""Figures that no study draws: what is joined to what, and in which colour."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from rsm_probe import figures, match
from rsm_probe.errors import ComparisonError, ImageError
from rsm_probe.figures import displayed, names_as_written


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


def pil(mode):
    """An image of a mode, from dark to light."""
    ramp = np.tile(np.linspace(0, 200, 4), (3, 1))
    if mode in ("I;16", "I;16B"):
        return Image.fromarray((ramp * 257).astype("<u2" if mode == "I;16" else ">u2"))
    if mode in ("I", "F"):
        return Image.fromarray((ramp * 1000 - 5).astype(np.int32 if mode == "I" else np.float32))
    if mode == "LAB":
        return Image.merge("LAB", [Image.fromarray(ramp.astype(np.uint8))] * 3)
    colours = Image.fromarray(ramp.astype(np.uint8)).convert("RGB")
    before = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode)
    return (colours if before is None else colours.convert(before)).convert(mode)


MODES = ["L", "LA", "La", "P", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I;16B", "I", "F"]


@pytest.mark.parametrize("mode", MODES)
def test_pil_images_of_every_mode_are_shown(ax, mode):
    image = pil(mode)
    assert image.mode == mode
    shown = displayed(image)
    assert shown.shape[:2] == (3, 4)
    assert 0 <= shown.min() <= shown.max() <= 1
    grey = shown if shown.ndim == 2 else shown.mean(axis=2)
    assert (np.diff(grey, axis=1) > 0.1).all()
    figures.picture(ax, image)
    ax.figure.canvas.draw()


def test_what_is_transparent_is_white():
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert (displayed(image) == 1).all()
    palette = Image.new("P", (2, 2), 7)
    palette.info["transparency"] = 7
    assert (displayed(palette) == 1).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.tensor([[[0.25, 0.5]]]), [[0.25, 0.5]]),  # within [0, 1]: as it is
        (torch.tensor([[[-1.0, 0.0, 3.0]]]), [[0.0, 0.25, 1.0]]),  # else from the smallest to the largest
        (torch.tensor([[[5.0, 5.0]]]), [[0.0, 0.0]]),
        (torch.tensor([[[float("nan"), 2.0, float("inf"), 4.0]]]), [[0.0, 0.0, 0.0, 1.0]]),
        (torch.tensor([[[-3e38, 3e38]]]), [[0.0, 1.0]]),
        (torch.tensor([[[0, 255]]], dtype=torch.uint8), [[0.0, 1.0]]),
        (torch.tensor([[0, 51]], dtype=torch.uint8), [[0.0, 0.2]]),
        (torch.tensor([[[-2, 2]]], dtype=torch.int64), [[0.0, 1.0]]),
        (torch.tensor([[[True, False]]]), [[1.0, 0.0]]),
        (torch.tensor([[[0.5]]], dtype=torch.bfloat16, requires_grad=True), [[0.5]]),
        (np.array([[0, 65535]], dtype=np.uint16), [[0.0, 1.0]]),
    ],
)
def test_values_are_shown_by_one_rule(values, expected):
    np.testing.assert_allclose(displayed(values), expected)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 9])
def test_channels_become_colours(channels):
    tensor = torch.rand(channels, 6, 5)
    shown = displayed(tensor)
    assert shown.shape == ((6, 5) if channels == 1 else (6, 5, 3))
    colours = shown[..., None] if channels == 1 else shown
    for number in range(min(channels, 3)):
        np.testing.assert_allclose(colours[..., number], tensor[number].numpy())
    if channels == 2:
        assert not shown[..., 2].any()
    np.testing.assert_allclose(displayed(tensor.numpy()), shown)
    if channels <= 4:
        np.testing.assert_allclose(displayed(tensor.permute(1, 2, 0).numpy()), shown)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 3, 4, 4), torch.zeros(3, 0, 4), torch.zeros(4), "text", None, {"a": 1}]
)
def test_what_is_not_an_image_is_refused(wrong):
    with pytest.raises(ImageError, match="an image to show has shape"):
        displayed(wrong)


@pytest.mark.parametrize("most", [0, 1, 3])
def test_no_more_lines_than_asked_for(ax, most):
    figures.matched_locations(
        ax, (torch.zeros(3, 4, 4), Image.new("CMYK", (4, 4))), ((2, 2), (2, 2)), np.arange(4), np.ones(4), most=most
    )
    assert len(lines_of(ax)) == most


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"permutation": np.arange(3)}, "a grid of .* has 4 locations"),
        ({"affinities": np.ones(3)}, "a grid of .* has 4 locations"),
        ({"permutation": np.array([0, 1, 2, 4])}, "numbers of 4 locations"),
        ({"permutation": np.array([0, 1, 2, -2])}, "numbers of 4 locations"),
        ({"permutation": np.ones(4)}, "numbers of 4 locations"),
        ({"most": -1}, "most must be at least 0"),
        ({"most": True}, "most must be a whole number"),
    ],
)
def test_matches_of_other_grids_are_refused(ax, change, message):
    about = {"permutation": np.arange(4), "affinities": np.ones(4), "most": 2, **change}
    with pytest.raises(ComparisonError, match=message):
        figures.matched_locations(ax, (np.zeros((4, 4)), np.zeros((4, 4))), ((2, 2), (2, 2)), **about)


@pytest.mark.parametrize("name", [r"$\frac$", r"$x", "$x$", r"a\$b$", "a_b^c", "two\nlines", "x" * 300])
def test_names_are_drawn_as_they_are_written(tmp_path, name):
    with names_as_written():
        figure = Figure(figsize=(2, 2))
        figures.interval_plot(figure.subplots(), [name, "b"], {name: [(0.5, 0.4, 0.6)] * 2}, name, name)
        figures.common_legend(figure)
    figure.savefig(tmp_path / "figure.png", dpi=20)
    texts = [text.get_text() for text in figure.axes[0].get_xticklabels()] + [figure.axes[0].get_title()]
    assert texts == [name, "b", name]
