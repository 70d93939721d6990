"""AUROC, d' and intervals over images, against scikit-learn and cases by hand."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from rsm_probe.comparison.intervals import auroc, auroc_samples, d_prime, draw_weights, interval, mean_interval
from rsm_probe.errors import ComparisonError

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("rounded", [False, True], ids=["no ties", "ties"])
def test_auroc_agrees_with_scikit_learn(rounded):
    positive, negative = RNG.normal(0.7, 1, 60), RNG.normal(0, 1, 200)
    if rounded:
        positive, negative = positive.round(), negative.round()
    labels = np.repeat([1, 0], [60, 200])
    expected = roc_auc_score(labels, np.concatenate([positive, negative]))
    assert auroc(positive, negative) == pytest.approx(expected, rel=1e-12)


def test_weights_are_copies():
    positive, negative = RNG.normal(0.5, 1, 12).round(1), RNG.normal(0, 1, 30).round(1)
    weights = RNG.integers(0, 4, (5, 12)), RNG.integers(0, 3, (5, 30))
    expected = [auroc(np.repeat(positive, a), np.repeat(negative, b)) for a, b in zip(*weights, strict=True)]
    np.testing.assert_allclose(auroc_samples(positive, negative, *weights), expected, rtol=1e-6)
    np.testing.assert_allclose(auroc_samples(positive, negative, *weights, block=1), expected, rtol=1e-6)


def test_cases_without_an_answer():
    assert np.isnan(auroc(np.array([]), np.array([1.0])))
    assert np.isnan(d_prime(np.array([1.0]), np.array([1.0, 2.0])))
    assert np.isnan(d_prime(np.ones(3), np.ones(3)))
    assert np.isnan(auroc_samples(np.ones(2), np.ones(2), np.zeros((1, 2)), np.ones((1, 2)))).all()
    assert np.isnan(mean_interval(np.array([np.nan]))).all()


def test_d_prime_by_hand():
    # Means 3 and 1, variances 2 and 2.
    assert d_prime(np.array([2.0, 4.0]), np.array([0.0, 2.0])) == pytest.approx(2 / np.sqrt(2))


def test_an_interval_of_a_mean_covers_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        values = np.random.default_rng(seed).exponential(size=80)
        _, low, high = mean_interval(values, repeats=300, level=0.9, seed=seed)
        covered += low <= 1.0 <= high
    assert 0.82 <= covered / 200 <= 0.95


def test_missing_values_do_not_count():
    values = np.array([1.0, np.nan, 3.0])
    mean, low, high = mean_interval(values, repeats=500)
    assert mean == 2.0
    assert low == pytest.approx(1.0)
    assert high == pytest.approx(3.0)


def test_draws_are_repeatable_and_of_the_size_of_the_set():
    drawn = draw_weights(9, 50, seed=3)
    np.testing.assert_array_equal(drawn, draw_weights(9, 50, seed=3))
    np.testing.assert_array_equal(drawn.sum(axis=1), 9)
    assert (drawn.std(axis=0) > 0).all()


def test_wrong_settings_are_refused():
    with pytest.raises(ComparisonError, match="lies between 0 and 1"):
        interval(np.arange(3.0), 95)
    with pytest.raises(ComparisonError, match="repeats must be at least 2"):
        draw_weights(3, 1)


def test_images_of_one_group_are_drawn_together():
    # Ten copies of five values say no more than the five.
    few = np.random.default_rng(5).normal(size=5)
    many, groups = np.repeat(few, 10), np.repeat(np.arange(5), 10)
    assert mean_interval(many, 2000, groups=groups) == pytest.approx(mean_interval(few, 2000), rel=1e-12)
    _, low, high = mean_interval(many, 2000)
    _, wide_low, wide_high = mean_interval(many, 2000, groups=groups)
    assert wide_high - wide_low > 2 * (high - low)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auroc(np.array([1.0, np.nan]), np.ones(2)), "positive holds NaN"),
        (lambda: auroc(np.ones(2), np.array(["a", "b"])), "negative must hold real numbers"),
        (lambda: d_prime(np.ones(2), np.array([np.nan, 1.0])), "negative holds NaN"),
        (lambda: auroc_samples(np.ones(2), np.ones(3), np.ones((4, 2)), np.ones((5, 3))), "weights have shapes"),
        (lambda: auroc_samples(np.ones(2), np.ones(3), np.ones(2), np.ones((5, 3))), "weights have shapes"),
        (lambda: draw_weights(0, 10), "images to draw from must be at least 1"),
        (lambda: draw_weights(3, 1), "repeats must be at least 2"),
        (lambda: draw_weights(3, 2.5), "repeats must be a whole number"),
        (lambda: draw_weights(3, 10, -1), "seed must be at least 0"),
        (lambda: interval(np.ones(3), np.nan), "level must be a finite number"),
        (lambda: interval(np.ones(3), 1), "lies between 0 and 1"),
        (lambda: interval(np.ones(3), True), "level must be a number"),
        (lambda: mean_interval(np.ones(3), groups=["a", "b"]), "values and groups have shape"),
        (lambda: mean_interval(np.ones((3, 2))), "values and groups have shape"),
        (lambda: mean_interval(np.ones(3), seed="x"), "seed must be a whole number"),
        (lambda: mean_interval([1j, 2j]), "values holds complex numbers"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(call, message):
    with pytest.raises(ComparisonError, match=message):
        call()
