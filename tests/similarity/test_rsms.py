"""RSMs of several subjects as one object."""

import re

import numpy as np
import pytest
import torch
from rsatoolbox.rdm import RDMs
from scipy.spatial.distance import pdist, squareform

from rsm_probe import RSM, RSMs, compare
from rsm_probe.errors import ComparisonError, StorageError

IDS = ["cat", "dog", "car", "bus", "pea"]


def distances(subjects: int = 3, seed: int = 0) -> np.ndarray:
    patterns = np.random.default_rng(seed).normal(size=(subjects, 5, 4))
    return np.stack([pdist(one, "sqeuclidean") for one in patterns])


@pytest.fixture
def rsms() -> RSMs:
    return RSMs.from_array(distances(), IDS, ["ann", "bob", "cyd"], dissimilarity="squared euclidean")


def test_it_is_a_mapping_of_rsms(rsms):
    assert list(rsms) == ["ann", "bob", "cyd"]
    assert len(rsms) == 3
    assert "bob" in rsms
    assert "eve" not in rsms
    one = rsms["bob"]
    assert isinstance(one, RSM)
    assert (one.ids, one.kind, one.dissimilarity) == (IDS, "distance", "squared euclidean")
    np.testing.assert_array_equal(one.distances, squareform(distances()[1]))
    assert [rsm.ids for rsm in rsms.values()] == [IDS] * 3
    with pytest.raises(ComparisonError, match="unknown subject 'bib'; nearest: 'bob'"):
        rsms["bib"]
    grid = compare(rsms, measure="rsa-pearson")
    assert grid["layer_a"].values.tolist() == list(rsms)


def test_condensed_and_square_are_the_same(rsms):
    square = RSMs.from_array(np.stack([squareform(row) for row in distances()]), IDS, rsms.names, kind="distance")
    np.testing.assert_array_equal(square.similarities, rsms.similarities)
    np.testing.assert_array_equal(rsms.similarities, -np.stack([squareform(row) for row in distances()]) / 2)
    assert square.dissimilarity is None


def test_similarities_need_squares():
    features = np.random.default_rng(0).normal(size=(2, 5, 3))
    rsms = RSMs.from_array(features @ features.transpose(0, 2, 1))
    assert (rsms.kind, rsms.names, rsms.ids) == ("similarity", ["subject 0", "subject 1"], list("01234"))
    with pytest.raises(ComparisonError, match=re.escape("have shape (K, N, N)")):
        RSMs.from_array(features[0])


def test_subset_and_reorder(rsms):
    some = rsms.subset(["bus", "cat"], ["cyd", "ann"])
    assert (some.ids, some.names) == (["bus", "cat"], ["cyd", "ann"])
    assert some["cyd"].distances[0, 1] == squareform(distances()[2])[3, 0]
    turned = rsms.reorder(IDS[::-1])
    np.testing.assert_array_equal(turned.similarities, rsms.similarities[:, ::-1, ::-1])
    for bad, message in (
        ({"ids": ["cow"]}, "'cow'"),
        ({"names": ["ann", "ann"]}, "names holds 'ann' more than once"),
        ({"names": []}, "names is empty"),
        ({"names": ["eve"]}, "unknown subject 'eve'"),
    ):
        with pytest.raises(ComparisonError, match=message):
            rsms.subset(**bad)
    with pytest.raises(ComparisonError, match="leaves out image 'pea'"):
        rsms.reorder(IDS[:4])


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # in rsatoolbox
def test_means_are_those_of_rsatoolbox(rsms):
    first, second = np.triu_indices(5, 1)
    expected = RDMs(distances()).mean().dissimilarities[0]
    np.testing.assert_allclose(rsms.mean().distances[first, second], expected, rtol=1e-14)
    assert (rsms.mean().ids, rsms.mean().dissimilarity) == (IDS, "squared euclidean")
    holes = distances()
    holes[0, 2] = holes[1, 2] = holes[1, 5] = holes[:, 7] = np.nan
    holed = RSMs.from_array(holes, IDS, dissimilarity="squared euclidean", allow_missing=True)
    assert holed.missing.tolist() == [2, 3, 1]
    np.testing.assert_allclose(holed.mean().distances[first, second], RDMs(holes).mean().dissimilarities[0], rtol=1e-14)
    assert holed.mean().missing == 1


def test_leave_one_out(rsms):
    left = dict(rsms.leave_one_out())
    assert list(left) == rsms.names
    np.testing.assert_allclose(left["bob"].values, rsms.subset(names=["ann", "cyd"]).mean().values)
    with pytest.raises(ComparisonError, match="there is one subject, ann"):
        next(rsms.subset(names=["ann"]).leave_one_out())


def test_rsatoolbox_and_back(rsms):
    theirs = rsms.to_rsatoolbox()
    np.testing.assert_allclose(theirs.dissimilarities, distances())
    assert theirs.rdm_descriptors["subject"] == rsms.names
    back = RSMs.from_rsatoolbox(theirs)
    assert (back.names, back.ids, back.dissimilarity) == (rsms.names, IDS, "squared euclidean")
    np.testing.assert_allclose(back.similarities, rsms.similarities, rtol=1e-14)
    theirs.rdm_descriptors["area"] = ["V1", "V4", "IT"]
    assert RSMs.from_rsatoolbox(theirs, names="area", dimension="area").names == ["V1", "V4", "IT"]
    with pytest.raises(ComparisonError, match=re.escape("no RDM descriptor 'roi' (there are: subject, area)")):
        RSMs.from_rsatoolbox(theirs, names="roi")


def test_saved_and_opened(rsms, tmp_path):
    rsms.save(tmp_path / "brains.zarr")
    again = RSMs.open(tmp_path / "brains.zarr")
    assert repr(again) == repr(rsms)
    np.testing.assert_array_equal(again.similarities, rsms.similarities)
    regions = RSMs.from_rsms(dict(rsms), "region")
    regions.save(tmp_path / "regions.zarr")
    assert RSMs.open(tmp_path / "regions.zarr").dimension == "region"
    rsms["ann"].save(tmp_path / "one.zarr")
    with pytest.raises(StorageError, match=r"is not what RSMs\.save writes"):
        RSMs.open(tmp_path / "one.zarr")


def test_a_lost_value_is_noticed(rsms, tmp_path):
    rsms.dataset["similarity"][0, 1, 2] = np.nan
    rsms.save(tmp_path / "damaged.zarr")
    with pytest.raises(StorageError, match="missing or not finite"):
        RSMs.open(tmp_path / "damaged.zarr")


def test_only_rsms_that_belong_together(rsms):
    ann, bob = rsms["ann"], rsms["bob"]
    fewer = bob.subset(IDS[:4])
    with pytest.raises(ComparisonError, match="bob has other images than ann, such as 'pea'"):
        RSMs.from_rsms({"ann": ann, "bob": fewer})
    assert RSMs.from_rsms({"ann": ann, "bob": fewer}, on="intersection").ids == IDS[:4]
    with pytest.raises(ComparisonError, match="bob has another order of images than ann"):
        RSMs.from_rsms({"ann": ann, "bob": bob.reorder(IDS[::-1])})
    with pytest.raises(ComparisonError, match="ann holds squared euclidean distance values and bob similarity values"):
        RSMs.from_rsms({"ann": ann, "bob": bob.to_similarities()})
    other = RSM.from_array(bob.distances, IDS, dissimilarity="correlation")
    with pytest.raises(ComparisonError, match="correlation distance values; convert both by to_similarities"):
        RSMs.from_rsms({"ann": ann, "bob": other})
    assert RSMs.from_rsms({"ann": ann.to_similarities(), "bob": other.to_similarities()}).kind == "similarity"
    with pytest.raises(ComparisonError, match="ann is ndarray, not an RSM"):
        RSMs.from_rsms({"ann": ann.values})
    with pytest.raises(ComparisonError, match="give RSMs by name"):
        RSMs.from_rsms({})
    with pytest.raises(ComparisonError, match="dimension is what the names are"):
        RSMs.from_rsms({"ann": ann}, "image_a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[:, :9], "a row of 9 distances does not hold every pair"),
        (lambda d: d[0], "have shape (K, N, N)"),
        (lambda d: np.where(d == d[1, 3], np.nan, d), "subject 1: the distance of images"),
        (lambda d: d + 1j, "holds complex numbers"),
        (lambda d: np.ma.masked_array(d, d > 1.0), "is a masked array, whose masked entries would count as numbers"),
        (lambda d: [squareform(d[0]), squareform(d[0, :6])], "is not an array of numbers"),
        (lambda d: d.astype(str), "must hold real numbers"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(ComparisonError, match=re.escape(message)):
        RSMs.from_array(change(distances()), dissimilarity="squared euclidean")


def test_a_square_matrix_alone_is_an_rsm():
    with pytest.raises(ComparisonError, match=re.escape("RSM.from_array(values, ids)")):
        RSMs.from_array(squareform(distances()[0]), dissimilarity="squared euclidean")


@pytest.mark.parametrize("images", [3, 6, 10])
def test_a_square_matrix_does_not_pass_for_subjects_with_fewer_images(images):
    """6 rows of 6 numbers could be 6 subjects with the 6 pairs of 4 images."""
    square = squareform(pdist(np.random.default_rng(0).normal(size=(images, 4))))
    square[0, 1] = square[1, 0] = np.nan
    with pytest.raises(ComparisonError, match=f"this is one matrix of {images} images"):
        RSMs.from_array(square, kind="distance", allow_missing=True)
    assert len(RSMs.from_array(square[None], kind="distance", allow_missing=True).ids) == images


def test_tensors_that_numpy_does_not_take():
    values = torch.tensor(distances(), requires_grad=True)
    for given in (values, values.bfloat16()):
        assert len(RSMs.from_array(given, kind="distance")) == 3


def test_names_must_fit():
    for names, message in ((["a"], "names holds 1 names for 3"), (["a", "b", "a"], "'a' more than once")):
        with pytest.raises(ComparisonError, match=message):
            RSMs.from_array(distances(), names=names, kind="distance")
