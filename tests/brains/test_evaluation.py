"""Evaluation of models against subjects: values, bootstrap, tests and corrections against rsatoolbox and formulas."""

import re

import numpy as np
import pytest
import rsatoolbox
from rsatoolbox.inference.noise_ceiling import boot_noise_ceiling
from rsatoolbox.rdm import RDMs
from rsatoolbox.util.inference_util import extract_variances
from scipy import stats

from rsm_probe import RSM, RSMs, bootstrap
from rsm_probe.brains import best, differences, evaluate, simulated_subjects, unrelated_subjects
from rsm_probe.brains.corrections import corrected
from rsm_probe.brains.draws import corrected_variance, drawn_values
from rsm_probe.comparison import get_measure, permutation_test
from rsm_probe.comparison.resampling import drawn_images
from rsm_probe.errors import ComparisonError

SAME = {"rsa-spearman": "spearman", "rsa-pearson": "corr", "rsa-cosine": "cosine"}


def patterns(seed: int, images: int = 14, features: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(images, features))


def rsm_of(features: np.ndarray) -> RSM:
    return RSM.from_array(features @ features.T).to_distances()


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, str], RSM]:
    first, second = patterns(0), patterns(1)
    return {
        ("net", "early"): rsm_of(second),
        ("net", "late"): rsm_of(first + second / 2),
        ("net", "last"): rsm_of(first),
    }


@pytest.fixture(scope="module")
def subjects() -> RSMs:
    return simulated_subjects(rsm_of(patterns(0)), subjects=5, noise=1.0)


def rdms(rsms) -> RDMs:
    first, second = np.triu_indices(len(rsms[0].ids), 1)
    return RDMs(np.stack([rsm.distances[first, second] for rsm in rsms]))


@pytest.mark.parametrize("measure", SAME)
def test_each_draw_is_that_of_rsatoolbox(models, subjects, measure):
    """The same images and subjects as drawn here, given to rsatoolbox."""
    stack = np.stack([rsm.values for rsm in models.values()])
    repeats, seed = 12, 3
    fixed = get_measure(measure).grid(np.concatenate([stack, subjects.similarities]), subjects.similarities)
    drawn = drawn_values(
        stack, subjects.similarities, get_measure(measure), "both", repeats, seed, 1, lambda n: None, fixed
    )
    data, predictions = rdms(list(subjects.values())), rdms(list(models.values()))
    images = drawn_images([14], get_measure(measure), repeats, seed)
    rng = np.random.default_rng([seed, 5])
    for number in range(repeats):
        names = np.repeat(np.arange(14), images(number, 0).weights.astype(int))
        times = np.bincount(rng.integers(5, size=5), minlength=5)
        who = np.repeat(np.arange(5), times)
        some = data.subsample("index", who)
        both = some.subsample_pattern("index", names)
        for place, (sample, cut) in enumerate(
            ((both, True), (some, False), (data.subsample_pattern("index", names), True))
        ):
            prediction = predictions.subsample_pattern("index", names) if cut else predictions
            expected = rsatoolbox.rdm.compare(prediction, sample, SAME[measure]).mean(axis=1)
            np.testing.assert_allclose(drawn.means[place, number], expected, rtol=0, atol=1e-10)
        np.testing.assert_allclose(  # in draws of images alone, every subject counts once for rsatoolbox, too
            drawn.ceilings[2, number], boot_noise_ceiling(sample, SAME[measure]), rtol=0, atol=1e-10
        )


def test_the_corrected_variance_is_that_of_rsatoolbox():
    samples = np.random.default_rng(0).normal(size=(3, 200, 4)) * np.array([1.5, 1.0, 0.8])[:, None, None]
    covariances = np.stack([np.cov(kind.T) for kind in samples])
    expected, of_pairs, _ = extract_variances(covariances, nc_included=False, n_rdm=7, n_pattern=30)
    np.testing.assert_allclose(corrected_variance(samples, 30, 7), expected, rtol=1e-10)
    first, second = np.triu_indices(4, 1)
    ours = corrected_variance(samples[..., first] - samples[..., second], 30, 7)
    np.testing.assert_allclose(ours, of_pairs, rtol=1e-10)
    one = np.cov(samples[0].T)
    for images, count in ((30, 0), (0, 7)):
        expected, *_ = extract_variances(one, nc_included=False, n_rdm=count or None, n_pattern=images or None)
        np.testing.assert_allclose(corrected_variance(samples[:1], images, count), expected, rtol=1e-10)


def test_draws_without_a_value_are_left_out_of_a_variance():
    samples = np.random.default_rng(0).normal(size=(1, 50, 1))
    holes = samples.copy()
    holes[0, ::5] = np.nan
    expected = np.nanvar(holes[0, :, 0], ddof=1) * 6 / 5
    assert corrected_variance(holes, 0, 6)[0] == pytest.approx(expected)


def test_an_evaluation_holds_what_it_says(models, subjects):
    evaluation = evaluate(models, subjects, repeats=100, level=0.9)
    assert evaluation["value"].dims == ("rsm", "subject")
    assert evaluation["layer"].values.tolist() == ["early", "late", "last"]
    assert evaluation["depth"].values.tolist() == [0, 1, 2]
    assert evaluation["subject"].values.tolist() == subjects.names
    facts = {"measure": "rsa-spearman", "images": 14, "subjects": 5, "dof": 4, "draw": "both", "level": 0.9}
    assert facts.items() <= evaluation.attrs.items()
    for (name, rsm), row in zip(models.items(), evaluation["value"].values, strict=True):
        triangle = np.triu_indices(14, 1)
        expected = [stats.spearmanr(rsm.values[triangle], one.values[triangle])[0] for one in subjects.values()]
        np.testing.assert_allclose(row, expected, atol=1e-12, err_msg=name[1])
    np.testing.assert_allclose(evaluation["mean"], evaluation["value"].mean("subject"))
    half = stats.t.ppf(0.95, 4) * evaluation["std"]
    np.testing.assert_allclose(evaluation["high"] - evaluation["mean"], half)
    np.testing.assert_allclose(evaluation["mean"] - evaluation["low"], half)
    assert best(evaluation) == "net/last"


def test_results_do_not_depend_on_threads_nor_on_the_order_of_models(models, subjects):
    one = evaluate(models, subjects, repeats=30)
    two = evaluate(dict(reversed(models.items())), subjects, repeats=30, workers=3)
    for name in ("mean", "std", "p", "p_ceiling"):
        np.testing.assert_allclose(one[name], two[name].sel(rsm=one["rsm"]), rtol=1e-12)


def test_draws_of_images_are_those_of_the_bootstrap_of_two_rsms(models, subjects):
    one = subjects.subset(names=["subject 0"])
    evaluation = evaluate(models, one, "cka", draw="images", repeats=200, seed=4)
    expected = bootstrap(models, one, "cka", repeats=200, seed=4)
    np.testing.assert_allclose(evaluation["std"], expected["std"][:, 0] * np.sqrt(14 / 13), rtol=1e-9)
    assert evaluation.attrs["dof"] == 13
    assert np.isnan(evaluation["ceiling_high"])


def test_the_permutation_test_is_that_of_two_rsms(models, subjects):
    one = subjects.subset(names=["subject 1"])
    for measure in ("rsa-spearman", "cka-biased", "rsa-kendall", "norm-difference"):
        draw = "images" if get_measure(measure).weighted else "subjects"
        given = one if draw == "images" else subjects.subset(names=["subject 1", "subject 2"])
        ours = evaluate(models, given, measure, draw=draw, repeats=99, seed=2)["p"].values
        if given is one:
            np.testing.assert_allclose(ours, permutation_test(models, one, measure, repeats=99, seed=2)["p"][:, 0])
        assert (ours >= 0.01).all()
        assert (ours <= 1).all()


def test_fast_and_slow_permutations_agree(models, subjects):
    """A pair that all RSMs miss takes the slow way; with the pair known, both ways see the same RSMs."""
    for measure in ("rsa-spearman", "rsa-pearson", "cka", "cka-biased", "distance-correlation"):
        fast = evaluate(models, subjects, measure, draw="subjects", repeats=60)["p"].values
        orders = np.random.default_rng(0)
        stack = np.stack([rsm.values for rsm in models.values()])
        grid = get_measure(measure).grid
        values = grid(stack, subjects.similarities).mean(axis=1)
        null = []
        for _ in range(60):
            order = orders.permutation(14)
            null.append(grid(stack, subjects.similarities[:, order[:, None], order]).mean(axis=1))
        expected = (1 + (np.stack(null) >= values - 1e-12).sum(axis=0)) / 61
        np.testing.assert_allclose(fast, expected)


def test_corrected_p_values_are_those_of_the_largest_value():
    ids = [str(k) for k in range(10)]
    models = {f"m{k}": rsm_of(patterns(k, 10)) for k in range(6)}
    evaluation = evaluate(models, unrelated_subjects(ids, 4), "rsa-pearson", draw="subjects", repeats=200)
    assert (evaluation["p_corrected"] >= evaluation["p"] - 1e-12).all()
    assert float(evaluation["p_corrected"].min()) > float(evaluation["p"].min())
    assert best(evaluation) is None


def test_differences_are_paired(models, subjects):
    evaluation = evaluate(models, subjects, repeats=300)
    grid = differences(evaluation)
    assert list(zip(grid["rsm_a"].values, grid["rsm_b"].values, strict=True)) == [
        ("net/early", "net/late"), ("net/early", "net/last"), ("net/late", "net/last"),
    ]  # fmt: skip
    means = dict(zip(evaluation["rsm"].values, evaluation["mean"].values, strict=True))
    for number, (a, b) in enumerate(zip(grid["rsm_a"].values, grid["rsm_b"].values, strict=True)):
        assert grid["difference"][number] == pytest.approx(means[a] - means[b])
        samples = evaluation["draws"].sel(rsm=a).values - evaluation["draws"].sel(rsm=b).values
        std = np.sqrt(corrected_variance(samples[..., None], 14, 5)[0])
        assert grid["std"][number] == pytest.approx(std)
        assert grid["p"][number] == pytest.approx(2 * stats.t.sf(abs(means[a] - means[b]) / std, 4))
    np.testing.assert_allclose(grid["p_corrected"], stats.false_discovery_control(grid["p"].values))
    turned = differences(evaluation, [("net/last", "net/early")], correction=None)
    assert turned["difference"][0] == pytest.approx(-float(grid["difference"][1]))
    assert turned["p_corrected"][0] == turned["p"][0] == pytest.approx(float(grid["p"][1]))


def test_a_shared_part_makes_differences_surer_than_values(subjects):
    truth = patterns(0)
    models = {"a": rsm_of(truth), "b": rsm_of(truth + 0.1 * patterns(5))}
    evaluation = evaluate(models, subjects, repeats=200)
    assert float(differences(evaluation)["std"][0]) < 0.5 * float(evaluation["std"].min())


def test_corrections():
    p = np.array([0.01, np.nan, 0.04, 0.03, 0.005])
    known = p[[0, 2, 3, 4]]
    np.testing.assert_allclose(corrected(p, "fdr")[[0, 2, 3, 4]], stats.false_discovery_control(known))
    np.testing.assert_allclose(corrected(p, "holm"), [0.03, np.nan, 0.06, 0.06, 0.02])
    np.testing.assert_array_equal(corrected(p, None), p)
    assert np.isnan(corrected(np.array([np.nan]), "holm")).all()
    with pytest.raises(ComparisonError, match="unknown correction 'bonferoni'"):
        corrected(p, "bonferoni")


def test_ceilings_and_the_test_against_them(models, subjects):
    evaluation = evaluate(models, subjects, "rsa-pearson", repeats=200)
    low, high = boot_noise_ceiling(rdms(list(subjects.values())), "corr")
    assert (float(evaluation["ceiling_low"]), float(evaluation["ceiling_high"])) == pytest.approx((low, high))
    assert float(evaluation["p_ceiling"].sel(rsm="net/early")) < float(evaluation["p_ceiling"].sel(rsm="net/last"))
    assert 0 < float(evaluation["ceiling_low_std"]) < 1


@pytest.mark.parametrize("draw", ["both", "subjects"])
def test_two_subjects_do_not_tell_how_the_lower_ceiling_varies(models, subjects, draw):
    two = subjects.subset(names=["subject 0", "subject 1"])
    evaluation = evaluate(models, two, draw=draw, repeats=50)
    assert np.isnan(evaluation["ceiling_low_std"])
    assert np.isnan(evaluation["p_ceiling"]).all()
    assert float(evaluation["ceiling_high_std"]) > 0
    assert np.isfinite(evaluate(models, two, draw="images", repeats=50)["p_ceiling"]).all()


def test_measures_of_distance_are_best_where_they_are_small(models, subjects):
    evaluation = evaluate(models, subjects, "norm-difference", draw="subjects", repeats=50)
    assert np.isnan(evaluation["ceiling_low"])
    assert np.isnan(evaluation["p_ceiling"]).all()
    scaled = {name: rsm for name, rsm in models.items()}
    assert best(evaluation) in (None, *(f"net/{layer}" for _, layer in scaled))


def test_progress_counts_every_draw(models, subjects):
    counts = []
    evaluate(models, subjects, repeats=20, on_repeat=counts.append)
    assert counts == [1] * 20


def test_missing_pairs_and_other_images(models, subjects):
    names = [str(k) for k in range(14)]
    wider = {name: rsm.subset(list(reversed(names))) for name, rsm in models.items()}
    with pytest.raises(ComparisonError, match="different images or another order"):
        evaluate(wider, subjects, repeats=20)
    joined = evaluate(wider, subjects, repeats=20, on="intersection")
    np.testing.assert_allclose(joined["mean"], evaluate(models, subjects, repeats=20)["mean"])
    distances = np.stack([rsm.distances for rsm in subjects.values()])
    distances[1, 3, 7] = distances[1, 7, 3] = np.nan
    holed = RSMs.from_array(distances, subjects.ids, subjects.names, dissimilarity="simulated", allow_missing=True)
    with pytest.raises(ComparisonError, match="skip_missing=True"):
        evaluate(models, holed, repeats=20)
    skipped = evaluate(models, holed, repeats=20, skip_missing=True)
    assert skipped.attrs["pairs"] == 14 * 13 // 2 - 1
    assert np.isfinite(skipped["std"]).all()


def test_an_image_of_which_no_pair_is_known_is_left_out(models, subjects):
    distances = np.stack([rsm.distances for rsm in subjects.values()])
    distances[2, 5, np.arange(14) != 5] = distances[2, np.arange(14) != 5, 5] = np.nan
    holed = RSMs.from_array(distances, subjects.ids, subjects.names, dissimilarity="simulated", allow_missing=True)
    left = [name for name in subjects.ids if name != "5"]
    expected = evaluate(
        {name: rsm.subset(left) for name, rsm in models.items()}, subjects.subset(left), draw="images", repeats=20
    )
    evaluation = evaluate(models, holed, draw="images", repeats=20, skip_missing=True)
    assert evaluation.attrs["images"] == 13
    assert evaluation.attrs["dof"] == 12
    for name in ("mean", "std", "p"):
        np.testing.assert_allclose(evaluation[name], expected[name], rtol=1e-10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draw": "voxels"}, "unknown draw 'voxels'"),
        ({"repeats": 1}, "repeats must be at least 2"),
        ({"level": 95}, "between 0 and 1"),
        ({"correction": "none"}, "unknown correction 'none'"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"measure": "rsa-kendall"}, "take draw='subjects', CKA or another correlation"),
        ({"on": "union"}, "on is 'intersection' or None"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_wrong_arguments_are_named(models, subjects, changes, message):
    with pytest.raises(ComparisonError, match=re.escape(message)):
        evaluate(models, subjects, **changes)


def test_one_subject_cannot_be_drawn(models, subjects):
    with pytest.raises(ComparisonError, match="there is one subject, subject 2, so subjects cannot be drawn"):
        evaluate(models, subjects.subset(names=["subject 2"]))


def test_wrong_pairs_are_named(models, subjects):
    evaluation = evaluate(models, subjects, repeats=20)
    with pytest.raises(ComparisonError, match="unknown model 'net/lst'; nearest: 'net/last'"):
        differences(evaluation, [("net/lst", "net/early")])
    with pytest.raises(ComparisonError, match="no pair of models was given"):
        differences(evaluation, [])
    with pytest.raises(ComparisonError, match="a pair holds the labels of two models"):
        differences(evaluation, ["net/last"])


def test_a_constant_model_is_undefined_and_does_not_win(models, subjects):
    constant = RSM.from_array(np.ones((14, 14)), kind="similarity")
    with pytest.warns(UserWarning, match="undefined"):
        evaluation = evaluate({**models, ("net", "constant"): constant}, subjects, repeats=20)
    assert np.isnan(evaluation["p"].values[-1])
    assert np.isfinite(evaluation["p_corrected"].values[:-1]).all()
    assert best(evaluation) == "net/last"


def test_simulated_subjects_hold_the_truth_and_noise():
    truth = rsm_of(patterns(0, 30))
    quiet = simulated_subjects(truth, subjects=3, noise=0.0)
    first, second = np.triu_indices(30, 1)
    for rsm in quiet.values():
        assert np.corrcoef(rsm.values[first, second], truth.values[first, second])[0, 1] == pytest.approx(1)
    noisy = simulated_subjects(truth, subjects=40, noise=2.0, seed=1)
    correlations = [np.corrcoef(rsm.values[first, second], truth.values[first, second])[0, 1] for rsm in noisy.values()]
    assert np.mean(correlations) == pytest.approx(1 / np.sqrt(5), abs=0.02)
    assert (noisy["subject 3"].distances >= 0).all()
    for bad, message in (({"subjects": 0}, "subjects must be"), ({"noise": -1.0}, "noise must be")):
        with pytest.raises(ComparisonError, match=message):
            simulated_subjects(truth, **bad)
    with pytest.raises(ComparisonError, match="nothing to simulate"):
        simulated_subjects(RSM.from_array(np.ones((4, 4)), kind="similarity"))
    with pytest.raises(ComparisonError, match="at least 3 images"):
        unrelated_subjects(["a", "b"])
