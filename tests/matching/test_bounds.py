"""Summaries of images: the product of two is never below what any matching reaches."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rsm_probe
from rsm_probe.matching.bounds import Summaries


def optimum(x: torch.Tensor, y: torch.Tensor) -> float:
    return rsm_probe.match(x.double(), y.double(), "scipy").value


def draw(seed: int, locations: int, channels: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1, locations, channels, generator=generator, dtype=torch.float64)
    if kind == "dead":
        values = values.relu()
    elif kind == "rank one":
        values = values[:, :, :1] * values[:, :1]
    elif kind == "shifted":
        values = values + 10 * torch.randn(1, 1, channels, generator=generator, dtype=torch.float64)
    elif kind == "heavy":
        values = values**5
    elif kind == "equal":
        values = values[:, :1].expand(-1, locations, -1)
    return values


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 20), st.integers(1, 12),
    st.sampled_from(["plain", "dead", "rank one", "shifted", "heavy", "equal"]),
)  # fmt: skip
def test_no_matching_exceeds_it(seed, rows, columns, channels, kind):
    x, y = draw(seed, rows, channels, kind), draw(seed + 1, columns, channels, kind)
    summaries = Summaries.fit(torch.cat([x, x]), max(rows, columns))
    bound = float((summaries.of(x) @ summaries.of(y).T)[0, 0])
    scale = float(x.norm() * y.norm())
    assert bound >= optimum(x[0], y[0]) - 1e-12 * scale
    assert bound <= scale * (1 + 1e-9) + 1e-12 or bound <= 3 * scale  # never far above what norms allow


def test_it_is_tight_for_an_image_and_itself():
    x = draw(3, 30, 12, "dead")
    summaries = Summaries.fit(x, 30)
    shuffled = x[:, torch.randperm(30, generator=torch.Generator().manual_seed(0))]
    assert float(summaries.of(x) @ summaries.of(shuffled).T) == pytest.approx(float(x.square().sum()), rel=1e-12)


def test_it_is_tight_along_one_direction():
    x, y = draw(1, 16, 5, "rank one"), draw(2, 16, 5, "rank one")
    y = y[:, :, :1] / y[:, :1, :1] * x[:, :1]  # along the same direction as x
    summaries = Summaries.fit(x, 16)
    assert float(summaries.of(x) @ summaries.of(y).T) == pytest.approx(optimum(x[0], y[0]), rel=1e-9)


def test_its_length_is_what_it_says():
    x = draw(0, 9, 6, "plain")
    summaries = Summaries.fit(x, 12)
    assert summaries.of(x).shape == (1, summaries.length)


def test_directions_are_orthonormal_also_where_there_are_fewer_than_asked():
    for channels in (1, 3, 40):
        axes = Summaries.fit(draw(0, 30, channels, "heavy"), 30).directions
        assert axes.shape == (channels, min(8, channels))
        np.testing.assert_allclose(axes.T @ axes, np.eye(axes.shape[1]), atol=1e-12)
    flat = Summaries.fit(torch.zeros(2, 4, 3), 4).directions
    np.testing.assert_allclose(flat.T @ flat, np.eye(3), atol=1e-12)
