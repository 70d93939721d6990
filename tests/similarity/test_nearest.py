"""Exact nearest neighbours: what matching all pairs would find, with fewer matchings."""

import sys
import tracemalloc
from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import captured, tokens

import rsm_probe
from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.errors import ComparisonError, CostError, MatchingError, RepresentationError
from rsm_probe.matching.methods.translation import Translation
from rsm_probe.similarity.kernels import RBF

# What it is compared with is of tokens in main memory.
nearest = partial(rsm_probe.nearest, device="cpu")


def scattered(images: int, clusters: int = 4, locations: int = 16, seed: int = 0) -> torch.Tensor:
    """Images of a few kinds, each with its locations in another order."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn(clusters, locations, 8, generator=torch.Generator().manual_seed(99)) + torch.randn(
        clusters, 1, 8, generator=torch.Generator().manual_seed(98)
    )
    found = []
    for k in range(images):
        order = torch.randperm(locations, generator=generator)
        found.append(kinds[k % clusters][order] + 0.3 * torch.randn(locations, 8, generator=generator))
    return torch.stack(found)


def brute_force(x, y, k, **options):
    full = rsm_probe.rsm(x, y, **options)
    order = np.argsort(-full.values, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(full.values, order, axis=1)


@pytest.mark.parametrize("kernel", ["linear", "cosine", RBF(3.0)])
@pytest.mark.parametrize("centering", [None, "location-mean", "channel-mean"])
@pytest.mark.parametrize("matching", ["optimal", "identity", "greedy", "batch-optimal", Translation((4, 4)), "scipy"])
def test_as_brute_force(kernel, centering, matching):
    x, y = scattered(7, seed=1), scattered(40, seed=2)
    found = nearest(x, y, 6, matching, kernel, centering)
    order, values = brute_force(x, y, 6, matching=matching, kernel=kernel, centering=centering)
    assert np.array_equal(found["index"].values, order)
    np.testing.assert_allclose(found["similarity"].values, values, rtol=1e-9, atol=1e-12)
    assert found["neighbour"].values[0, 0] == str(order[0, 0])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from(["linear", "cosine"]),
)
@pytest.mark.slow
def test_as_brute_force_on_anything(seed, rows, columns, k, kernel):
    generator = np.random.default_rng(seed)
    channels = int(generator.integers(1, 5))
    kind = generator.integers(0, 3)

    def draw(count, locations):
        values = generator.normal(size=(count, locations, channels)) + generator.normal()
        values = np.round(values) if kind == 1 else values  # ties
        return torch.from_numpy(np.maximum(values, 0) if kind == 2 else values).float()  # dead locations

    x, y = draw(4, rows), draw(12, columns)
    found = nearest(x, y, k, kernel=kernel)
    _, values = brute_force(x, y, k, kernel=kernel)
    np.testing.assert_allclose(found["similarity"].values, values, rtol=1e-5, atol=1e-5)
    full = rsm_probe.rsm(x, y, kernel=kernel).values
    chosen = np.take_along_axis(full, found["index"].values, axis=1)
    np.testing.assert_allclose(chosen, values, rtol=1e-5, atol=1e-5)


def test_most_matchings_are_saved_where_images_are_of_kinds():
    x, y = scattered(20, 8, 64, seed=1), scattered(400, 8, 64, seed=2)
    found = nearest(x, y, 5)
    assert found.attrs["pairs"] == 20 * 400
    assert found.attrs["matchings"] < 0.25 * 20 * 400
    assert found.attrs["matchings"] <= found.attrs["affinities"]
    assert found.attrs["saved_matchings"] == 1 - found.attrs["matchings"] / 8000
    assert found.attrs["seconds"] > found.attrs["seconds_bounds"] > 0
    assert found.attrs["seconds_of_all_pairs"] > 0
    assert found.attrs["saved_time"] == max(0, 1 - found.attrs["seconds"] / found.attrs["seconds_of_all_pairs"])


@pytest.mark.parametrize(("seconds", "saved"), [(2.5, 0.75), (10.0, 0.0), (40.0, 0.0)])
def test_the_time_saved_is_never_negative(seconds, saved):
    from rsm_probe.neighbours.candidates import Counts
    from rsm_probe.neighbours.nearest_images import _savings

    assert _savings(Counts(), 100, seconds, seconds_per_pair=0.1)["saved_time"] == saved


def test_scores_are_computed_for_all_pairs():
    x, y = scattered(5, seed=1), scattered(30, seed=2)
    found = nearest(x, y, 4, "late-interaction", "linear")
    assert np.array_equal(found["index"].values, brute_force(x, y, 4, matching="late-interaction", kernel="linear")[0])
    assert found.attrs["matchings"] == 150
    assert found.attrs["saved_matchings"] == 0


def pair_of_sets(kind):
    if kind == "few":
        return scattered(6, seed=1), scattered(50, seed=2)
    if kind == "one wide image":  # which a sample of images may miss
        x, y = scattered(40, seed=1), scattered(23, seed=2)
        x[1::2] *= 30
        return x, y
    if kind == "more locations":
        return scattered(5, seed=1), scattered(20, locations=9, seed=2)
    return scattered(4, seed=1), torch.cat([scattered(4, seed=1)] * 3)  # copies


@pytest.mark.parametrize("kind", ["few", "one wide image", "more locations", "copies"])
@pytest.mark.parametrize("matching", ["optimal", "identity", "greedy"])
def test_an_rbf_kernel_has_the_width_that_it_has_in_rsm(kind, matching):
    x, y = pair_of_sets(kind)
    found = nearest(x, y, 7, matching, "rbf")
    order, values = brute_force(x, y, 7, matching=matching, kernel="rbf")
    assert np.array_equal(found["index"].values, order)
    np.testing.assert_allclose(found["similarity"].values, values, rtol=1e-6, atol=1e-12)
    everything = rsm_probe.rsm(x, y, matching, "linear").dataset
    distances = everything["norm_a"] + everything["norm_b"] - 2 * everything["product"]
    assert found.attrs["sigma2"] == pytest.approx(float(distances.median()), rel=1e-6)
    again = nearest(x, y, 7, matching, RBF(found.attrs["sigma2"]))
    np.testing.assert_allclose(again["similarity"].values, found["similarity"].values, rtol=1e-6)
    assert "sigma2" not in again.attrs


@pytest.mark.parametrize("shortlist", [None, 8])
def test_the_width_does_not_depend_on_what_groups_and_shortlists_leave_out(shortlist):
    z, names = scattered(24, seed=1), [str(k % 3) for k in range(24)]
    with pytest.warns(UserWarning, match=r"all 24 x 24 pairs, which are all matched.*RBF\(sigma2=\.\.\.\)"):
        found = nearest(z, z, 2, kernel="rbf", shortlist=shortlist, groups=(names, names))
    full = rsm_probe.rsm(z, z, kernel="rbf").values
    expected = np.take_along_axis(full, found["index"].values, axis=1)
    np.testing.assert_allclose(found["similarity"].values, expected, rtol=1e-6)
    assert found.attrs["matchings"] == 24 * 24
    assert found.attrs["saved_matchings"] == 0
    cheap = nearest(z, z, 2, kernel=RBF(found.attrs["sigma2"]), shortlist=shortlist, groups=(names, names))
    assert np.array_equal(cheap["index"].values, found["index"].values)
    assert cheap.attrs["matchings"] < 24 * 24
    assert cheap.attrs.get("recall") == found.attrs.get("recall")


def test_a_width_that_needs_no_matching_warns_of_nothing(recwarn):
    x, y = scattered(3, seed=1), scattered(9, seed=2)
    nearest(x, y, 2, "identity", "rbf")
    nearest(x, y, 2, "optimal", RBF(2.0))
    nearest(x, y, 2)
    assert not recwarn.list


def test_distances_that_do_not_fit_into_memory_are_refused_before_any_is_computed():
    x, y = scattered(20, seed=1), scattered(300, seed=2)
    with pytest.raises(CostError, match=r"median distance of 6,000 pairs.*above the memory.*give the width, as in RBF"):
        nearest(x, y, 2, kernel="rbf", memory="100KB")
    nearest(x[:2], y, 2, kernel=RBF(2.0), memory="100KB")


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("memory", ["2GB", 3000])
def test_an_image_of_zeros_is_no_neighbour_before_it_was_matched(seed, memory):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(2, 6, 3, generator=generator), -torch.rand(40, 6, 3, generator=generator)
    y[0] = 0
    groups = (["a", "a"], ["a", *["b"] * 39])  # the image of zeros is no candidate, and all others are unlike
    found = nearest(x, y, 3, groups=groups, memory=memory)
    full = rsm_probe.rsm(x, y).values
    for query, own in enumerate(groups[0]):
        allowed = np.where([group == own for group in groups[1]], -np.inf, full[query])
        np.testing.assert_allclose(found["similarity"].values[query], np.sort(allowed)[::-1][:3], rtol=1e-6)
    assert not found["product"].isnull().any()


def test_a_narrow_rbf_says_0_in_the_order_of_a_wide_one():
    x, y = scattered(3, seed=1), scattered(30, seed=2)
    wide, narrow = (nearest(x, y, 4, kernel=RBF(width)) for width in (10.0, 1e-6))
    assert np.array_equal(narrow["index"].values, wide["index"].values)
    assert narrow["similarity"].values.max() == 0
    assert wide["similarity"].values.min() > 0


def test_equal_images_come_in_the_order_of_the_database():
    y = scattered(10, 10, seed=3)
    y = torch.cat([y, y, y])
    found = nearest(y[:10], y, 3, centering="channel-mean")
    assert found["index"].values.tolist() == [[k, k + 10, k + 20] for k in range(10)]
    np.testing.assert_allclose(found["similarity"].values, 1)
    assert len(np.unique(found["product"].values[0])) == 1


def test_captures_and_tensors_give_the_same(tmp_path):
    x, y = scattered(9, seed=1), scattered(33, seed=2)
    kept = captured(tmp_path / "x.zarr", x, "query"), captured(tmp_path / "y.zarr", y, "base")
    expected = nearest(x, y, 4, centering="location-mean")
    found = nearest(*kept, 4, centering="location-mean")
    for name in ("index", "similarity", "product"):
        assert np.array_equal(found[name].values, expected[name].values)
    assert found["neighbour"].values[2, 0] == f"base-{expected['index'].values[2, 0]}"
    assert list(found["query"].values) == [f"query-{k}" for k in range(9)]


@pytest.mark.parametrize("memory", ["30KB", "100KB", "1MB"])
@pytest.mark.parametrize("workers", [1, 3])
def test_neither_memory_nor_workers_change_anything(tmp_path, memory, workers):
    x, y = captured(tmp_path / "x.zarr", scattered(9, seed=1)), captured(tmp_path / "y.zarr", scattered(60, seed=2))
    expected = nearest(x, y, 4, kernel="linear")
    found = nearest(x, y, 4, kernel="linear", memory=memory, workers=workers)
    for name in ("index", "similarity", "product"):
        assert np.array_equal(found[name].values, expected[name].values)


@pytest.mark.parametrize("matching", ["optimal", "identity"])
def test_images_of_a_querys_own_group_are_no_candidates(matching):
    z = scattered(24, seed=1)
    groups = [f"video {k % 6}" for k in range(24)]
    found = nearest(z, z, 5, matching, groups=(groups, groups))
    full = rsm_probe.rsm(z, z, matching=matching).values
    full[np.array(groups)[:, None] == np.array(groups)[None]] = -np.inf
    assert np.array_equal(found["index"].values, np.argsort(-full, axis=1, kind="stable")[:, :5])
    assert found.attrs["pairs"] == 24 * 20


def test_queries_with_too_few_candidates():
    x, y = scattered(3, seed=1), scattered(4, seed=2)
    found = nearest(x, y, 4, groups=(["a", "b", "c"], ["a", "a", "a", "b"]))
    assert (found["index"].values >= 0).sum(axis=1).tolist() == [1, 3, 4]
    assert found["neighbour"].values[0].tolist() == ["3", "", "", ""]
    assert np.isnan(found["similarity"].values[0, 1:]).all()
    none = nearest(x, y, 2, groups=(["a"] * 3, ["a"] * 4))
    assert (none["index"].values == -1).all()
    assert none.attrs["pairs"] == 0


@pytest.mark.parametrize("options", [{}, {"shortlist": 100}, {"matching": "identity"}])
def test_more_neighbours_than_images_are_refused(options):
    x, y = tokens(3), tokens(9)
    with pytest.raises(ComparisonError, match=r"k=100 neighbours .* database has only 9 images; use k=9 or less"):
        nearest(x, y, 100, **options)
    with pytest.raises(ComparisonError, match=r"k=5 neighbours .* database has only 4 images; use k=4 or less"):
        nearest(x, y[:4], **options)
    assert nearest(x, y, 9, **options)["index"].shape == (3, 9)


def test_a_shortlist_is_ranked_exactly_and_says_what_it_misses():
    x, y = scattered(12, 6, seed=1), scattered(120, 6, seed=2)
    found = nearest(x, y, 3, shortlist=10)
    assert found.attrs["pairs"] == 120
    full = rsm_probe.rsm(x, y).values
    pooled = [p.mean(dim=1).double().numpy() for p in (x, y)]
    cosines = np.divide(
        pooled[0] @ pooled[1].T, np.linalg.norm(pooled[0], axis=1)[:, None] * np.linalg.norm(pooled[1], axis=1)
    )
    for row in range(12):
        listed = np.argsort(-cosines[row])[:10]
        assert set(found["index"].values[row]) <= set(listed)
        np.testing.assert_allclose(found["similarity"].values[row], np.sort(full[row, listed])[::-1][:3])
    true = np.argsort(-full, axis=1)[:, :3]
    hits = [len(set(a) & set(b)) for a, b in zip(found["index"].values, true, strict=True)]
    assert found.attrs["recall"] == pytest.approx(np.sum(hits) / 36)
    assert found.attrs["recall"] < 1
    assert found.attrs["saved_matchings"] == 1 - found.attrs["matchings"] / (12 * 120)
    assert nearest(x, y, 3, shortlist=120).attrs["recall"] == 1


def test_a_shortlist_leaves_out_the_own_group():
    z = scattered(24, seed=1)
    groups = [str(k % 3) for k in range(24)]
    found = nearest(z, z, 2, shortlist=5, groups=(groups, groups))
    assert found.attrs["pairs"] == 24 * 5
    assert all(groups[row] != groups[k] for row, places in enumerate(found["index"].values) for k in places)


def test_without_faiss_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ComparisonError, match=r"pip install 'rsm-probe\[faiss\]'"):
        nearest(tokens(3), tokens(9), 2, shortlist=4)
    nearest(tokens(3), tokens(9), 2)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_extreme_sizes(scale):
    x, y = scattered(5, seed=1), scattered(20, seed=2)
    expected = nearest(x, y, 4)
    found = nearest(x * scale, y * scale, 4)
    assert np.array_equal(found["index"].values, expected["index"].values)


def test_zeros_everywhere():
    found = nearest(torch.zeros(2, 4, 3), torch.zeros(5, 4, 3), 2)
    assert found["index"].values.tolist() == [[0, 1], [0, 1]]
    assert (found["similarity"].values == 0).all()
    assert nearest(torch.zeros(2, 4, 3), torch.zeros(5, 4, 3), 2, kernel="rbf")["similarity"].values.min() == 1


def test_surplus_locations_need_no_answer():
    # Of the larger image only one location is matched; the other's best answer is negative.
    x, y = torch.tensor([[[1.0]], [[-1.0]]]), torch.tensor([[[1.0], [-5.0]], [[0.1], [0.1]], [[-3.0], [-3.0]]])
    found = nearest(x, y, 1, kernel="linear")
    assert found["product"].values.tolist() == [[1.0], [5.0]]
    turned = nearest(y, x, 1, kernel="linear")
    assert turned["product"].values[:, 0].tolist() == pytest.approx([5.0, 0.1, 3.0])


def test_other_numbers_of_locations():
    x, y = scattered(4, locations=9, seed=1), scattered(20, locations=16, seed=2)
    for a, b in ((x, y), (y[:4], torch.cat([x, x]))):
        found = nearest(a, b, 3, kernel="linear")
        assert np.allclose(found["similarity"].values, brute_force(a, b, 3, kernel="linear")[1])


def test_numbers_of_other_precisions():
    x, y = scattered(4, seed=1), scattered(20, seed=2)
    expected = nearest(x, y, 3)
    for a, b in ((x.double(), y), (x, y.double()), (x.double().numpy(), y), (x.half(), y)):
        assert np.array_equal(nearest(a, b, 3)["index"].values[:, 0], expected["index"].values[:, 0])
    whole = torch.tensor([[[3, 0], [0, 1]], [[0, 2], [0, 0]]])
    assert nearest(whole, whole, 1)["index"].values[:, 0].tolist() == [0, 1]


def test_many_small_images_take_little_memory():
    x, y = torch.randn(100, 4, 8), torch.randn(1000, 4, 8)
    tracemalloc.start()
    nearest(x, y, 5, memory="50MB", workers=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


class Counted(CapturedLayer):
    """A layer that counts the reads of its tokens, and the images of each."""

    def __init__(self, layer):
        vars(self).update(vars(layer))
        self.reads = []

    def tokens(self, images=slice(None)):
        self.reads.append(len(range(*images.indices(len(self)))))
        return super().tokens(images)


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "count", "most"), [("300KB", 40, 2.1), ("2.7MB", 100, 1.5)])
def test_a_database_beyond_memory_is_read_few_times_for_every_block_of_queries(tmp_path, memory, count, most):
    database = captured(tmp_path / "c.zarr", tokens(400, 4, 64, seed=2))
    captured_queries = captured(tmp_path / "q.zarr", tokens(count, 4, 64, seed=1), "query")

    def searched(**options):
        """How often an image of the database is read, on average; blocks of queries; and the neighbours."""
        layer, queries = Counted(database), Counted(captured_queries)
        found = nearest(queries, layer, 3, workers=1, **options)
        # Beside blocks, one query is read to see what they are, and all are for their bounds.
        return sum(layer.reads) / len(layer), len(queries.reads) - 2, found

    once, _, expected = searched()
    assert once < 2
    often, of_queries, found = searched(memory=memory)
    assert of_queries > 1
    # For bounds, unless there is room for what they are made of; for a few pairs of each; and for all that are left.
    assert once < often < most * of_queries
    xr.testing.assert_equal(found, expected)


def test_wrong_arguments():
    x, y = tokens(3), tokens(9)
    with pytest.raises(ComparisonError, match="k must be at least 1"):
        nearest(x, y, 0)
    with pytest.raises(ComparisonError, match="shortlist must be at least 5, found 2"):
        nearest(x, y, 5, shortlist=2)
    with pytest.raises(ComparisonError, match="groups holds 2 names for 9 images of the database"):
        nearest(x, y, 1, groups=(["a"] * 3, ["a"] * 2))
    with pytest.raises(RepresentationError, match="6 channels and the database has 4"):
        nearest(x, tokens(9, channels=4), 1)
    with pytest.raises(RepresentationError, match="query must hold tokens"):
        nearest(x[0], y, 1)
    bad = y.clone()
    bad[4, 0, 0] = torch.nan
    with pytest.raises(RepresentationError, match="database holds NaN or infinity, first in image 4"):
        nearest(x, bad, 1)
    with pytest.raises(ComparisonError, match="query_ids holds 1 names"):
        nearest(x, y, 1, query_ids=["a"])
    with pytest.raises(MatchingError, match="unknown matching"):
        nearest(x, y, 1, "best")
    with pytest.raises(ComparisonError, match="score and pairs no locations"):
        nearest(x, y, 1, "late-interaction")
    with pytest.raises(CostError, match="one affinity of 9 x 9"):
        nearest(x, y, 1, memory=100)
    with pytest.raises(CostError, match="workers"):
        nearest(x, y, 1, workers=0)


def test_progress_says_what_was_saved(capsys):
    nearest(scattered(5, seed=1), scattered(60, seed=2), 2, progress=True)
    said = capsys.readouterr().err
    assert "of 300 pairs matched" in said
    assert "5/5" in said


def test_layers_of_captures_know_their_images_and_what_they_are(tmp_path):
    x, y = captured(tmp_path / "x.zarr", tokens(5)), captured(tmp_path / "y.zarr", tokens(6, seed=1), layer="other")
    with pytest.raises(ComparisonError, match="query_ids: a captured layer knows the names of its images"):
        nearest(x, y, 1, query_ids=list("abcde"))
    for match in (lambda: nearest(x, y, 1), lambda: rsm_probe.all_pairs(x, y), lambda: rsm_probe.rsm(x, y)):
        with pytest.warns(UserWarning, match="of layer 'layer' are matched with those of layer 'other'"):
            match()


@pytest.mark.parametrize("options", [{"k": 1.5}, {"k": True}, {"k": 1, "shortlist": 2.5}, {"k": 1, "workers": "2"}])
def test_numbers_that_are_no_whole_ones_are_refused(options):
    with pytest.raises((ComparisonError, CostError), match="must be a whole number, found"):
        nearest(tokens(3), tokens(9), **options)
