"""RSMs with missing pairs and with overlapping images: rsatoolbox, and least squares written out, are the oracles."""

import numpy as np
import pytest
import rsatoolbox
from scipy.spatial.distance import pdist, squareform

from rsm_probe import RSM, bootstrap, cka, compare
from rsm_probe.comparison import MEASURES, CosineRSA, hsic, norm_difference, permutation_test, rsa
from rsm_probe.errors import ComparisonError

IDS = [f"image {k}" for k in range(12)]
THEIRS = {
    "rsa-pearson": "corr",
    "rsa-spearman": "spearman",
    "rsa-kendall": "tau-a",
    "rsa-cosine": "cosine",
    "cka-biased": "cosine_cov",
}
REFUSING = ["bures", "bures-normalised", "norm-difference", "knn-jaccard", "knn-rank"]


def distances(seed, kind="random", images=12):
    x = np.random.default_rng(seed).normal(size=(images, 5)) * np.linspace(0.5, 3, images)[:, None]
    found = pdist(x, {"random": "sqeuclidean", "correlation": "correlation"}.get(kind, "euclidean"))
    return np.round(found) if kind == "tied" else found


def holes(seed, share=0.3, images=12):
    return np.random.default_rng(100 + seed).random(images * (images - 1) // 2) < share


def theirs(rows, columns, method):
    first, second = (rsatoolbox.rdm.RDMs(np.stack(side)) for side in (rows, columns))
    return rsatoolbox.rdm.compare(first, second, method)


def wrapped(vectors, ids=IDS):
    return {
        str(k): RSM.from_array(squareform(v), ids, kind="distance", allow_missing=True) for k, v in enumerate(vectors)
    }


@pytest.mark.parametrize("kind", ["random", "tied", "correlation"])
@pytest.mark.parametrize("measure", THEIRS)
def test_missing_pairs_are_skipped_as_rsatoolbox_skips_them(measure, kind):
    for seed in range(5):
        rows = [distances(10 * seed + k, kind) for k in range(2)]
        columns = [distances(10 * seed + k + 2, kind) for k in range(3)]
        # rsatoolbox demands that both sides miss the same pairs, and skips a pair that any RDM of a side misses.
        rows[0][holes(seed)] = rows[1][holes(seed + 50, 0.1)] = np.nan
        missing = np.isnan(rows).any(axis=0)
        for column in columns:
            column[missing] = np.nan
        grid = compare(wrapped(rows), wrapped(columns), measure=measure, skip_missing=True)
        np.testing.assert_allclose(grid.values, theirs(rows, columns, THEIRS[measure]), rtol=0, atol=1e-10)
        assert grid.attrs["pairs"] == (~missing).sum()


@pytest.mark.parametrize("measure", THEIRS)
def test_a_pair_that_any_rsm_misses_is_left_out_of_all(measure):
    first, second, third = (distances(k) for k in range(3))
    first[holes(0)], second[holes(1)] = np.nan, np.nan
    missing = holes(0) | holes(1)
    expected = theirs(*[[np.where(missing, np.nan, v) for v in (first, second, third)]] * 2, THEIRS[measure])
    grid = compare(wrapped([first, second, third]), measure=measure, skip_missing=True)
    np.testing.assert_allclose(grid.values, expected, rtol=0, atol=1e-10)


def centred_by_least_squares(matrix, diagonal):
    """What is left of the known entries after the best a_i + a_j, each entry of the matrix once."""
    row, column = np.nonzero(~np.isnan(matrix) & (diagonal | ~np.eye(len(matrix), dtype=bool)))
    design = np.zeros((len(row), len(matrix)))
    np.add.at(design, (np.arange(len(row)), row), 1)
    np.add.at(design, (np.arange(len(row)), column), 1)
    values = matrix[row, column]
    return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]


@pytest.mark.parametrize(("measure", "diagonal"), [("cka", False), ("cka-biased", True)])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.6])
def test_cka_with_missing_pairs_is_the_cosine_of_what_least_squares_leave(measure, diagonal, share):
    for seed in range(4):
        x, y = np.random.default_rng(seed).normal(size=(2, 12, 6))
        k, l = x @ x.T, y @ y.T + 5  # noqa: E741
        lost = squareform(holes(seed, share)) > 0
        k[lost] = np.nan
        u, v = (centred_by_least_squares(np.where(lost, np.nan, m), diagonal) for m in (k, l))
        expected = u @ v / np.sqrt((u @ u) * (v @ v))
        grid = compare({"k": k}, {"l": l}, measure=measure, skip_missing=True)
        assert float(grid[0, 0]) == pytest.approx(expected, abs=1e-10)
        assert cka(k, l, "biased" if diagonal else "unbiased", skip_missing=True) == pytest.approx(expected, abs=1e-10)


def test_skipping_changes_nothing_where_nothing_is_missing():
    x, y = np.random.default_rng(0).normal(size=(2, 12, 6))
    rsms = {"x": x @ x.T, "y": y @ y.T}
    for measure in MEASURES:
        np.testing.assert_array_equal(compare(rsms, measure=measure), compare(rsms, measure=measure, skip_missing=True))


def test_hsic_of_known_pairs_is_unbiased():
    # Two groups of images, and similarities that depend on nothing else: HSIC of all images is known.
    rng = np.random.default_rng(0)
    lost = squareform(holes(3, 0.4, 10)) > 0
    values = []
    for _ in range(4000):
        x = rng.normal(size=(10, 1))
        y = x + rng.normal(size=(10, 1))
        k, l = x @ x.T, y @ y.T  # noqa: E741
        k[lost] = np.nan
        values.append(hsic(k, l, skip_missing=True))
    # HSIC of linear kernels is the squared covariance, 1; its standard error here is below 0.03.
    assert np.mean(values) == pytest.approx(1.0, abs=4 * np.std(values) / np.sqrt(len(values)))
    assert np.std(values) / np.sqrt(len(values)) < 0.03
    with pytest.raises(ComparisonError, match=r"biased HSIC is not defined where pairs are missing.*unbiased"):
        hsic(k, l, "biased", skip_missing=True)


@pytest.mark.parametrize("measure", REFUSING)
def test_measures_of_whole_matrices_refuse_missing_pairs_and_name_those_that_do_not(measure):
    vectors = [distances(k) for k in range(2)]
    vectors[0][3] = np.nan
    with pytest.raises(ComparisonError, match=rf"{measure} is not defined where pairs .* missing.*rsa-spearman"):
        compare(wrapped(vectors), measure=measure, skip_missing=True)


@pytest.mark.parametrize("measure", [*THEIRS, "cka", *REFUSING])
def test_missing_pairs_are_refused_unless_asked(measure):
    vectors = [distances(k) for k in range(2)]
    vectors[0][3] = np.nan
    for given in (wrapped(vectors), {"0": -squareform(vectors[0]), "1": -squareform(vectors[1])}):
        with pytest.raises(ComparisonError, match=r"the 0 RSM holds nan for images 0 and 4.*skip_missing=True"):
            compare(given, measure=measure)
    with pytest.raises(ComparisonError, match="skip_missing"):
        cka(*wrapped(vectors).values())
    with pytest.raises(ComparisonError, match="skip_missing must be True or False, found 'yes'"):
        compare(wrapped(vectors), skip_missing="yes")
    infinite = squareform(vectors[1])
    infinite[2, 3] = infinite[3, 2] = np.inf
    with pytest.raises(ComparisonError, match="holds -inf for images 2 and 3"):
        compare({"a": -infinite, "b": -squareform(vectors[1])}, skip_missing=True)


def test_a_row_measure_of_ones_own_that_knows_nothing_of_missing_pairs_is_refused():
    class Plain(CosineRSA):
        name = "plain"

        def rows(self, rsms, weights=None):
            return rsms.reshape(len(rsms), -1)

    vectors = [distances(k) for k in range(2)]
    vectors[0][3] = np.nan
    with pytest.raises(ComparisonError, match="plain is not defined where pairs"):
        compare(wrapped(vectors), measure=Plain(), skip_missing=True)


def test_too_little_that_is_known_is_refused():
    one, other = (np.full(66, np.nan) for _ in range(2))
    one[:30], other[30:] = distances(0)[:30], distances(1)[30:]
    with pytest.raises(ComparisonError, match=r"no pair of images is known in all RSMs.*a: 30 of 66.*b: 36 of 66"):
        compare(dict(zip("ab", wrapped([one, other]).values(), strict=True)), skip_missing=True)
    other[:2] = 1.0, 2.0
    for measure in ("rsa-pearson", "rsa-kendall", "cka", "cka-biased"):
        if measure == "cka-biased":  # its diagonals are known
            continue
        with pytest.raises(ComparisonError, match=r"2 pairs of images are known in all RSMs, too few for"):
            compare(wrapped([one, other]), measure=measure, skip_missing=True)


def test_bootstrap_and_permutations_skip_missing_pairs_too():
    x = np.random.default_rng(0).normal(size=(30, 5))
    y = x + 0.5 * np.random.default_rng(1).normal(size=(30, 5))
    k, l = x @ x.T, y @ y.T  # noqa: E741
    full = {"k": RSM.from_array(k)}, {"l": RSM.from_array(l)}
    k[squareform(holes(0, 0.15, 30)) > 0] = np.nan
    holed = {"k": RSM.from_array(k, allow_missing=True)}, full[1]
    for measure in ("cka", "cka-biased", "rsa-pearson", "rsa-spearman", "rsa-cosine"):
        found = bootstrap(*holed, measure=measure, repeats=30, skip_missing=True)
        whole = bootstrap(*full, measure=measure, repeats=30)
        assert found["low"].item() < found["value"].item() < found["high"].item()
        assert abs(found["std"].item() / whole["std"].item() - 1) < 0.5
        assert found.attrs["pairs"] < whole.attrs["images"] * 29 / 2
        tested = permutation_test(*holed, measure=measure, repeats=30, skip_missing=True)
        assert tested["p"].item() == pytest.approx(1 / 31)


def test_a_draw_counts_known_pairs_as_often_as_its_images():
    # By hand: correlation of the known pairs, each repeated as often as its images together.
    k, l = (distances(s) for s in range(2))  # noqa: E741
    k[holes(2)] = np.nan
    weights = np.array([2, 0, 1, 1, 3, 0, 1, 1, 1, 0, 1, 1])
    row, column = np.triu_indices(12, 1)
    times = (weights[row] * weights[column])[~np.isnan(k)]
    a, b = (np.repeat(v[~np.isnan(k)], times) for v in (k, l))
    stack = np.stack([squareform(v) for v in (k, l)])
    for measure, expected in {
        "rsa-pearson": np.corrcoef(a, b)[0, 1],
        "rsa-cosine": a @ b / np.sqrt((a @ a) * (b @ b)),
    }.items():
        grid = MEASURES[measure].grid(stack, stack, weights)
        assert grid[0, 1] == pytest.approx(expected, abs=1e-12)
    kept, mapped = np.unique(np.repeat(np.arange(12), weights)), np.repeat(np.arange(12), weights)
    assert len(kept) == 9
    # CKA: copies are images of their own, whose pairs with each other are missing.
    doubled = np.where(mapped[:, None] == mapped, np.nan, stack[:, mapped[:, None], mapped])
    u, v = (centred_by_least_squares(np.where(np.isnan(doubled[0]), np.nan, m), False) for m in doubled)
    grid = MEASURES["cka"].grid(-stack / 2, -stack / 2, weights)
    assert grid[0, 1] == pytest.approx(u @ v / np.sqrt((u @ u) * (v @ v)), abs=1e-10)


def overlapping(seed=0):
    """Distances of images 0..9 in one order and of images 3..11 in another."""
    rng = np.random.default_rng(seed)
    sets = [list(rng.permutation(10)), list(3 + rng.permutation(9))]
    found = []
    for k, images in enumerate(sets):
        full = squareform(distances(seed + k))
        names = [IDS[i] for i in images]
        found.append((full[np.ix_(images, images)], names))
    return found


@pytest.mark.parametrize("measure", [*THEIRS, "bures-normalised"])
def test_overlapping_images_are_compared_by_name_as_in_rsatoolbox(measure):
    for seed in range(5):
        given = overlapping(seed)
        common = sorted(set(given[0][1]) & set(given[1][1]))
        vectors = []
        for values, names in given:
            rdms = rsatoolbox.rdm.RDMs(values[None], pattern_descriptors={"image": names})
            part = rdms.subset_pattern("image", common)
            part.reorder(np.argsort(part.pattern_descriptors["image"]))
            vectors.append(part.dissimilarities[0])
        method = THEIRS.get(measure, "bures")
        a, b = (RSM.from_array(v, names, kind="distance") for v, names in given)
        grid = compare({"a": a}, {"b": b}, measure=measure, on="intersection")
        # rsatoolbox takes roots of eigenvalues that are rounding noise; and counts negative ones in the trace.
        tolerance = 1e-6 if method == "bures" else 1e-10
        assert float(grid[0, 0]) == pytest.approx(theirs(vectors[:1], vectors[1:], method)[0, 0], abs=tolerance)
        assert grid.attrs["images"] == len(common) == 7
        both = compare({"a": a, "b": b}, measure=measure, on="intersection")
        assert float(both[0, 1]) == pytest.approx(float(grid[0, 0]), abs=1e-12)


def test_intersection_keeps_intervals_labels_and_statistics():
    given = overlapping()
    a, b = (RSM.from_array(v, names, kind="distance") for v, names in given)
    one, other = a.align(b)
    assert float(compare({"a": a}, {"b": b}, on="intersection")[0, 0]) == pytest.approx(cka(one, other), abs=1e-12)
    found = bootstrap({"a": a}, {"b": b}, measure="rsa-pearson", repeats=10, on="intersection")
    direct = bootstrap({"a": one}, {"b": other}, measure="rsa-pearson", repeats=10)
    np.testing.assert_allclose(found["low"].values, direct["low"].values)
    assert found.attrs["images"] == 7
    tested = permutation_test({"a": a}, {"b": b}, repeats=10, on="intersection")
    assert tested.attrs["images"] == 7


def test_what_cannot_be_aligned_is_refused_with_a_way_out():
    (values, names), (others, other_names) = overlapping()
    a, b = RSM.from_array(values, names, kind="distance"), RSM.from_array(others, other_names, kind="distance")
    with pytest.raises(ComparisonError, match=r"different images or another order.*on='intersection'"):
        compare({"a": a}, {"b": b})
    with pytest.raises(ComparisonError, match=r"the b RSM is an array, which names no images; .*from_array"):
        compare({"a": a}, {"b": -others}, on="intersection")
    with pytest.raises(ComparisonError, match="on is 'intersection' or None, found 'union'"):
        compare({"a": a}, {"b": b}, on="union")
    foreign = RSM.from_array(others, [f"cat {k}" for k in range(9)], kind="distance")
    with pytest.raises(ComparisonError, match=r"no image is in all RSMs.*a: image .*b: cat 0"):
        compare({"a": a}, {"b": foreign}, on="intersection")
    with pytest.raises(ComparisonError, match=r"RSMs are given by name"):
        compare([a], [b], on="intersection")
    # Positions are no names: image "3" of 10 and image "3" of 9 need not be the same.
    numbered = [RSM.from_array(v, kind="distance") for v in (values, others)]
    with pytest.raises(ComparisonError, match=r"positions \(0 to 9 and 0 to 8\).*ids="):
        compare({"a": numbered[0]}, {"b": numbered[1]}, on="intersection")
    with pytest.raises(ComparisonError, match="positions"):
        numbered[0].align(numbered[1])


def test_similarities_and_distances_are_not_compared_where_zero_counts():
    x, y = np.random.default_rng(0).normal(size=(2, 12, 6))
    model, brain = RSM.from_array(x @ x.T, IDS), RSM.from_array(squareform(pdist(y)) ** 2, IDS, kind="distance")
    for measure in ("rsa-cosine", "norm-difference"):
        with pytest.raises(ComparisonError, match=rf"{measure} .*\(model\).*\(brain\).*to_distances"):
            compare({"model": model}, {"brain": brain}, measure=measure)
    converted = model.to_distances("squared euclidean")
    expected = theirs([pdist(x, "sqeuclidean")], [pdist(y, "sqeuclidean")], "cosine")
    grid = compare({"model": converted}, {"brain": brain}, measure="rsa-cosine")
    np.testing.assert_allclose(grid.values, expected, atol=1e-10)
    for measure in ("cka", "cka-biased", "rsa-spearman", "bures"):
        compare({"model": model}, {"brain": brain}, measure=measure)


@pytest.mark.parametrize(
    ("correlation", "theirs"), [("spearman", "spearman"), ("pearson", "corr"), ("kendall", "tau-a")]
)
def test_rsa_of_two_rsms_skips_missing_pairs_if_asked(correlation, theirs):
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 45))
    first[[3, 7]] = second[[3, 7]] = np.nan
    rsms = [
        RSM.from_array(squareform(row, checks=False), dissimilarity="x", allow_missing=True) for row in (first, second)
    ]
    with pytest.raises(ComparisonError, match="skip_missing=True"):
        rsa(*rsms, correlation)
    expected = rsatoolbox.rdm.compare(
        rsatoolbox.rdm.RDMs(first[None]), rsatoolbox.rdm.RDMs(second[None]), THEIRS[f"rsa-{correlation}"]
    )
    assert rsa(*rsms, correlation, skip_missing=True) == pytest.approx(expected[0, 0], abs=1e-12)


def test_two_rsms_of_different_kinds_are_refused_where_0_matters():
    similar = RSM.from_array(np.eye(5) + 1)
    with pytest.raises(ComparisonError, match="rsa-cosine depends on where 0 is"):
        rsa(similar, similar.to_distances(), "cosine")
    with pytest.raises(ComparisonError, match="norm-difference depends on where 0 is"):
        norm_difference(similar, similar.to_distances())
