"""Bootstrap, permutations and spread: against other ways to the same numbers, and against what theory says."""

import numpy as np
import pytest
import xarray as xr
from scipy.stats import pearsonr, spearmanr

from rsm_probe.comparison.alignment import get_estimator
from rsm_probe.comparison.grid import compare
from rsm_probe.comparison.measures import MEASURES
from rsm_probe.comparison.statistics import bootstrap, bootstrap_samples, over_models, permutation_test
from rsm_probe.errors import ComparisonError

WEIGHTED = [name for name, measure in MEASURES.items() if measure.weighted]


def related(images=20, noise=1.0, seed=0, width=6):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(images, width)) * np.linspace(0.4, 2, width)
    y = x @ np.random.default_rng(77).normal(size=(width, width)) / 2 + noise * rng.normal(size=(images, width))
    return x @ x.T, y @ y.T


def unrelated(images, seed, width=40):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, images, width))
    return x @ x.T, y @ y.T


def draws(images, seed):
    drawn = np.random.default_rng(seed).integers(images, size=images)
    return drawn, np.bincount(drawn, minlength=images)


@pytest.mark.parametrize("measure", WEIGHTED)
def test_weights_of_one_change_nothing(measure):
    k, l = related()  # noqa: E741
    plain, weighted = (MEASURES[measure].grid(k[None], l[None], w) for w in (None, np.ones(20)))
    assert weighted == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize("measure", WEIGHTED)
def test_images_that_were_not_drawn_do_not_count(measure):
    k, l = related()  # noqa: E741
    weights = draws(20, 3)[1]
    other = k.copy()
    gone = np.flatnonzero(weights == 0)
    other[gone] = other[:, gone] = 1e6
    before, after = (MEASURES[measure].grid(m[None], l[None], weights) for m in (k, other))
    assert after == pytest.approx(before, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("measure", ["rsa-pearson", "rsa-spearman", "rsa-cosine"])
def test_weighted_correlations_are_those_of_the_drawn_images(measure, seed):
    k, l = related()  # noqa: E741
    drawn, weights = draws(20, seed)
    kept = np.triu(drawn[:, None] != drawn[None, :], 1)
    first, second = (m[np.ix_(drawn, drawn)][kept] for m in (k, l))
    expected = {
        "rsa-pearson": lambda: pearsonr(first, second).statistic,
        "rsa-spearman": lambda: spearmanr(first, second).statistic,
        "rsa-cosine": lambda: first @ second / np.linalg.norm(first) / np.linalg.norm(second),
    }[measure]()
    assert MEASURES[measure].grid(k[None], l[None], weights)[0, 0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_weighted_hsic_is_that_of_the_drawn_images_centred_by_least_squares(estimator, seed):
    k, l = related()  # noqa: E741
    drawn, weights = draws(20, seed)
    n = len(drawn)
    kept = drawn[:, None] != drawn[None, :]
    if estimator == "biased":
        kept = kept | np.eye(n, dtype=bool)
    rows, columns = np.nonzero(kept)
    # What is of the form a_i + a_j is taken away: regression on who takes part in a pair.
    parts = np.zeros((len(rows), n))
    np.add.at(parts, (np.arange(len(rows)), rows), 1)
    np.add.at(parts, (np.arange(len(rows)), columns), 1)
    centred = []
    for m in (k, l):
        values = m[np.ix_(drawn, drawn)][kept]
        centred.append(values - parts @ np.linalg.lstsq(parts, values, rcond=None)[0])
    scale = n * (n - 3) if estimator == "unbiased" else (n - 1) ** 2
    found = get_estimator(estimator).rows(np.stack([k, l]), weights)
    assert found[0] @ found[1] == pytest.approx(centred[0] @ centred[1] / scale, rel=1e-9)


@pytest.mark.slow
def test_intervals_hold_the_truth_about_as_often_as_they_say():
    truth = compare(dict(zip("kl", related(2000), strict=True)), eigenvalues=False).values[0, 1]
    held = []
    for seed in range(60):
        k, l = related(50, seed=seed + 1)  # noqa: E741
        found = bootstrap({"k": k}, {"l": l}, repeats=150, seed=seed)
        held.append(found["low"].item() <= truth <= found["high"].item())
    assert 0.8 <= np.mean(held) <= 1.0


def test_copies_of_an_image_would_raise_every_value():
    """What leaving them out is for: of unrelated RSMs, the mean over draws stays at 0."""
    k, l = unrelated(30, seed=1)  # noqa: E741
    rng, naive = np.random.default_rng(0), []
    for _ in range(100):
        drawn = rng.integers(30, size=30)
        naive.append(MEASURES["cka"].grid(k[None][:, drawn[:, None], drawn], l[None][:, drawn[:, None], drawn])[0, 0])
    found = bootstrap_samples(k[None], l[None], repeats=100)
    value = MEASURES["cka"].grid(k[None], l[None])[0, 0]
    assert np.mean(naive) > value + 0.15
    assert found.mean() == pytest.approx(value, abs=0.05)


def test_a_bootstrap_is_labelled_and_repeatable():
    k, l = related()  # noqa: E741
    rsms = {("net", "a"): k, ("net", "b"): l}
    seen = []
    first = bootstrap(rsms, repeats=50, seed=3, on_repeat=seen.append)
    assert first.equals(bootstrap(rsms, repeats=50, seed=3))
    assert not first["low"].equals(bootstrap(rsms, repeats=50, seed=4)["low"])
    assert sum(seen) == 50
    assert first["value"].values == pytest.approx(compare(rsms).values)
    assert first["layer_a"].values.tolist() == ["a", "b"]
    inside = first.isel(rsm_a=0, rsm_b=1)
    assert inside["low"] < inside["value"] < inside["high"]
    assert inside["std"] > 0.01
    # An RSM is at 1 with itself in every draw.
    assert first["low"].values.diagonal() == pytest.approx([1, 1])
    wide, narrow = (bootstrap(rsms, repeats=200, level=level) for level in (0.99, 0.5))
    assert ((wide["high"] - wide["low"]) > (narrow["high"] - narrow["low"])).values[0, 1]


def test_few_images_are_drawn_until_enough_differ():
    k, l = related(6)  # noqa: E741
    found = bootstrap({"k": k}, {"l": l}, repeats=200)
    assert np.isfinite(found["low"].values).all()
    with pytest.raises(ComparisonError, match="at least 4 images"):
        bootstrap({"k": np.eye(3)})


def test_wrong_settings_of_a_bootstrap():
    k, l = related()  # noqa: E741
    with pytest.raises(ComparisonError, match="bures cannot count an image more than once"):
        bootstrap({"k": k}, {"l": l}, "bures")
    with pytest.raises(ComparisonError, match="repeats must be at least 2, found 1"):
        bootstrap({"k": k}, {"l": l}, repeats=1)
    with pytest.raises(ComparisonError, match="between 0 and 1, found 95"):
        bootstrap({"k": k}, {"l": l}, repeats=10, level=95)
    with pytest.warns(UserWarning, match="first dead"):
        found = bootstrap({"k": k, "dead": np.ones((20, 20))}, repeats=10)
    assert np.isnan(found["low"].values).tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize("measure", MEASURES)
def test_related_rsms_stand_out_from_random_orders(measure):
    k, l = related(24, noise=0.3)  # noqa: E741
    found = permutation_test({"k": k}, {"l": l}, measure, repeats=99)
    assert found["p"].item() == pytest.approx(0.01)
    sign = 1 if MEASURES[measure].properties.kind == "similarity" else -1
    assert sign * found["z"].item() > 3


@pytest.mark.slow
def test_p_values_of_unrelated_rsms_are_uniform():
    values = []
    for seed in range(200):
        k, l = unrelated(12, seed, 5)  # noqa: E741
        values.append(permutation_test({"k": k}, {"l": l}, repeats=19, seed=seed)["p"].item())
    # 20 equally likely values: none of them far too often.
    counts = np.unique(np.round(np.array(values) * 20).astype(int), return_counts=True)
    assert counts[1].max() < 30
    assert 0.02 <= np.mean(np.array(values) <= 0.05) <= 0.10 + 0.02


def test_the_null_of_unbiased_cka_is_0_and_that_of_biased_is_not():
    k, l = unrelated(30, seed=5, width=300)  # noqa: E741
    unbiased, biased = (permutation_test({"k": k}, {"l": l}, m, repeats=200) for m in ("cka", "cka-biased"))
    assert abs(unbiased["null_mean"].item()) < 0.02
    assert biased["null_mean"].item() > 0.9
    # Against its own null, either says the same.
    assert abs(unbiased["z"].item() - biased["z"].item()) < 1


@pytest.mark.parametrize("width", [10, 100, 1000])
def test_bias_grows_with_the_features_and_the_unbiased_estimate_does_not(width):
    pairs = [unrelated(30, seed, width) for seed in range(20)]
    means = {m: np.mean([MEASURES[m].grid(p[0][None], p[1][None]) for p in pairs]) for m in ("cka", "cka-biased")}
    assert abs(means["cka"]) < 0.03
    assert means["cka-biased"] == pytest.approx({10: 0.27, 100: 0.78, 1000: 0.97}[width], abs=0.03)


def test_spread_over_pairs_of_models():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 2, 2))
    values[1, 0, 1] = np.nan
    grids = [
        xr.DataArray(v, dims=("layer_a", "layer_b"), coords={"layer_a": ["x", "y"], "layer_b": ["x", "y"]})
        for v in values
    ]
    found = over_models(grids)
    assert found["mean"].values == pytest.approx(np.nanmean(values, axis=0))
    assert found["std"].values == pytest.approx(np.nanstd(values, axis=0, ddof=1))
    assert found["pairs"].values.tolist() == [[3, 2], [3, 3]]
    assert np.isnan(over_models(grids[:1])["std"].values).all()
    with pytest.raises(ComparisonError, match="same layers"):
        over_models([grids[0], grids[1].assign_coords(layer_a=["x", "z"])])
    with pytest.raises(ComparisonError, match="no pair"):
        over_models([])


def test_draws_that_leave_an_rsm_constant_are_left_out_and_counted():
    odd = np.ones((12, 12))
    odd[0] = odd[:, 0] = 0.2
    odd[0, 0] = 1
    k = related(12)[0]
    with pytest.warns(UserWarning, match="draws, an RSM was constant"):
        found = bootstrap({"odd": odd}, {"k": k}, "rsa-pearson", repeats=100)
    assert np.isfinite([found[name].item() for name in ("low", "high", "std")]).all()
    # The odd image is missing from about a third of the draws.
    assert 40 < found["draws"].item() < 90


@pytest.mark.parametrize(("images", "measure"), [(4, "cka"), (3, "rsa-pearson"), (3, "rsa-spearman")])
def test_so_few_images_that_hardly_any_draw_counts_are_refused(images, measure):
    k, l = related(images)  # noqa: E741
    with pytest.raises(ComparisonError, match="too few"):
        bootstrap({"k": k}, {"l": l}, measure, repeats=50)


def test_z_is_undefined_where_every_order_gives_the_same():
    k = related(10)[0]
    found = permutation_test({"eye": np.eye(10)}, {"k": k}, "cka-biased", repeats=20)
    assert np.isnan(found["z"].item())
    assert found["p"].item() == 1
