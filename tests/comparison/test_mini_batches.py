"""Comparisons over many mini-batches: against one batch, written-out formulas, and what fresh samples give."""

import tracemalloc

import numpy as np
import pytest
from scipy.stats import kendalltau, pearsonr, rankdata

from rsm_probe.comparison import (
    MEASURES,
    NeighbourJaccard,
    bootstrap,
    bootstrap_batches,
    compare,
    compare_batches,
    get_estimator,
    permutation_test,
    permutation_test_batches,
)
from rsm_probe.comparison.grid import RsmKey
from rsm_probe.errors import ComparisonError

WEIGHTED = {name for name, measure in MEASURES.items() if measure.weighted}
SIZES = (14, 12, 18)


class Batches:
    """RSMs in memory, or made when they are asked for."""

    def __init__(self, stacks, sizes=None, keys=None):
        self.stacks = stacks
        self.sizes = sizes or [stack.shape[-1] for stack in stacks]
        count = len(stacks[0]) if keys is None else 0
        self.keys = keys or [RsmKey("net", f"layer{k}", k, "optimal", "linear") for k in range(count)]
        self.read = []

    def rsms(self, batch):
        self.read.append(batch)
        return self.stacks[batch]


def stack(images, seed, rsms=3, width=5):
    """RSMs that share a part of their features."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(images, width))
    features = np.concatenate([shared + rng.normal(size=(rsms, images, width)), np.ones((rsms, images, 1))], axis=2)
    return features @ features.transpose(0, 2, 1)


@pytest.fixture
def batches():
    return Batches([stack(size, seed) for seed, size in enumerate(SIZES)])


def hsic(k, l):  # noqa: E741
    """HSIC_1 of Song et al., equation 5, times n (n - 3)."""
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    return np.trace(k @ l) + k.sum() * l.sum() / (n - 1) / (n - 2) - 2 * (k @ l).sum() / (n - 2)


def biased_hsic(k, l):  # noqa: E741
    """HSIC of Gretton et al., times (n - 1)^2."""
    centre = np.eye(len(k)) - 1 / len(k)
    return np.trace(k @ centre @ l @ centre)


@pytest.mark.parametrize("measure", MEASURES)
def test_one_mini_batch_is_an_ordinary_comparison(measure):
    one = Batches([stack(20, 0)])
    rsms = dict(zip(one.keys, one.stacks[0], strict=True))
    grid = compare_batches(one, measure)
    expected = compare(rsms, measure=measure, eigenvalues=False)
    assert grid.drop_attrs().identical(expected.drop_attrs())
    assert grid.attrs == expected.attrs | {"measure": measure, "images": 20, "batches": 1}
    assert permutation_test_batches(one, measure, repeats=5, seed=3).equals(
        permutation_test(rsms, measure=measure, repeats=5, seed=3)
    )
    if measure in WEIGHTED:
        assert bootstrap_batches(one, measure, repeats=5, seed=3).equals(
            bootstrap(rsms, measure=measure, repeats=5, seed=3)
        )


@pytest.mark.parametrize(("measure", "formula"), [("cka", hsic), ("cka-biased", biased_hsic)])
@pytest.mark.parametrize("scale", [1.0, 1e160, 1e-160])
def test_cka_is_a_ratio_of_sums(batches, measure, formula, scale):
    sums = sum(np.array([[formula(k, l) for l in rsms] for k in rsms]) for rsms in batches.stacks)  # noqa: E741
    own = np.sqrt(np.diagonal(sums))
    # Sizes that differ between RSMs and batches change neither sums nor ratios once they are taken out.
    scaled = Batches([rsms * np.array([1.0, scale, 1.0])[:, None, None] for rsms in batches.stacks])
    np.testing.assert_allclose(compare_batches(scaled, measure), sums / own / own[:, None], atol=1e-12, rtol=0)
    assert scaled.read == [0, 1, 2]


def test_rsms_that_grow_over_the_batches_are_summed_at_one_scale(batches):
    factors = (1e-3, 1.0, 1e5)
    sums = sum(
        f**2 * np.array([[hsic(k, l) for l in rsms] for k in rsms])  # noqa: E741
        for f, rsms in zip(factors, batches.stacks, strict=True)
    )
    own = np.sqrt(np.diagonal(sums))
    for order in ([0, 1, 2], [2, 1, 0]):
        grown = Batches([factors[k] * batches.stacks[k] for k in order])
        np.testing.assert_allclose(compare_batches(grown), sums / own / own[:, None], atol=1e-12, rtol=0)


def test_an_rsm_that_is_constant_in_one_mini_batch_keeps_its_cka(batches):
    sums = sum(np.array([[hsic(k, l) for l in rsms] for k in rsms]) for rsms in batches.stacks[1:])  # noqa: E741
    batches.stacks[0][1] = 0
    first = np.array([[hsic(k, l) for l in batches.stacks[0]] for k in batches.stacks[0]])  # noqa: E741
    own = np.sqrt(np.diagonal(sums + first))
    np.testing.assert_allclose(compare_batches(batches), (sums + first) / own / own[:, None], atol=1e-12, rtol=0)


def off_diagonal(rsm):
    return rsm[np.triu_indices(len(rsm), 1)]


def nearest_shared(k, l, neighbours=10):  # noqa: E741
    """Jaccard overlap of nearest neighbours, image by image."""
    overlaps = []
    for image in range(len(k)):
        near = [set(sorted(set(range(len(m))) - {image}, key=lambda j: -m[image, j])[:neighbours]) for m in (k, l)]
        overlaps.append(len(near[0] & near[1]) / len(near[0] | near[1]))
    return np.mean(overlaps)


@pytest.mark.parametrize(
    ("measure", "formula"),
    [
        ("rsa-pearson", lambda a, b: pearsonr(off_diagonal(a), off_diagonal(b)).statistic),
        ("rsa-spearman", lambda a, b: pearsonr(rankdata(off_diagonal(a)), rankdata(off_diagonal(b))).statistic),
        ("rsa-kendall", lambda a, b: kendalltau(off_diagonal(a), off_diagonal(b)).statistic),
        ("norm-difference", lambda a, b: np.sqrt(((a - b) ** 2).sum())),
        ("knn-jaccard", nearest_shared),
    ],
)
def test_other_measures_are_means_weighted_by_images(batches, measure, formula):
    values = [[[formula(k, l) for l in rsms] for k in rsms] for rsms in batches.stacks]  # noqa: E741
    expected = np.average(values, axis=0, weights=SIZES)
    grid = compare_batches(batches, measure)
    np.testing.assert_allclose(grid, expected, atol=1e-12)
    assert grid.name == measure
    assert grid.attrs["kind"] == MEASURES[measure].properties.kind
    assert (grid.attrs["images"], grid.attrs["batches"]) == (sum(SIZES), 3)
    assert grid["layer_b"].values.tolist() == ["layer0", "layer1", "layer2"]


def drawn_by_hand(sizes, repeats, seed, fewest):
    """How often each image counts in each sample, with one stream of random numbers over samples, then batches."""
    rng, samples = np.random.default_rng(seed), []
    while len(samples) < repeats:
        weights = [np.bincount(rng.integers(n, size=n), minlength=n) for n in sizes]
        # The unbiased estimator cannot centre an image that holds half of the draws.
        if all((w > 0).sum() >= fewest and (fewest < 4 or 2 * w.max() < w.sum()) for w in weights):
            samples.append(weights)
    return samples


@pytest.mark.parametrize("sizes", [SIZES, (9, 8, 9)])
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_cka_draws_images_within_mini_batches(estimator, sizes):
    estimator, repeats = get_estimator(estimator), 40
    batches = Batches([stack(size, seed) for seed, size in enumerate(sizes)])
    samples = []
    for weights in drawn_by_hand(sizes, repeats, 5, estimator.fewest):
        rows = [
            estimator.rows(rsms, w) * np.sqrt(estimator.divisor(len(w)))
            for rsms, w in zip(batches.stacks, weights, strict=True)
        ]
        rows = np.concatenate(rows, axis=1)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        samples.append(rows @ rows.T)
    summary = bootstrap_batches(batches, estimator.measure, repeats, level=0.8, seed=5)
    low, high = np.quantile(samples, [0.1, 0.9], axis=0)
    for name, expected in {"low": low, "high": high, "std": np.std(samples, axis=0, ddof=1)}.items():
        np.testing.assert_allclose(summary[name], expected, atol=1e-12, rtol=0)
    np.testing.assert_array_equal(summary["value"], compare_batches(batches, estimator.measure))
    assert summary.attrs["drawn"] == "images"


@pytest.mark.parametrize("measure", ["rsa-pearson", "rsa-spearman", "rsa-cosine"])
def test_correlations_draw_images_within_mini_batches(batches, measure):
    samples = [
        np.average(
            [MEASURES[measure].grid(rsms, rsms, w) for rsms, w in zip(batches.stacks, weights, strict=True)],
            axis=0,
            weights=SIZES,
        )
        for weights in drawn_by_hand(SIZES, 20, 1, 3)
    ]
    summary = bootstrap_batches(batches, measure, 20, seed=1)
    np.testing.assert_allclose(summary["std"], np.std(samples, axis=0, ddof=1), atol=1e-12)
    assert summary.attrs == {"level": 0.95, "repeats": 20, "measure": measure, "seed": 1, "drawn": "images"}


@pytest.mark.filterwarnings("ignore:the intervals of")
@pytest.mark.parametrize("measure", sorted(MEASURES))
def test_every_measure_can_draw_whole_mini_batches(batches, measure):
    summary = bootstrap_batches(batches, measure, 20, level=0.9, seed=2, draw="mini-batches")
    times = np.random.default_rng(2).multinomial(3, [1 / 3] * 3, 20)
    samples = []
    for counts in times:
        again = [rsms for rsms, count in zip(batches.stacks, counts, strict=True) for _ in range(count)]
        samples.append(compare_batches(Batches(again), measure).values)
    low, high = np.quantile(samples, [0.05, 0.95], axis=0)
    np.testing.assert_allclose(summary["low"], low, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(summary["high"], high, rtol=1e-9, atol=1e-12)
    assert summary.attrs["drawn"] == "mini-batches"
    assert (summary["draws"] == 20).all()


def test_what_is_drawn_depends_on_the_measure():
    several = Batches([stack(12, seed) for seed in range(8)])
    for name in MEASURES:
        drawn = bootstrap_batches(several, name, 4).attrs["drawn"]
        assert drawn == ("images" if name in WEIGHTED else "mini-batches"), name


@pytest.mark.parametrize("measure", sorted(MEASURES))
def test_images_are_shuffled_within_mini_batches(batches, measure):
    rng, null = np.random.default_rng(4), []
    for _ in range(5):
        orders = [rng.permutation(size) for size in SIZES]
        # Beside the RSMs themselves, as further RSMs over the same images.
        both = [
            np.concatenate([rsms, rsms[:, order[:, None], order]])
            for rsms, order in zip(batches.stacks, orders, strict=True)
        ]
        null.append(compare_batches(Batches(both), measure).values[:3, 3:])
    found = permutation_test_batches(batches, measure, repeats=5, seed=4)
    np.testing.assert_allclose(found["null_mean"], np.mean(null, axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found["null_std"], np.std(null, axis=0, ddof=1), rtol=1e-9, atol=1e-12)
    sign = 1 if MEASURES[measure].properties.kind == "similarity" else -1
    values = compare_batches(batches, measure).values
    alike = (sign * np.array(null) >= sign * values - 1e-9).sum(axis=0)
    np.testing.assert_allclose(found["p"], (1 + alike) / 6)


def features_to_rsms(rng, images):
    x = rng.normal(size=(images, 4))
    return np.stack([f @ f.T for f in (x, x + 0.8 * rng.normal(size=x.shape))])


@pytest.mark.parametrize("measure", ["cka", "rsa-cosine", "bures-normalised"])
def test_standard_errors_are_the_spread_over_fresh_images(measure):
    rng = np.random.default_rng(0)
    draws = [Batches([features_to_rsms(rng, 12) for _ in range(9)]) for _ in range(50)]
    values = np.array([compare_batches(batches, measure).values[0, 1] for batches in draws])
    pair = {"rsm_a": 0, "rsm_b": 1}
    summaries = [bootstrap_batches(batches, measure, 40, level=0.9).isel(pair) for batches in draws[:16]]
    errors = [summary["std"].item() for summary in summaries]
    held = [summary["low"].item() <= values.mean() <= summary["high"].item() for summary in summaries]
    assert 0.7 < np.mean(errors) / values.std(ddof=1) < 1.4
    assert np.mean(held) >= 0.7


def test_memory_is_that_of_one_mini_batch():
    peaks = []
    for count in (2, 20):
        many = Batches([None] * count, [60] * count, [RsmKey("net", str(k), k, "identity", "linear") for k in range(6)])
        many.rsms = lambda batch: stack(60, batch, 6)
        calls = [
            lambda many=many: compare_batches(many, "rsa-spearman"),
            lambda many=many: bootstrap_batches(many, repeats=6),
            lambda many=many: permutation_test_batches(many, "bures", repeats=3),
        ]
        for number, call in enumerate(calls):
            tracemalloc.start()
            call()
            peaks.append((number, tracemalloc.get_traced_memory()[1]))
            tracemalloc.stop()
    few, more = peaks[:3], peaks[3:]
    size = 6 * 60 * 60 * 8
    for (_, small), (_, large) in zip(few, more, strict=True):
        assert large < small + size, "ten times the mini-batches"


@pytest.mark.filterwarnings("ignore:the intervals of")
@pytest.mark.parametrize(("measure", "draw"), [("cka", None), ("bures", None), ("rsa-pearson", "mini-batches")])
def test_progress_counts_repeats(batches, measure, draw):
    seen = []
    bootstrap_batches(batches, measure, 7, on_repeat=seen.append, draw=draw)
    permutation_test_batches(batches, measure, 5, on_repeat=seen.append)
    assert seen == [1] * 12


def test_undefined_values_are_named(batches):
    batches.stacks[1][2] = 1.0  # constant in one of three mini-batches
    with pytest.warns(UserWarning, match=r"undefined \(NaN\) for 1 RSMs.*of a mini-batch, first net/layer2/optimal"):
        grid = compare_batches(batches, "rsa-pearson")
    assert np.isnan(grid.values).tolist() == [[False, False, True]] * 2 + [[True] * 3]
    with pytest.warns(UserWarning, match="first net/layer2"), pytest.warns(UserWarning, match="3 mini-batches"):
        summary = bootstrap_batches(batches, "rsa-kendall", 50)
    # A draw without that mini-batch does not make up for it.
    assert np.isnan(summary["low"].values).tolist() == np.isnan(grid.values).tolist()
    for rsms in batches.stacks:
        rsms[2] = 3.0
    with pytest.warns(UserWarning, match="cka is undefined"):
        found = permutation_test_batches(batches, "cka", 5)
    assert np.isnan(found["p"].values).tolist() == np.isnan(grid.values).tolist()


def test_mini_batches_that_are_too_small_are_left_out():
    stacks = [stack(size, seed) for seed, size in enumerate((14, 3, 15))]
    with pytest.warns(UserWarning, match="1 of 3 mini-batches are too small.*3 images: unbiased CKA needs at least 4"):
        grid = compare_batches(Batches(stacks))
    np.testing.assert_array_equal(grid, compare_batches(Batches(stacks[::2])))
    assert (grid.attrs["images"], grid.attrs["batches"]) == (29, 2)
    with pytest.warns(UserWarning, match="knn-jaccard needs between 1 and 2 neighbours for 3 images, found 10"):
        grid = compare_batches(Batches(stacks), "knn-jaccard")
    np.testing.assert_array_equal(grid, compare_batches(Batches(stacks[::2]), "knn-jaccard"))
    with pytest.warns(UserWarning, match="left out"):
        summary = bootstrap_batches(Batches(stacks), repeats=10)
    assert summary.equals(bootstrap_batches(Batches(stacks[::2]), repeats=10))
    # The option that the message speaks of helps.
    assert compare_batches(Batches(stacks), NeighbourJaccard(2)).attrs["batches"] == 3
    for measure, words in (("cka", "at least 4 images"), ("knn-rank", "neighbours for 3 images")):
        with pytest.raises(ComparisonError, match=words):
            compare_batches(Batches(stacks[1:2]), measure)


def test_a_last_mini_batch_too_small_to_draw_from_counts_as_it_is():
    stacks = [stack(40, 0), stack(50, 1), stack(4, 2)]
    with pytest.warns(UserWarning, match="1 mini-batches are too small to draw.*their 4 of 94 images count once"):
        summary = bootstrap_batches(Batches(stacks), repeats=30, seed=1)
    estimator, samples = get_estimator("unbiased"), []
    for weights in drawn_by_hand((40, 50), 30, 1, 4):
        sums = 0
        for rsms, w in zip(stacks, [*weights, np.ones(4)], strict=True):
            rows = estimator.rows(rsms, w)
            sums = sums + rows @ rows.T * estimator.divisor(len(w))
        own = np.sqrt(np.diagonal(sums))
        samples.append(sums / own / own[:, None])
    np.testing.assert_allclose(summary["std"], np.std(samples, axis=0, ddof=1), atol=1e-12)
    # Where they hold much of the images, this would make intervals too short.
    small = Batches([stack(4, seed) for seed in range(9)])
    with pytest.raises(ComparisonError, match=r"too few images to draw.*holds 4\); draw whole mini-batches with draw="):
        bootstrap_batches(small, repeats=30)
    assert (bootstrap_batches(small, repeats=30, draw="mini-batches")["std"].values[0, 1] > 0).all()


def test_few_mini_batches_give_no_interval_or_a_coarse_one(batches):
    one = Batches(batches.stacks[:1])
    with pytest.raises(ComparisonError, match=r"bures draws whole mini-batches.*only one of 14 images.*images: cka, "):
        bootstrap_batches(one, "bures", 10)
    with pytest.warns(UserWarning, match="bures come from drawing 3 mini-batches and are coarse; use at least 8"):
        bootstrap_batches(batches, "bures", 10)


def test_wrong_input(batches):
    with pytest.raises(ComparisonError, match="draw is 'images', 'mini-batches' or None, found 'rows'"):
        bootstrap_batches(batches, draw="rows")
    with pytest.raises(ComparisonError, match="knn-rank cannot count an image more than once"):
        bootstrap_batches(batches, "knn-rank", draw="images")
    with pytest.raises(ComparisonError, match="there is no RSM"):
        compare_batches(Batches([], keys=batches.keys))
    with pytest.raises(ComparisonError, match="unknown measure 'ckaa'"):
        compare_batches(batches, "ckaa")
    with pytest.raises(ComparisonError, match="repeats must be at least 2, found 1"):
        permutation_test_batches(batches, repeats=1)
    with pytest.raises(ComparisonError, match="between 0 and 1, found 95"):
        bootstrap_batches(batches, level=95)
    batches.stacks[1][2, 3, 4] = np.inf
    with pytest.raises(ComparisonError, match="net/layer2/optimal/linear RSM of mini-batch 1 holds values"):
        compare_batches(batches)
    batches.stacks[0] = batches.stacks[0][:, :13, :13]
    with pytest.raises(ComparisonError, match=r"mini-batch 0 have shape \(3, 13, 13\), expected \(3, 14, 14\)"):
        compare_batches(batches, "bures")
