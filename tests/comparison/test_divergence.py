"""Jensen-Shannon divergence against SciPy and cases by hand (paper, equations 13-15)."""

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax

from rsm_probe.errors import ComparisonError
from rsm_probe.paper.outputs.divergence import jensen_shannon, probabilities


def by_scipy(p, q):
    return np.array([[jensenshannon(a, b) ** 2 for b in q] for a in p])


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_it_agrees_with_scipy_for_logits_of_any_size(scale):
    logits = np.random.default_rng(0).normal(size=(12, 7)) * scale
    p = probabilities(logits)
    np.testing.assert_allclose(jensen_shannon(p), by_scipy(p, p), rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(jensen_shannon(p[:5], p[5:]), by_scipy(p[:5], p[5:]), rtol=1e-9, atol=1e-14)


def test_cases_by_hand():
    # M = (3/4, 1/4): JSD = (log(4/3) + log(2/3)/2 + log(2)/2) / 2.
    p = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    found = jensen_shannon(p)
    assert found[0, 1] == pytest.approx((np.log(4 / 3) + np.log(2 / 3) / 2 + np.log(2) / 2) / 2, rel=1e-12)
    assert found[0, 2] == pytest.approx(np.log(2), rel=1e-12)  # nothing in common
    np.testing.assert_array_equal(found, found.T)


def test_extreme_logits_and_probabilities_of_zero():
    logits = np.array([[100.0, -100.0, 0.0], [-100.0, 100.0, 0.0], [100.0, -100.0, 0.0], [1e4, -1e4, 0.0]])
    found = jensen_shannon(probabilities(logits))
    assert np.isfinite(found).all()
    assert found[0, 2] == 0.0
    assert found[0, 1] == pytest.approx(np.log(2), rel=1e-9)
    assert found[0, 3] == pytest.approx(0.0, abs=1e-15)


def test_identical_images_are_at_exactly_zero_and_nothing_is_below():
    p = probabilities(np.random.default_rng(1).normal(size=(30, 50)))
    same = jensen_shannon(p, p)
    np.testing.assert_array_equal(np.diag(same), 0.0)
    nearly = jensen_shannon(p, softmax(np.log(p) + 1e-9, axis=1))
    assert (nearly >= 0).all()


def test_several_questions_are_averaged():
    logits = np.random.default_rng(2).normal(size=(6, 3, 4))
    p = probabilities(logits)
    expected = np.mean([by_scipy(p[:, q], p[:, q]) for q in range(3)], axis=0)
    np.testing.assert_allclose(jensen_shannon(p), expected, rtol=1e-9, atol=1e-14)


def test_it_does_not_depend_on_the_size_of_a_block():
    p = probabilities(np.random.default_rng(3).normal(size=(9, 4)))
    whole = jensen_shannon(p)
    np.testing.assert_array_equal(jensen_shannon(p, block_bytes=1), whole)


def test_what_is_no_logits_is_refused():
    with pytest.raises(ComparisonError, match="rather than logits"):
        probabilities(softmax(np.random.default_rng(4).normal(size=(5, 3)), axis=1).astype(np.float32))
    with pytest.raises(ComparisonError, match="single class"):
        probabilities(np.zeros((5, 1)))
    with pytest.raises(ComparisonError, match=r"found \(5, 3, 2, 2\)"):
        probabilities(np.zeros((5, 3, 2, 2)))
    with pytest.raises(ComparisonError, match="image 2 are not finite"):
        probabilities(np.array([[0.0, 1], [1, 2], [np.inf, 0]]))
    with pytest.raises(ComparisonError, match="image 1 does not"):
        jensen_shannon(np.array([[0.5, 0.5], [0.9, 0.9]]))
    with pytest.raises(ComparisonError, match="image 0 does not"):
        jensen_shannon(np.array([[-0.5, 1.5]]))
    with pytest.raises(ComparisonError, match="questions and classes"):
        jensen_shannon(np.full((2, 2), 0.5), np.full((2, 4), 0.25))


@pytest.mark.parametrize(
    ("values", "message"),
    [(np.array([["a", "b"]]), "must hold real numbers"), (np.array([[1j, 0]]), "complex"), (None, "real numbers")],
)
def test_what_is_no_number_is_refused(values, message):
    for call in (probabilities, jensen_shannon):
        with pytest.raises(ComparisonError, match=message):
            call(values)
