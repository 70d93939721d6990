"""Distances beside RSMs: those of rsatoolbox and other tools are compared as they are, never taken for similarities."""

import numpy as np
import pandas as pd
import pytest
import rsatoolbox
from scipy.spatial.distance import cdist, pdist, squareform

import rsm_probe
from rsm_probe import RSM, bootstrap, cka, compare
from rsm_probe.comparison import hsic, permutation_test
from rsm_probe.comparison.features import linear_cka
from rsm_probe.comparison.measures import bures, negative_share, neighbour_overlap, norm_difference, rsa
from rsm_probe.errors import ComparisonError

IDS = [f"image {k}" for k in range(9)]


def patterns(seed=0, features=5):
    return np.random.default_rng(seed).normal(size=(9, features)) * np.linspace(0.3, 4, 9)[:, None]


def rdms(measure, seed=0):
    x = patterns(seed)
    if measure == "crossnobis":
        labels = {"conds": np.tile(IDS, 4), "runs": np.repeat(np.arange(4), 9)}
        noisy = np.tile(0.3 * x, (4, 1)) + 2 * np.random.default_rng(seed + 50).normal(size=(36, 5))
        data = rsatoolbox.data.Dataset(noisy, obs_descriptors=labels)
        found = rsatoolbox.rdm.calc_rdm(data, method="crossnobis", descriptor="conds", cv_descriptor="runs")
        assert found.dissimilarities.min() < 0
        found.pattern_descriptors["image"] = found.pattern_descriptors["conds"]
        return found
    data = rsatoolbox.data.Dataset(x, obs_descriptors={"image": IDS})
    if measure == "not squared":
        return rsatoolbox.rdm.sqrt_transform(rsatoolbox.rdm.calc_rdm(data, "euclidean", "image"))
    return rsatoolbox.rdm.calc_rdm(data, measure, "image")


DISSIMILARITIES = ["euclidean", "not squared", "correlation", "crossnobis"]


@pytest.mark.parametrize("measure", DISSIMILARITIES)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("rsa-pearson", "corr"),
        ("rsa-spearman", "spearman"),
        ("rsa-spearman", "rho-a"),
        ("rsa-kendall", "tau-a"),
        ("rsa-cosine", "cosine"),
        ("cka-biased", "cosine_cov"),
    ],
)
def test_comparisons_are_those_of_rsatoolbox(measure, ours, theirs):
    first, second = rdms(measure), rdms(measure, 1)
    expected = rsatoolbox.rdm.compare(first, second, theirs)[0, 0]
    kept = {str(k): RSM.from_rsatoolbox(part) for k, part in enumerate((first, second))}
    assert float(compare(kept, measure=ours)[0, 1]) == pytest.approx(expected, abs=1e-9)
    wrapped = {
        str(k): RSM.from_array(part.get_matrices()[0], kind="distance") for k, part in enumerate((first, second))
    }
    assert float(compare(wrapped, measure=ours)[0, 1]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_cka_of_squared_distances_is_that_of_their_patterns(estimator):
    x, y = patterns(), patterns(1, 7)
    first, second = (RSM.from_array(cdist(part, part, "sqeuclidean"), IDS, kind="distance") for part in (x, y))
    expected = linear_cka(x, y, estimator)
    assert cka(first, second, estimator) == pytest.approx(expected, abs=1e-10)
    # And so it is beside an RSM.
    assert cka(first, RSM.from_array(y @ y.T, IDS), estimator) == pytest.approx(expected, abs=1e-10)
    assert bures(first, second) == pytest.approx(bures(x @ x.T, y @ y.T), abs=1e-6)


def test_neighbours_are_the_nearest():
    x, y = patterns(), patterns(1)
    near = [np.argsort(squareform(pdist(part)), axis=1)[:, 1:4] for part in (x, y)]
    shared = np.array([len(set(a) & set(b)) for a, b in zip(*near, strict=True)])
    first, second = (RSM.from_array(squareform(pdist(part)), kind="distance") for part in (x, y))
    assert neighbour_overlap(first, second, 3) == pytest.approx((shared / (6 - shared)).mean())


@pytest.mark.parametrize("measure", DISSIMILARITIES)
def test_there_and_back(measure, tmp_path):
    given = rdms(measure)
    RSM.from_rsatoolbox(given).save(tmp_path / "rsm.zarr")
    found = RSM.open(tmp_path / "rsm.zarr").to_rsatoolbox()
    np.testing.assert_array_equal(found.dissimilarities, given.dissimilarities)
    assert found.dissimilarity_measure == given.dissimilarity_measure
    assert list(found.pattern_descriptors["image"]) == list(given.pattern_descriptors["image"])


def test_what_is_missing_is_named():
    values = squareform(pdist(patterns()))
    values[2, 5] = values[5, 2] = np.nan
    with pytest.raises(ComparisonError, match="the distance of images image 2 and image 5 is nan"):
        RSM.from_array(values, IDS, kind="distance")
    known = rsatoolbox.rdm.RDMs(values[None], pattern_descriptors={"image": IDS})
    with pytest.raises(ComparisonError, match="the distance of images image 2 and image 5 is nan"):
        RSM.from_rsatoolbox(known)


def test_names_that_are_numbers_are_taken_and_others_are_not():
    def named(names):
        return rsatoolbox.rdm.RDMs(pdist(patterns())[None], pattern_descriptors={"image": names})

    assert RSM.from_rsatoolbox(named(np.arange(9))).ids == [str(k) for k in range(9)]
    with pytest.raises(ComparisonError, match=r"ids\[8\] must be text, found None"):
        RSM.from_rsatoolbox(named([*IDS[:8], None]))
    for what in (pdist(patterns()), None, named(IDS).get_matrices()):
        with pytest.raises(ComparisonError, match=r"expected rsatoolbox.rdm.RDMs"):
            RSM.from_rsatoolbox(what)
    with pytest.raises(ComparisonError, match="index must be a whole number, found 'image'"):
        RSM.from_rsatoolbox(named(IDS), "image")


def noisy_distances():
    x = patterns().astype(np.float32) * 100
    norms = (x**2).sum(axis=1)
    return norms[:, None] + norms - 2 * x @ x.T


DISTANCES = {
    "euclidean": squareform(pdist(patterns())),
    "correlation": 1 - np.corrcoef(patterns()),
    "squared, with rounding": noisy_distances(),
    "whole numbers": np.abs(np.arange(9)[:, None] - np.arange(9)),
    "yes or no": np.arange(9)[:, None] // 3 != np.arange(9) // 3,
}
TAKERS = {
    "cka": cka,
    "second of cka": lambda k, m: cka(m, k),
    "hsic": hsic,
    "rsa": rsa,
    "bures": lambda k, m: bures(k, m, normalised=False),
    "norm_difference": norm_difference,
    "neighbour_overlap": lambda k, m: neighbour_overlap(k, m, 3),
    "negative_share": lambda k, m: negative_share(k),
    "compare": lambda k, m: compare({"a": k, "b": m}, eigenvalues=False).values,
    "others of compare": lambda k, m: compare({"b": m}, {"a": k}).values,
    "bootstrap": lambda k, m: bootstrap({"a": k, "b": m}, repeats=4)["low"].values,
    "permutation_test": lambda k, m: permutation_test({"a": k, "b": m}, repeats=4)["p"].values,
}


@pytest.mark.parametrize("distances", DISTANCES.values(), ids=DISTANCES)
@pytest.mark.parametrize("taker", TAKERS.values(), ids=TAKERS)
def test_distances_are_no_similarities_and_every_way_out_works(distances, taker):
    other = patterns(1) @ patterns(1).T
    with pytest.raises(
        ComparisonError, match=r"the \w+ RSM looks like .*distances.*kind='distance'.*kind='similarity'"
    ):
        taker(distances, other)
    numbers = np.asarray(distances, dtype=float)
    negated = taker(-numbers, other)
    beside = other
    if taker is norm_difference:  # which depends on where 0 is, and thus compares distances with distances
        beside = RSM.from_array(other).to_distances()
    wrapped = taker(RSM.from_array(distances, kind="distance"), beside)
    insisted = taker(RSM.from_array(distances, kind="similarity"), other)
    assert np.isfinite([np.all(np.isfinite(part)) for part in (negated, wrapped, insisted)]).all()
    if taker in (TAKERS["cka"], TAKERS["rsa"]):
        assert wrapped == pytest.approx(negated)
        assert insisted == pytest.approx(-negated)


def test_an_rsm_is_made_of_distances_only_where_that_is_said():
    d = squareform(pdist(patterns()))
    with pytest.raises(ComparisonError, match=r"the matrix looks like .*kind='distance'.*kind='similarity'"):
        RSM.from_array(d, IDS)
    np.testing.assert_array_equal(RSM.from_array(d, IDS, kind="distance").values, -d / 2)
    np.testing.assert_array_equal(RSM.from_array(d, IDS, kind="similarity").values, d)
    between = RSM.from_array(d[:4], IDS[:4], IDS, kind="distance")
    np.testing.assert_array_equal(between.values, -d[:4] / 2)
    k = patterns() @ patterns().T
    with pytest.raises(ComparisonError, match=r"holds up to .* on its diagonal.*without kind='distance'"):
        RSM.from_array(k, kind="distance")
    for kind in ("distances", 1, True, ["distance"], np.array(["distance", "similarity"])):
        with pytest.raises(ComparisonError, match="kind must be 'similarity' or 'distance', found"):
            RSM.from_array(k, kind=kind)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((4, 4)),
        np.eye(4),
        np.full((4, 4), 0.5),
        -squareform(pdist(patterns())),
        patterns() @ patterns().T,
        np.corrcoef(patterns()),
        np.exp(-squareform(pdist(patterns()))),
        np.diag([1.0, 0, 0, 0]) + 0.2,
        np.zeros((2, 2)),
    ],
)
def test_similarities_are_taken_as_ever(values):
    np.testing.assert_array_equal(RSM.from_array(values).values, values)
    norm_difference(values, values)


def test_no_rsm_made_here_looks_like_distances():
    tokens = np.random.default_rng(0).normal(size=(8, 4, 3)).astype(np.float32) ** 2
    tokens[2] = 0
    for kernel in ("linear", "cosine", "rbf"):
        for matching in ("identity", "optimal"):
            assert len(RSM.from_array(rsm_probe.rsm(tokens, matching=matching, kernel=kernel).values).ids) == 8


WRONG = {
    "complex": (np.eye(4) * (1 + 2j), r"holds complex numbers.*give \.real"),
    "objects": (np.eye(4).astype(object), r"dtype object; .*give \.astype\(float\)"),
    "text": (np.full((4, 4), "1.0"), "must hold real numbers"),
    "longdouble": (np.eye(4, dtype=np.longdouble), r"give \.astype\(numpy\.float64\)"),
    "masked": (np.ma.masked_less(np.eye(4), 0.5), r"masked.*give \.filled"),
    "table": (pd.DataFrame(np.eye(4), index=[*"abcd"], columns=[*"abcd"]), r"is a table \(DataFrame\).*ids="),
    "condensed": (pdist(patterns()), r"the pairs of 9 images.*squareform"),
    "vector": (np.arange(4.0), r"shape .*\(4,\)"),
    "ragged": ([[1.0, 0.0], [0.0]], "is not an array of numbers"),
    "dict": ({"a": np.eye(4)}, "must hold real numbers"),
    "None": (None, "must hold real numbers"),
}


@pytest.mark.parametrize(("values", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_matrix_is_refused(values, message):
    with pytest.raises(ComparisonError, match=message):
        RSM.from_array(values)
    with pytest.raises(ComparisonError, match=message):
        cka(values, np.eye(4))
    with pytest.raises(ComparisonError, match=message):
        permutation_test({"a": np.eye(4), "b": values})


def test_tables_and_vectors_are_taken_as_the_messages_say():
    table = pd.DataFrame(np.eye(4), index=[*"abcd"], columns=[*"abcd"])
    assert RSM.from_array(table.to_numpy(), ids=[*table.index]).ids == [*"abcd"]
    vector = pdist(patterns())
    assert RSM.from_array(squareform(vector), IDS, kind="distance").ids == IDS


def test_numbers_of_any_byte_order_and_precision_are_taken():
    k = np.round(patterns() @ patterns().T)
    for dtype in (">f8", ">f4", "<f4", ">i4", "i8", "f2"):
        np.testing.assert_array_equal(RSM.from_array(k.astype(dtype)).values, k)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("abcd", "ids must be a sequence of texts, found 'abcd'"),
        ([0, 1, 2, 3], r"ids\[0\] must be text, found 0 \(int\); write '0'"),
        (np.arange(4), r"ids\[0\] must be text, found .*0.* \(int64\); write '0'"),
        (["a", None, "c", "d"], r"ids\[1\] must be text, found None"),
        (["a", "b\0", "c", "d"], r"ids\[1\] holds a NUL character"),
        ([b"a", b"b", b"c", b"d"], r"ids\[0\] must be text"),
        (["a", "\udcff", "c", "d"], r"ids\[1\] is not valid Unicode"),
        (4, "ids must be a sequence of texts, found 4"),
        ({"a", "b", "c", "d"}, r"ids must be a sequence of texts, found .* \(set\)"),
        (frozenset("abcd"), r"ids must be a sequence of texts, found .* \(frozenset\)"),
    ],
)
def test_names_of_images_are_text(ids, message):
    tokens = np.ones((4, 2, 3))
    with pytest.raises(ComparisonError, match=message):
        RSM.from_array(np.eye(4), ids)
    with pytest.raises(ComparisonError, match=message):
        rsm_probe.rsm(tokens, ids=ids)
    for option in ("query_ids", "database_ids"):
        with pytest.raises(ComparisonError, match=message.replace("ids", option, 1)):
            rsm_probe.nearest(tokens, tokens, 1, **{option: ids})
    with pytest.raises(ComparisonError, match=message.replace("ids", "other_ids", 1)):
        rsm_probe.rsm(tokens, tokens, other_ids=ids)


def test_names_of_numpy_are_text_too():
    assert RSM.from_array(np.eye(3), np.array(["a", "b", "c"])).ids == ["a", "b", "c"]
    assert RSM.from_array(np.eye(3), pd.Index(["a", "b", "c"])).ids == ["a", "b", "c"]
