"""RSMs know whether they hold similarities or distances, convert one into the other, and are aligned by image ids."""

import numpy as np
import pytest
import rsatoolbox
import torch
import xarray as xr
from scipy.spatial.distance import cdist, pdist, squareform

from rsm_probe import RSM, cka, rsm
from rsm_probe.errors import ComparisonError, StorageError

IDS = [f"image {k}" for k in range(9)]


def patterns(seed=0, features=5):
    return np.random.default_rng(seed).normal(size=(9, features)) * np.linspace(0.3, 4, 9)[:, None]


def held(values, name=None, **options):
    return RSM.from_array(values, IDS, kind="distance", dissimilarity=name, **options)


def test_an_rsm_knows_what_it_holds(tmp_path):
    x = patterns()
    similar = RSM.from_array(x @ x.T, IDS)
    assert (similar.kind, similar.dissimilarity) == ("similarity", None)
    assert "distance" not in repr(similar)
    with pytest.raises(ComparisonError, match="holds similarities; to_distances"):
        similar.distances  # noqa: B018
    for name in (None, "squared euclidean", "correlation", "behavioural"):
        values = cdist(x, x, "correlation" if name == "correlation" else "sqeuclidean")
        np.fill_diagonal(values, 0)
        rdm = held(values, name)
        rdm.save(tmp_path / "rdm.zarr")
        for one in (rdm, RSM.open(tmp_path / "rdm.zarr"), rdm.subset(IDS), rdm.align(rdm)[0]):
            assert (one.kind, one.dissimilarity) == ("distance", name)
            np.testing.assert_array_equal(one.distances, values)
            np.testing.assert_array_equal(one.values, -values / 2)
            assert "kind='distance'" in repr(one)
            assert name is None or f"dissimilarity={name!r}" in repr(one)
            page = one._repr_html_()
            assert "nearest" in page
            assert f"{values.max():.4g}" in page
            assert name is None or name in page
    named = RSM.from_array(values, IDS, dissimilarity="<b>ratings</b>")
    assert named.kind == "distance"
    assert "<b>ratings" not in named._repr_html_()


def test_a_name_of_distances_is_text_and_of_distances():
    d = squareform(pdist(patterns()))
    with pytest.raises(ComparisonError, match="dissimilarity names distances, but kind is 'similarity'"):
        RSM.from_array(d, IDS, kind="similarity", dissimilarity="euclidean")
    with pytest.raises(ComparisonError, match="dissimilarity must be text, found 3"):
        held(d, 3)


def test_negated_distances_are_no_distances_and_every_way_out_works():
    d = squareform(pdist(patterns()))
    negated = -d
    with pytest.raises(ComparisonError, match=r"negated distances: give -values, .*without kind='distance'"):
        held(negated)
    np.testing.assert_array_equal(held(-negated).distances, d)
    assert RSM.from_array(negated, IDS).kind == "similarity"
    np.testing.assert_array_equal(held(negated, "crossnobis").distances, negated)
    assert held(np.zeros((9, 9))).kind == "distance"


def test_files_of_earlier_versions_open_as_what_they_say(tmp_path):
    d = squareform(pdist(patterns()))
    plain = RSM.from_array(patterns() @ patterns().T, IDS)
    old = xr.Dataset(
        {"similarity": (("image_a", "image_b"), -d / 2)},
        coords={"image_a": IDS, "image_b": IDS},
        attrs={"image_sets": 1, "dissimilarity": "crossnobis"},
    )
    RSM(old).save(tmp_path / "old.zarr")
    opened = RSM.open(tmp_path / "old.zarr")
    assert (opened.kind, opened.dissimilarity) == ("distance", "crossnobis")
    np.testing.assert_array_equal(opened.distances, d)
    plain.save(tmp_path / "plain.zarr")
    assert RSM.open(tmp_path / "plain.zarr").kind == "similarity"


def test_missing_pairs_survive_and_lost_ones_are_noticed(tmp_path):
    d = squareform(pdist(patterns()))
    d[2, 5] = d[5, 2] = np.nan
    with pytest.raises(ComparisonError, match=r"image 2 and image 5 is nan.*allow_missing=True"):
        held(d)
    rdm = held(d, "euclidean", allow_missing=True)
    assert rdm.missing == 1
    assert "missing=1" in repr(rdm)
    rdm.save(tmp_path / "rdm.zarr")
    opened = RSM.open(tmp_path / "rdm.zarr")
    assert opened.missing == 1
    np.testing.assert_array_equal(opened.distances, d)
    assert "missing" in opened._repr_html_()
    opened.plot()
    RSM(opened.dataset.assign_attrs(missing=0)).save(tmp_path / "lost.zarr")
    with pytest.raises(StorageError, match="missing or not finite"):
        RSM.open(tmp_path / "lost.zarr")
    with pytest.raises(ComparisonError, match="1 pairs of images are missing"):
        rdm.smallest_eigenvalue  # noqa: B018
    back = rdm.to_rsatoolbox()
    np.testing.assert_array_equal(back.get_matrices()[0], d)
    with pytest.raises(ComparisonError, match=r"is nan.*allow_missing=True"):
        RSM.from_rsatoolbox(back)
    assert RSM.from_rsatoolbox(back, allow_missing=True).missing == 1
    # An image may be given no distance from itself.
    np.fill_diagonal(d, np.nan)
    np.testing.assert_array_equal(np.diagonal(held(d, allow_missing=True).distances), 0)
    rest = [name for name in IDS if name != "image 5"]
    assert rdm.subset(rest).missing == 0
    RSM.from_rsatoolbox(rdm.subset(rest).to_rsatoolbox())


def test_matrices_that_hold_too_little_are_refused():
    nothing = np.full((9, 9), np.nan)
    for kind in ("distance", "similarity", None):
        with pytest.raises(ComparisonError, match="every pair of different images is missing"):
            RSM.from_array(nothing, IDS, kind=kind, allow_missing=True)
    infinite = squareform(pdist(patterns()))
    infinite[1, 2] = infinite[2, 1] = np.inf
    with pytest.raises(ComparisonError, match="image 1 and image 2 is inf"):
        held(infinite, allow_missing=True)


def test_distances_with_missing_pairs_are_no_similarities_either():
    d = squareform(pdist(patterns()))
    d[2, 5] = d[5, 2] = np.nan
    for diagonal in (0, np.nan):
        np.fill_diagonal(d, diagonal)
        with pytest.raises(ComparisonError, match=r"looks like .*kind='distance'.*kind='similarity'"):
            RSM.from_array(d, IDS, allow_missing=True)
        assert RSM.from_array(d, IDS, kind="similarity", allow_missing=True).kind == "similarity"
    k = patterns() @ patterns().T
    k[2, 5] = k[5, 2] = np.nan
    with pytest.raises(ComparisonError, match="on its diagonal"):
        held(k, allow_missing=True)


@pytest.mark.parametrize(
    ("spoil", "repair", "advice"),
    [
        (lambda d: d + np.triu(np.ones_like(d), 1), lambda d: (d + d.T) / 2, r"\(m \+ m\.T\) / 2"),
        (np.triu, lambda d: d + d.T, r"give m \+ m\.T"),
        (lambda d: np.where(np.tri(9, k=-1) > 0, np.nan, d), lambda d: np.fmax(d, d.T), r"numpy\.fmax\(m, m\.T\)"),
    ],
    ids=["unequal halves", "half of zeros", "half of NaN"],
)
def test_an_asymmetric_matrix_is_refused_with_a_way_out_that_works(spoil, repair, advice):
    d = squareform(pdist(patterns()))
    with pytest.raises(ComparisonError, match=rf"not symmetric.*row 0, column 1.*{advice}"):
        held(spoil(d), allow_missing=True)
    assert held(repair(spoil(d))).missing == 0


def test_distances_from_similarities_are_those_of_the_patterns():
    x = patterns()
    k = RSM.from_array(x @ x.T, IDS)
    for name, metric in {"squared euclidean": "sqeuclidean", "euclidean": "euclidean", "cosine": "cosine"}.items():
        found = k.to_distances(name)
        assert (found.kind, found.dissimilarity, found.ids) == ("distance", name, IDS)
        np.testing.assert_allclose(found.distances, squareform(pdist(x, metric)), atol=1e-10)
    assert k.to_distances().dissimilarity == "squared euclidean"
    assert cka(k.to_distances(), k) == pytest.approx(1, abs=1e-12)
    with pytest.raises(ComparisonError, match=r"unknown distance 'correlation'.*squared euclidean"):
        k.to_distances("correlation")
    with pytest.raises(ComparisonError, match="holds distances already"):
        k.to_distances().to_distances()
    graph = RSM.from_array(1 - np.eye(9), IDS, kind="similarity")
    for name in ("squared euclidean", "euclidean", "cosine"):
        with pytest.raises(ComparisonError, match=r"images image 0 and image 1 .*more alike.*kind='distance'"):
            graph.to_distances(name)


def test_similarities_from_distances_are_those_of_the_patterns():
    x = patterns()
    centred = x - x.mean(axis=0)
    for name, metric in {"squared euclidean": "sqeuclidean", "euclidean": "euclidean"}.items():
        found = held(squareform(pdist(x, metric)), name).to_similarities()
        assert (found.kind, found.dissimilarity) == ("similarity", None)
        np.testing.assert_allclose(found.values, centred @ centred.T, atol=1e-10)
        np.testing.assert_allclose(found.to_distances(name).distances, squareform(pdist(x, metric)), atol=1e-6)
    np.testing.assert_allclose(
        held(squareform(pdist(x, "correlation")), "correlation").to_similarities().values, np.corrcoef(x), atol=1e-12
    )
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = held(squareform(pdist(x, "cosine")), "cosine").to_similarities()
    np.testing.assert_allclose(cosines.values, unit @ unit.T, atol=1e-12)
    ratings = held(squareform(pdist(x)), "behavioural")
    with pytest.raises(ComparisonError, match=r"no formula .*'behavioural'.*'inner products'.*'one minus'"):
        ratings.to_similarities()
    np.testing.assert_allclose(ratings.to_similarities("one minus").values, 1 - squareform(pdist(x)))
    h = np.eye(9) - 1 / 9
    torgerson = -h @ squareform(pdist(x)) @ h / 2
    np.testing.assert_allclose(ratings.to_similarities("inner products").values, torgerson, atol=1e-12)
    with pytest.raises(ComparisonError, match="unknown formula 'minus'"):
        ratings.to_similarities("minus")
    with pytest.raises(ComparisonError, match="holds similarities already"):
        cosines.to_similarities()
    d = squareform(pdist(x))
    d[2, 5] = d[5, 2] = np.nan
    with pytest.raises(ComparisonError, match=r"1 pairs of images are missing.*subset"):
        held(d, "euclidean", allow_missing=True).to_similarities()
    assert held(d, "cosine", allow_missing=True).to_similarities().missing == 1


def test_distances_of_rsatoolbox_say_which_formula_they_need():
    data = rsatoolbox.data.Dataset(patterns(), obs_descriptors={"image": IDS})
    for method, expected in {"euclidean": "inner products", "correlation": "one minus"}.items():
        rdm = RSM.from_rsatoolbox(rsatoolbox.rdm.calc_rdm(data, method, "image"))
        np.testing.assert_array_equal(rdm.to_similarities().values, rdm.to_similarities(expected).values)


def matched(seed=0):
    tokens = torch.randn(9, 6, 4, generator=torch.Generator().manual_seed(seed))
    return rsm(tokens, matching="rewindowed", kernel="rbf", ids=IDS, permutations=True)


def test_everything_follows_the_images():
    whole = matched()
    labels = [f"class {k % 3}" for k in range(9)]
    whole = RSM(whole.dataset.assign_coords(label_a=("image_a", labels), label_b=("image_b", labels)))
    order = [4, 0, 7, 3]
    part = whole.subset([IDS[k] for k in order])
    assert part.ids == part.other_ids == [IDS[k] for k in order]
    assert part.labels == [labels[k] for k in order]
    np.testing.assert_array_equal(part.values, whole.values[np.ix_(order, order)])
    np.testing.assert_array_equal(part.highest_values, whole.highest_values[np.ix_(order, order)])
    for name in ("product", "bound", "permutation"):
        np.testing.assert_array_equal(part.dataset[name].values, whole.dataset[name].values[np.ix_(order, order)])
    for name in ("norm_a", "norm_b"):
        np.testing.assert_array_equal(part.dataset[name].values, whole.dataset[name].values[order])
    assert part.attributes == whole.attributes
    np.testing.assert_array_equal(
        part.with_kernel("linear").values, whole.with_kernel("linear").values[np.ix_(order, order)]
    )


def test_bounds_follow_where_the_width_came_from_all_images():
    whole = rsm(np.random.default_rng(0).normal(size=(9, 6, 4)), matching="greedy", kernel="rbf", ids=IDS)
    part = whole.subset(IDS[2:7])
    expected = whole.highest_values[2:7, 2:7]
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(part.highest_values, expected, rtol=1e-12)


def test_two_sets_of_images_are_cut_on_each_side():
    values = np.arange(12.0).reshape(3, 4) - 5
    between = RSM.from_array(values, ["a", "b", "c"], ["w", "x", "y", "z"])
    part = between.subset(["c", "a"], ["x", "w"])
    np.testing.assert_array_equal(part.values, values[[2, 0]][:, [1, 0]])
    np.testing.assert_array_equal(between.subset(["b"]).values, values[[1]])
    np.testing.assert_array_equal(between.subset(other_ids=["y"]).values, values[:, [2]])
    with pytest.raises(ComparisonError, match="other_ids is for RSMs of two sets of images"):
        matched().subset(IDS[:4], IDS[:4])
    with pytest.raises(ComparisonError, match=r"one set of images.*two"):
        between.align(RSM.from_array(np.eye(3), ["a", "b", "c"]))


def test_reordering_takes_every_image_once():
    whole = matched()
    order = list(reversed(IDS))
    np.testing.assert_array_equal(whole.reorder(order).values, whole.values[::-1, ::-1])
    with pytest.raises(ComparisonError, match=r"ids leaves out image 'image 8'.*subset"):
        whole.reorder(IDS[:8])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["image 1", "imag 2"], r"ids names image 'imag 2', which this RSM does not hold; nearest: 'image 2'"),
        (["image 1", "image 1"], "ids names image 'image 1' more than once"),
        ([], "ids names no image"),
        ("image 1", "ids must be a sequence of texts"),
        ([1, 2], r"ids\[0\] must be text, found 1"),
    ],
)
def test_images_that_cannot_be_taken_are_named(ids, message):
    with pytest.raises(ComparisonError, match=message):
        matched().subset(ids)
    with pytest.raises(ComparisonError, match=message.replace("ids names no image", "ids leaves out image")):
        matched().reorder(ids)


def test_rsms_are_aligned_over_the_images_that_both_hold():
    first, second = matched(), matched(1)
    shuffled = second.subset(["image 8", "image 2", "image 5", "image 0"])
    shuffled = RSM(
        shuffled.dataset.assign_coords(image_a=["new", *shuffled.ids[1:]], image_b=["new", *shuffled.ids[1:]])
    )
    one, other = first.align(shuffled)
    assert one.ids == other.ids == ["image 0", "image 2", "image 5"]
    np.testing.assert_array_equal(one.values, first.values[np.ix_([0, 2, 5], [0, 2, 5])])
    np.testing.assert_array_equal(other.values, second.values[np.ix_([0, 2, 5], [0, 2, 5])])
    with pytest.raises(ComparisonError, match=r"no image is in all RSMs.*image 0.*cat"):
        first.align(RSM.from_array(np.eye(2), ["cat", "dog"]))
    with pytest.raises(ComparisonError, match="expected an RSM, found ndarray"):
        first.align(np.eye(9))


def test_images_named_twice_are_refused_with_a_way_out():
    with pytest.raises(ComparisonError, match="more than once; average its rows and columns"):
        RSM.from_array(np.eye(3), ["a", "b", "a"])
