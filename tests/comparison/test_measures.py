"""Comparisons of RSMs against other packages, textbook formulas, and what their table says of them."""

import numpy as np
import pytest
import rsatoolbox
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.spatial.distance import pdist, squareform
from scipy.stats import pearsonr, spearmanr
from sklearn.neighbors import NearestNeighbors

from rsm_probe import RSM
from rsm_probe.comparison.measures import (
    MEASURES,
    bures,
    get_measure,
    negative_share,
    neighbour_overlap,
    norm_difference,
    rsa,
)
from rsm_probe.comparison.protocol import Measure
from rsm_probe.errors import ComparisonError

CORRELATIONS = {"spearman": "spearman", "pearson": "corr", "kendall": "tau-a", "cosine": "cosine"}


def features(images, first=6, second=4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(images, first)) * rng.uniform(0.2, 3.0, size=first)
    return x, x @ rng.normal(size=(first, second)) + rng.normal(size=(images, second))


def grams(images, seed=0):
    return [f @ f.T for f in features(images, seed=seed)]


def symmetric(images, seed=0):
    """No covariance: a symmetric matrix with negative eigenvalues."""
    a = np.random.default_rng(seed).normal(size=(images, images))
    return a + a.T


def triangle(k):
    return k[np.triu_indices(len(k), 1)]


def rdms(values):
    return rsatoolbox.rdm.RDMs(values[None])


def with_ties(k):
    return np.round(k)


@pytest.mark.parametrize("change", [lambda k: k, with_ties, lambda k: -k], ids=["plain", "ties", "negative"])
@pytest.mark.parametrize("images", [5, 40])
@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_rsa_equals_rsatoolbox(correlation, images, change):
    k, l = (change(k) for k in grams(images))  # noqa: E741
    expected = rsatoolbox.rdm.compare(rdms(triangle(k)), rdms(triangle(l)), method=CORRELATIONS[correlation])
    assert rsa(k, l, correlation) == pytest.approx(float(expected[0, 0]), abs=1e-9)


def test_rsa_equals_scipy_on_the_triangle():
    k, l = symmetric(30), symmetric(30, seed=1)  # noqa: E741
    assert rsa(k, l) == rsa(k, l, "spearman") == pytest.approx(spearmanr(triangle(k), triangle(l)).statistic, abs=1e-12)
    assert rsa(k, l, "pearson") == pytest.approx(pearsonr(triangle(k), triangle(l)).statistic, abs=1e-12)


def test_kendall_counts_pairs_of_pairs():
    k, l = (with_ties(k) for k in grams(7))  # noqa: E741
    x, y = triangle(k), triangle(l)
    pairs = [(i, j) for i in range(len(x)) for j in range(i)]
    expected = sum(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in pairs) / len(pairs)
    assert rsa(k, l, "kendall") == pytest.approx(expected, abs=1e-12)
    assert rsa(k, k, "kendall") < 1, "ties count as neither"


def test_bures_equals_rsatoolbox_on_squared_distances():
    x, y = features(25)
    first, second = (rdms(pdist(f, "sqeuclidean")) for f in (x, y))
    expected = float(rsatoolbox.rdm.compare(first, second, method="bures")[0, 0])
    assert bures(x @ x.T, y @ y.T) == pytest.approx(expected, abs=1e-6)


def test_bures_equals_its_formula():
    n = 12
    h = np.eye(n) - 1 / n
    k, l = (h @ k @ h for k in grams(n))  # noqa: E741
    root = np.real(sqrtm(k + 1e-12 * np.eye(n)))
    expected = np.trace(np.real(sqrtm(root @ l @ root + 1e-14 * np.eye(n))))
    assert bures(k, l, normalised=False) == pytest.approx(expected, rel=1e-4)
    assert bures(k, k, normalised=False) == pytest.approx(np.trace(k), rel=1e-9)
    assert bures(k, k) == pytest.approx(1, abs=1e-12)


def test_bures_leaves_out_negative_eigenvalues_and_says_how_much():
    rng = np.random.default_rng(2)
    basis = np.linalg.qr(np.column_stack([np.ones(8), rng.normal(size=(8, 7))]))[0][:, 1:]
    values = np.array([4.0, 2.0, 1.0, 0.5, 0.2, -0.3, -0.7])
    whole, positive = ((basis * v) @ basis.T for v in (values, np.maximum(values, 0)))
    other = grams(8)[1]
    assert bures(whole, other) == pytest.approx(bures(positive, other), abs=1e-9)
    assert negative_share(whole) == pytest.approx(1.0 / 8.7, abs=1e-9)
    assert negative_share(positive) == negative_share(other) == 0


def test_norm_difference_is_the_frobenius_norm():
    k, l = grams(9)  # noqa: E741
    assert norm_difference(k, l) == pytest.approx(np.sqrt(((k - l) ** 2).sum()), rel=1e-12)
    assert norm_difference(k, k) == 0


def neighbour_sets(x, count):
    """From scikit-learn, nearest first; every point is its own nearest."""
    return NearestNeighbors(n_neighbors=count + 1).fit(x).kneighbors(x, return_distance=False)[:, 1:]


@pytest.mark.parametrize("count", [1, 5, 29])
def test_neighbour_overlap_equals_scikit_learn(count):
    x, y = features(30)
    k, l = (-squareform(pdist(f)) for f in (x, y))  # noqa: E741
    jaccard, ranked = [], []
    for a, b in zip(neighbour_sets(x, count).tolist(), neighbour_sets(y, count).tolist(), strict=True):
        shared = set(a) & set(b)
        jaccard.append(len(shared) / len(set(a) | set(b)))
        # Wang et al. 2020: each shared neighbour adds 2 / ((1 + |r - r'|) (r + r')), over the most that they can add.
        ranks = [(a.index(j) + 1, b.index(j) + 1) for j in shared]
        most = sum(1 / m for m in range(1, len(shared) + 1))
        ranked.append(sum(2 / ((1 + abs(r - s)) * (r + s)) for r, s in ranks) / most if shared else 0.0)
    assert neighbour_overlap(k, l, count) == pytest.approx(np.mean(jaccard), abs=1e-12)
    assert neighbour_overlap(k, l, count, ranked=True) == pytest.approx(np.mean(ranked), abs=1e-12)


def test_an_image_is_no_neighbour_of_its_own():
    k = -squareform(pdist(features(20)[0]))
    assert neighbour_overlap(k, k - 100 * np.eye(20), 4) == 1
    assert neighbour_overlap(k, k, 4, ranked=True) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("count", [0, 20, -1])
def test_neighbours_out_of_range(count):
    k = grams(20)[0]
    with pytest.raises(ComparisonError, match=f"between 1 and 19 neighbours for 20 images, found {count}"):
        neighbour_overlap(k, k, count)


def changed(k, l, what, rng):  # noqa: E741
    """Both RSMs after something that a measure may be invariant to."""
    if what == "scale":
        return k * 2.7, l
    if what == "shift":
        return k + 3.1, l
    if what == "monotone":
        return np.exp(0.3 * k / np.abs(k).max()), l
    if what == "additive":
        extra = rng.normal(size=len(k)) * np.abs(k).max()
        return k + extra[:, None] + extra[None, :], l
    order = rng.permutation(len(k))
    return k[np.ix_(order, order)], l[np.ix_(order, order)]


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("what", ["scale", "shift", "monotone", "additive", "images"])
@pytest.mark.parametrize("measure", MEASURES)
def test_what_the_table_calls_invariant_is(measure, what, seed):
    if what not in MEASURES[measure].properties.invariances:
        return
    k, l = grams(14, seed=seed)  # noqa: E741
    before = MEASURES[measure].grid(k[None], l[None])
    x, y = changed(k, l, what, np.random.default_rng(seed))
    assert MEASURES[measure].grid(x[None], y[None]) == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("what", ["scale", "shift", "monotone", "additive", "images"])
@pytest.mark.parametrize("measure", MEASURES)
def test_what_the_table_does_not_call_invariant_is_not(measure, what):
    if what in MEASURES[measure].properties.invariances:
        return
    k, l = grams(14)  # noqa: E741
    x, y = changed(k, l, what, np.random.default_rng(0))
    before, after = (MEASURES[measure].grid(a[None], b[None])[0, 0] for a, b in ((k, l), (x, y)))
    assert abs(after - before) > 1e-4


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), definite=st.booleans())
@pytest.mark.parametrize("measure", MEASURES)
def test_values_are_symmetric_and_within_their_range(measure, seed, definite):
    k, l = grams(13, seed) if definite else (symmetric(13, seed), symmetric(13, seed + 1))  # noqa: E741
    chosen = MEASURES[measure]
    grid = chosen.grid(np.stack([k, l]), np.stack([k, l]))
    assert np.isfinite(grid).all()
    assert grid == pytest.approx(grid.T, abs=1e-9)
    best = np.diagonal(grid)
    if chosen.properties.kind == "distance":
        assert (grid >= 0).all()
        assert best == pytest.approx(0)
    else:
        assert grid[0, 1] <= best.max() + 1e-12
    if chosen.properties.values.startswith(("[-1, 1]", "[0, 1]")):
        assert (np.abs(grid) <= 1 + 1e-12).all()
        assert best == pytest.approx(1, abs=1e-9)
    if chosen.properties.values.startswith("[0,"):
        assert (grid >= 0).all()


@pytest.mark.parametrize("measure", MEASURES)
def test_a_grid_of_stacks_equals_single_values(measure):
    a, b = np.stack([*grams(12), symmetric(12)]), np.stack(grams(12, seed=5))
    grid = MEASURES[measure].grid(a, b)
    assert grid.shape == (3, 2)
    for i, j in np.ndindex(3, 2):
        assert grid[i, j] == pytest.approx(MEASURES[measure].grid(a[i : i + 1], b[j : j + 1])[0, 0], rel=1e-9)


@pytest.mark.parametrize(
    "measure",
    [
        *("cka", "cka-biased", "rsa-pearson", "rsa-spearman", "rsa-kendall", "bures-normalised"),
        *("knn-jaccard", "knn-rank", "mutual-knn", "cknna", "distance-correlation"),
    ],
)
@pytest.mark.parametrize("level", [0.7, 0.1, 0.0])
def test_constant_rsms_are_undefined_and_never_zero(measure, level):
    constant, k = np.full((12, 12), level), grams(12)[0]
    grid = MEASURES[measure].grid(np.stack([constant, k]), np.stack([constant, k]))
    assert np.isnan([grid[0, 0], grid[0, 1], grid[1, 0]]).all()
    assert np.isfinite(grid[1, 1])


@pytest.mark.parametrize("scale", [1e200, 1e-200])
@pytest.mark.parametrize("measure", sorted({*MEASURES} - {"bures", "bures-normalised", "norm-difference"}))
def test_scale_hardly_matters_at_the_ends_of_the_range_either(measure, scale):
    k, l = grams(12)  # noqa: E741
    before = MEASURES[measure].grid(k[None], l[None])
    assert MEASURES[measure].grid(k[None] * scale, l[None]) == pytest.approx(before, rel=1e-9)


@pytest.mark.parametrize("which", ["first", "second"])
@pytest.mark.parametrize("compare", [rsa, bures])
def test_constant_rsms_are_named(compare, which):
    pair = [np.full((12, 12), 0.7), grams(12)[0]]
    with pytest.raises(ComparisonError, match=f"the {which} RSM is constant .* is undefined"):
        compare(*(pair if which == "first" else pair[::-1]))


@pytest.mark.parametrize(
    ("compare", "few"), [(rsa, 2), (rsa, 1), (bures, 1), (norm_difference, 1), (neighbour_overlap, 5)]
)
def test_too_few_images(compare, few):
    k = np.eye(few)
    with pytest.raises(ComparisonError):
        compare(k, k)


def test_identical_images_are_no_trouble():
    x = features(12)[0]
    x[3] = x[7]
    k = x @ x.T
    for name, measure in MEASURES.items():
        value = measure.grid(k[None], k[None])[0, 0]
        assert np.isfinite(value), name


def test_nan_other_shapes_and_other_images_are_refused():
    k, l = grams(12)  # noqa: E741
    bad = k.copy()
    bad[2, 5] = bad[5, 2] = np.nan
    with pytest.raises(ComparisonError, match="second RSM holds nan for images 2 and 5"):
        rsa(l, bad)
    with pytest.raises(ComparisonError, match="12 and 11 images"):
        bures(k, l[1:, 1:])
    with pytest.raises(ComparisonError, match="not symmetric"):
        rsa(np.triu(k), l)
    first, second = RSM.from_array(k, [*"abcdefghijkl"]), RSM.from_array(l, [*"abdcefghijkl"])
    with pytest.raises(ComparisonError, match="another order, first at position 2"):
        norm_difference(first, second)


def test_unknown_measures_have_neighbours():
    with pytest.raises(ComparisonError, match="'rsa-sperman'; nearest: 'rsa-spearman'"):
        get_measure("rsa-sperman")
    measure = MEASURES["cka"]
    assert get_measure(measure) is measure
    assert all(isinstance(m, Measure) and name == m.name for name, m in MEASURES.items())


@pytest.mark.parametrize("measure", ["rsa-pearson", "rsa-spearman", "rsa-cosine"])
def test_entries_that_are_zero_in_a_draw_have_no_correlation(measure):
    """Pairs of two categories are 0 or 1: in a draw of one category, all are 0."""
    category = np.repeat([0, 1], 6)
    rsms = np.stack([(category[:, None] != category).astype(float) * scale for scale in (-1.0, 0.3, 1e-3)])
    rsms[1, 0, 7] = rsms[1, 7, 0] = 0.1
    measure = get_measure(measure)
    values = measure.over_draws(rsms, rsms)
    for counts in ([2, 2, 1, 3, 1, 3], [4, 0, 0, 4, 2, 2], [1, 5, 1, 1, 3, 1]):
        assert np.isnan(values(np.array(counts + [0] * 6))).all()


@pytest.mark.parametrize("measure", [name for name, one in MEASURES.items() if one.weighted])
@pytest.mark.parametrize("kind", ["plain", "tied", "shifted", "constant", "holes"])
def test_prepared_draws_are_those_of_the_grid(measure, kind):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4, 12, 5))
    rsms = features @ features.transpose(0, 2, 1)
    if kind == "tied":
        rsms = np.round(rsms)
    if kind == "shifted":
        rsms = 1e5 + rsms
    if kind == "constant":
        rsms[1] = 3.0
    if kind == "holes":
        rsms[:, 2, 7] = rsms[:, 7, 2] = np.nan
    measure = get_measure(measure)
    one, two = measure.over_draws(rsms, rsms), measure.over_draws(rsms[:3], rsms[2:])
    # Digits that the shift costs an RSM itself are lost in both ways.
    digits = 1e-12 if kind != "shifted" or measure.name == "distance-correlation" else 1e-8
    for _ in range(20):
        weights = np.bincount(rng.integers(12, size=12), minlength=12)
        if (weights > 0).sum() < 4 or weights.max() > 4:
            continue
        np.testing.assert_allclose(one(weights), measure.grid(rsms, rsms, weights), rtol=0, atol=digits)
        np.testing.assert_allclose(two(weights), measure.grid(rsms[:3], rsms[2:], weights), rtol=0, atol=digits)
