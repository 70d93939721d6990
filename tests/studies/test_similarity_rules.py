"""Rules for comparing two images: which go together, and RBF kernels tile by tile."""

import numpy as np
import pytest
import torch

import rsm_probe
from rsm_probe.errors import MatchingError
from rsm_probe.matching.methods.scores import LateInteraction
from rsm_probe.paper.similarities import nearest_images
from rsm_probe.paper.similarity_rules import in_tiles, known_rule, similarity_rule
from rsm_probe.similarity.kernels import RBF, Cosine


def test_names_become_rules():
    assert similarity_rule("optimal", "cosine").matching.name == "optimal"
    assert similarity_rule("pooled", "rbf").vector == "mean"
    late = similarity_rule("late-interaction", "cosine")
    assert late.matching == LateInteraction(unit_length=True)
    assert (late.kernel.name, late.per_location) == ("linear", True)
    assert similarity_rule("late-interaction", "rbf") is None
    assert similarity_rule("soft", "cosine") is None
    assert similarity_rule("soft", "linear") is not None
    with pytest.raises(MatchingError, match="nearest: 'optimal'"):
        known_rule("optimum")


def test_unit_late_interaction_is_the_mean_of_the_best_cosines():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 6, 4)).astype(np.float32)
    x[2] = 0  # a location that answers to nothing
    lengths = [np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-30) for z in (x, y)]
    unit = [x / lengths[0], y / lengths[1]]
    cosines = unit[0] @ unit[1].T
    expected = (cosines.max(axis=1).sum() + cosines.max(axis=0).sum()) / 2
    found = rsm_probe.rsm(torch.tensor(x)[None], torch.tensor(y)[None], LateInteraction(unit_length=True), "linear")
    assert found.values[0, 0] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(MatchingError, match="needs the tokens of both images"):
        rsm_probe.match_affinity(x @ y.T, LateInteraction(unit_length=True))


def test_an_rbf_kernel_takes_its_width_from_each_tile():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(7, 3)) * np.arange(1, 8)[:, None]
    products, norms = x @ x.T, (x**2).sum(axis=1)
    found = in_tiles(RBF(), products, (norms, norms), True, 4)
    np.testing.assert_allclose(found[:4, :4], RBF()(products[:4, :4], norms[:4], norms[:4], same=True))
    np.testing.assert_allclose(found[:4, 4:], RBF()(products[:4, 4:], norms[:4], norms[4:], same=False))
    whole = in_tiles(RBF(), products, (norms, norms), True, None)
    assert not np.allclose(found, whole)
    # Other kernels know no width.
    np.testing.assert_allclose(
        in_tiles(Cosine(), products, (norms, norms), True, 3), Cosine()(products, norms, norms, same=True)
    )


def test_nearest_images_leave_out_the_own_video_and_keep_the_order_of_equals():
    values = np.array([[0.5, 0.9, 0.9, 0.1], [0.2, 0.2, 0.2, 0.2]])
    np.testing.assert_array_equal(nearest_images(values, 3), [[1, 2, 0], [0, 1, 2]])
    groups = ["v", "w"], ["a", "v", "b", "w"]
    np.testing.assert_array_equal(nearest_images(values, 3, groups), [[2, 0, 3], [0, 1, 2]])
    np.testing.assert_array_equal(nearest_images(values[:1], 4, (["v"], ["v", "v", "b", "v"])), [[2, -1, -1, -1]])
