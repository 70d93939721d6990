"""Encoding scores against ridge regressions written out, and what held-out images may and may not change."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from rsm_probe.comparison import FEATURE_MEASURES, encoding_scores, ridge_encoding
from rsm_probe.comparison.features.encoding import PENALTIES
from rsm_probe.errors import ComparisonError
from rsm_probe.probe import Representation

FEW = (0.1, 10.0, 1000.0)


def data(images=40, features=6, units=3, noise=1.0, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(images, features)) * rng.uniform(0.2, 5.0, size=features) + 3
    y = x @ rng.normal(size=(features, units)) + noise * rng.normal(size=(images, units)) * np.arange(1, units + 1)
    return x, y


def ridge(x, y, penalty):
    """Weights and offset for one unit: the minimum of |y - b - X w|^2 + penalty |w|^2."""
    centred = x - x.mean(axis=0)
    weights = np.linalg.solve(centred.T @ centred + penalty * np.eye(x.shape[1]), centred.T @ (y - y.mean()))
    return weights, y.mean() - x.mean(axis=0) @ weights


def best_penalty(x, y, penalties, parts):
    """The penalty with the least squared error over parts that are left out in turn."""
    errors = []
    for penalty in penalties:
        error = 0.0
        for part in parts:
            rest = np.setdiff1d(np.arange(len(x)), part)
            weights, offset = ridge(x[rest], y[rest], penalty)
            error += ((y[part] - x[part] @ weights - offset) ** 2).sum()
        errors.append(error)
    return penalties[int(np.argmin(errors))]


def written_out(x, y, splits, penalties, groups=None):
    """Predictions and penalties of every unit in every fold."""
    predictions, used = np.full(y.shape, np.nan), []
    for train, test in splits:
        mean, scale = x[train].mean(axis=0), x[train].std(axis=0)
        scale[scale == 0] = 1
        fitted, held_out = (x[train] - mean) / scale, (x[test] - mean) / scale
        if groups is None:
            parts = [np.array([image]) for image in range(len(train))]
        else:
            count = min(5, len(np.unique(groups[train])))
            parts = [part for _, part in GroupKFold(count).split(fitted, groups=groups[train])]
        used.append([best_penalty(fitted, unit, penalties, parts) for unit in y[train].T])
        for unit, penalty in enumerate(used[-1]):
            weights, offset = ridge(fitted, y[train, unit], penalty)
            predictions[test, unit] = held_out @ weights + offset
    return predictions, np.array(used)


SHAPES = {"few features": (40, 6), "more features than images": (24, 60), "tied": (40, 6)}


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_predictions_and_scores_are_those_of_ridge_regressions_written_out(shape, grouped):
    images, features = SHAPES[shape]
    x, y = data(images, features, noise=4.0)
    if shape == "tied":
        x, y = np.round(x), np.round(y)
        x[:, 2] = 1.0  # the same for all images
    groups = np.random.default_rng(1).integers(9, size=images) if grouped else None
    kind = GroupKFold if grouped else KFold
    splits = list(kind(4, shuffle=True, random_state=7).split(x, groups=groups))
    predictions, penalties = written_out(x, y, splits, FEW, groups)
    for score, oracle in (("r", lambda a, b: pearsonr(a, b).statistic), ("r2", r2_score)):
        found = encoding_scores(x, y, score=score, folds=4, groups=groups, penalties=FEW, seed=7)
        assert np.array_equal(found.penalties, penalties)
        np.testing.assert_allclose(found.predictions, predictions, rtol=1e-8, atol=1e-8)
        by_fold = [[oracle(y[test, unit], predictions[test, unit]) for unit in range(3)] for _, test in splits]
        np.testing.assert_allclose(found.by_fold, by_fold, atol=1e-8)
        np.testing.assert_allclose(found.scores, np.mean(by_fold, axis=0), atol=1e-8)
        for number, (_, test) in enumerate(splits):
            assert np.array_equal(np.flatnonzero(found.folds == number), test)
        assert ridge_encoding(x, y, score=score, folds=4, groups=groups, penalties=FEW, seed=7) == pytest.approx(
            found.scores.mean(), abs=1e-12
        )


def test_scores_are_those_of_a_pipeline_of_scikit_learn():
    x, y = data(60, 10)
    for unit in range(3):
        pipeline = make_pipeline(StandardScaler(), RidgeCV(PENALTIES))
        expected = cross_val_score(pipeline, x, y[:, unit], cv=KFold(5, shuffle=True, random_state=0), scoring="r2")
        assert encoding_scores(x, y[:, unit], score="r2").by_fold[:, 0] == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("score", ["r", "r2"])
@pytest.mark.parametrize("features", [5, 300])
def test_shuffled_responses_score_about_0(features, score):
    rng = np.random.default_rng(0)
    x, y = data(60, features, units=40, noise=0.1)
    shuffled = np.stack([rng.permutation(column) for column in y.T], axis=1)
    scores = encoding_scores(x, shuffled, score=score).scores
    if score == "r":
        # 12 held-out images a fold: one r has a standard deviation of 0.30, the mean of 40 x 5 of them one of 0.02.
        assert abs(scores.mean()) < 0.08
    else:
        assert -0.5 < scores.mean() < 0.05
    if features < 60:
        assert encoding_scores(x, y, score=score).scores.mean() > 0.7


def unchanged_by_held_out_images(x, y, score_all):
    """Whether the predictions of a fold stay when its responses change, and when another image's features do."""
    before = score_all(x, y)
    fold = np.flatnonzero(before.folds == 0)
    other = y.copy()
    other[fold] = 1e3 * np.random.default_rng(5).normal(size=other[fold].shape)
    responses = np.array_equal(score_all(x, other).predictions[fold], before.predictions[fold])
    outlier = x.copy()
    outlier[fold[0]] *= -30
    features = np.array_equal(score_all(outlier, y).predictions[fold[1:]], before.predictions[fold[1:]])
    return responses, features


@pytest.mark.parametrize("grouped", [False, True])
def test_held_out_images_change_no_fit(grouped):
    x, y = data(30, 20)
    groups = np.arange(30) // 3 if grouped else None

    def score_all(features, responses):
        return encoding_scores(features, responses, groups=groups, seed=4, penalties=FEW)

    assert unchanged_by_held_out_images(x, y, score_all) == (True, True)

    # The test sees what it is for: features that are standardised before images are divided into folds,
    def standardised_before(features, responses):
        return score_all(StandardScaler().fit_transform(features), responses)

    assert unchanged_by_held_out_images(x, y, standardised_before) == (True, False)

    # features that are selected by the responses to all images,
    def selected_before(features, responses):
        weights = np.abs(np.corrcoef(features.T, responses.T)[:20, 20:]).sum(axis=1)
        return score_all(features[:, np.argsort(weights)[-2:]], responses)

    assert unchanged_by_held_out_images(x, y, selected_before)[0] is False

    # and a penalty that is chosen by the score.
    def penalty_by_score(features, responses):
        scored = [encoding_scores(features, responses, groups=groups, seed=4, penalties=[p]) for p in FEW]
        return max(scored, key=lambda found: found.scores.mean())

    assert unchanged_by_held_out_images(x, y, penalty_by_score)[0] is False


def test_groups_are_held_out_together_and_that_matters():
    # Copies of each image: without groups, the regression has seen the held-out images.
    rng = np.random.default_rng(0)
    x, y = np.repeat(rng.normal(size=(25, 80)), 4, axis=0), np.repeat(rng.normal(size=(25, 6)), 4, axis=0)
    groups = [f"scene {number // 4}" for number in range(100)]
    together = encoding_scores(x, y, groups=groups)
    for fold in range(5):
        names = {groups[image] for image in np.flatnonzero(together.folds == fold)}
        assert not names & {groups[image] for image in np.flatnonzero(together.folds != fold)}
    assert ridge_encoding(x, y) > 0.9
    assert abs(together.scores.mean()) < 0.25


def test_tokens_are_read_as_it_is_said():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(60, 4, 3))
    y = tokens[:, 1] @ rng.normal(size=(3, 2))  # of one location
    pooled, flattened = (encoding_scores(tokens, y, read=read) for read in ("pooled", "flattened"))
    assert np.array_equal(pooled.predictions, encoding_scores(tokens.mean(axis=1), y).predictions)
    assert np.array_equal(flattened.predictions, encoding_scores(tokens.reshape(60, 12), y).predictions)
    assert flattened.scores.min() > 0.99 > 0.8 > pooled.scores.max()
    with pytest.raises(
        ComparisonError, match=r"\(60, 4, 3\); say read='pooled' .*\(3 features\) or read='flattened' .*\(12 features\)"
    ):
        encoding_scores(tokens, y)
    with pytest.raises(ComparisonError, match=r"read='pooled' is for tokens \(N, S, C\), .* shape \(60, 12\)"):
        encoding_scores(tokens.reshape(60, 12), y, read="pooled")
    representation = Representation(torch.from_numpy(tokens), torch.zeros(60, 1, 3), (2, 2))
    found = encoding_scores(representation, torch.from_numpy(y), read="flattened")
    assert np.array_equal(found.predictions, flattened.predictions)


def test_units_that_are_constant_have_no_score_and_are_named():
    x, y = data(40, 6, units=4)
    y[:, 1] = 0.1
    with pytest.warns(UserWarning, match=r"undefined \(NaN\) for 1 of 4 units.*over all images: units 1$"):
        found = encoding_scores(x, y)
    assert np.isnan(found.scores).tolist() == [False, True, False, False]
    with pytest.warns(UserWarning, match="units 1"):
        assert ridge_encoding(x, y) == pytest.approx(np.nanmean(found.scores), abs=1e-12)
    assert np.isfinite(found.predictions).all()
    assert repr(found) == f"EncodingScores(mean {np.nanmean(found.scores):.3f} over 3 units, 5 folds, 40 images)"
    y[:, 3] = np.arange(40) == 5  # answers to one image only
    for score in ("r", "r2"):
        with pytest.warns(UserWarning, match="2 of 4 units.*held-out images of a fold; use fewer folds: units 1, 3"):
            assert np.isnan(encoding_scores(x, y, score=score).scores).tolist() == [False, True, False, True]
    with pytest.warns(UserWarning, match="undefined"), pytest.raises(ComparisonError, match="no unit has a score"):
        ridge_encoding(x, np.ones(40))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("features", [1, 30])
def test_predictions_that_are_constant_explain_nothing(features, grouped):
    x, y = data(20, features)
    x[:] = np.arange(20)[:, None] == 3  # if this image is held out, all others are alike, and else all held-out ones
    groups = np.arange(20) // 2 if grouped else None
    assert np.array_equal(encoding_scores(x, y, folds=2, groups=groups).scores, np.zeros(3))


@pytest.mark.parametrize("size", [1e-200, 1e-30, 1e30, 1e200])
def test_units_of_measurement_do_not_matter(size):
    x, y = data()
    expected = encoding_scores(x, y, penalties=FEW)
    found = encoding_scores(x * size, y * size, penalties=FEW)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-8)
    np.testing.assert_allclose(found.predictions / size, expected.predictions, rtol=1e-7, atol=1e-7)


def test_it_stands_among_the_measures_of_representations():
    function, about = FEATURE_MEASURES["ridge_encoding"]
    assert function is ridge_encoding
    assert about.kind == "similarity"
    x, y = data(noise=0.5)
    assert ridge_encoding(x, y) != pytest.approx(ridge_encoding(y, x), abs=1e-4), "the first predicts the second"


def test_the_seed_decides_the_folds():
    x, y = data()
    first = encoding_scores(x, y, seed=3)
    assert np.array_equal(first.scores, encoding_scores(x, y, seed=3).scores)
    assert not np.array_equal(first.folds, encoding_scores(x, y, seed=4).folds)


def bad(values, place=(7, 1), value=np.nan):
    values = values.copy()
    values[place] = value
    return values


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: {"features": x[1:]}, "features of 39 images and responses to 40"),
        (lambda x, y: {"features": bad(x)}, "the features hold NaN or infinity, first in image 7"),
        (lambda x, y: {"responses": bad(y, value=np.inf)}, "the responses hold NaN or infinity, first in image 7"),
        (lambda x, y: {"features": np.full((40, 3), 0.3)}, "the features are the same for all images"),
        (lambda x, y: {"features": x[:, 0]}, r"the features have shape \(40,\)"),
        (lambda x, y: {"features": [[1.0, 2.0], [3.0]]}, "the features is not an array of numbers"),
        (lambda x, y: {"features": x.astype(str)}, "the features must hold real numbers"),
        (lambda x, y: {"responses": y[None]}, r"responses have shape \(1, 40, 3\); expected \(N, U\), or \(N,\)"),
        (lambda x, y: {"responses": y[:, :0]}, r"responses have shape \(40, 0\)"),
        (lambda x, y: {"score": "R2"}, "score is 'r' or 'r2', found 'R2'"),
        (lambda x, y: {"read": "mean"}, "read is 'pooled' or 'flattened', found 'mean'"),
        (lambda x, y: {"folds": 1}, "folds must be at least 2, found 1"),
        (lambda x, y: {"folds": 14}, "40 images are too few for 14 folds of at least 3 images"),
        (lambda x, y: {"seed": 2**32}, "seed must be at most"),
        (lambda x, y: {"penalties": [1.0, 0.0]}, "penalties are one or more numbers above 0"),
        (lambda x, y: {"penalties": []}, "penalties are one or more numbers above 0"),
        (lambda x, y: {"penalties": 3.0}, "penalties are one or more numbers above 0"),
        (lambda x, y: {"groups": ["a"] * 39}, r"groups has shape \(39,\); expected one name for each of 40 images"),
        (lambda x, y: {"groups": ["a", None] * 20}, "groups must be names of one type"),
        (lambda x, y: {"groups": [[1, 2], [3]]}, "groups must be names of one type"),
        (lambda x, y: {"groups": [1.0, np.nan, *range(38)]}, "groups holds NaN, first for image 1"),
        (lambda x, y: {"groups": ["a", "b"] * 20}, "2 groups of images for 5 folds"),
        (lambda x, y: {"groups": ["a", "b"] * 20, "folds": 2}, "too few groups of images to choose penalties"),
        (lambda x, y: {"groups": [*range(6), *[9] * 34]}, "the groups leave a fold of [12] images, where 3 are needed"),
    ],
)
def test_wrong_input_is_named(change, words):
    x, y = data()
    given = {"features": x, "responses": y} | change(x, y)
    with pytest.raises(ComparisonError, match=words):
        encoding_scores(given.pop("features"), given.pop("responses"), **given)
