"""All pairs on disk: the values of pairs in memory, whatever executes them, however often they were interrupted."""

import multiprocessing
import re
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import torch
import xarray as xr
from stores import Watching, assert_same, captured, tokens
from stores import all_pairs_on_cpu as all_pairs

import rsm_probe
from rsm_probe.captures.captured_layers import Capture
from rsm_probe.errors import CostError, MatchingError, RepresentationError, StorageError
from rsm_probe.execution.execution import Execution
from rsm_probe.execution.executors import cluster
from rsm_probe.matching.methods.optimal import Auction
from rsm_probe.pairs.tile_plan import Plan

TILE = 6


@pytest.mark.parametrize(
    ("matching", "centering"),
    [(name, None) for name in ("optimal", "identity", "greedy", "batch-optimal", "translation", "scipy", "lap")]
    + [(name, mean) for name in ("optimal", "identity", "translation") for mean in ("location-mean", "channel-mean")],
)
def test_one_set_as_in_memory(layer, matching, centering):
    found = rsm_probe.rsm(layer, matching=matching, centering=centering)
    expected = rsm_probe.rsm(layer.tokens(), matching=matching, centering=centering, ids=layer.ids, grid=layer.grid)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.dataset["norm_a"], expected.dataset["norm_a"], rtol=1e-9)
    assert np.array_equal(found.values, found.values.T)
    assert found.ids == found.other_ids == layer.ids
    assert found.attributes["matching"] == matching
    for kernel in ("linear", "rbf"):
        other = expected.with_kernel(kernel).values
        np.testing.assert_allclose(found.with_kernel(kernel).values, other, rtol=2e-6, atol=2e-6 * np.abs(other).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("locations", "matching"),
    [(9, "optimal"), (5, "optimal"), (12, "optimal"), (9, "identity"), (12, "identity"), (5, "greedy"), (12, "greedy")],
)
def test_two_sets_as_in_memory(layer, tmp_path, locations, matching):
    other = captured(tmp_path / "d.zarr", tokens(13, locations, seed=1), "base")
    centering = "channel-mean" if locations == 9 else None
    found = rsm_probe.rsm(layer, other, matching=matching, centering=centering)
    expected = rsm_probe.rsm(layer.tokens(), other.tokens(), matching=matching, centering=centering)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-6, atol=1e-6)
    assert found.other_ids == other.ids
    assert list(found.dataset["label_b"].values) == other.labels


def test_a_score(layer):
    found = rsm_probe.rsm(layer, matching="late-interaction", kernel="linear")
    expected = rsm_probe.rsm(layer.tokens(), matching="late-interaction", kernel="linear")
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-6)


@pytest.mark.parametrize("tile", [1, 3, 4, 7, 19, 20, 50])
def test_the_size_of_a_tile_changes_nothing_but_the_last_digits(tmp_path, tile):
    layer = captured(tmp_path / "c.zarr", tokens(7 if tile == 1 else 20))
    found, expected = all_pairs(layer, tile=tile), rsm_probe.rsm(layer.tokens(), kernel="linear")
    np.testing.assert_allclose(found["product"], expected.values, rtol=2e-7)


def test_products_lie_between_identity_and_bound(layer):
    optimal, aligned = all_pairs(layer, tile=TILE), all_pairs(layer, tile=TILE, matching="identity")
    assert (optimal["product"].values >= aligned["product"].values).all()
    scale = np.sqrt(np.outer(optimal["norm_a"], optimal["norm_b"]))
    gaps = (optimal["bound"] - optimal["product"]).values
    assert (gaps >= 0).all()
    assert (gaps <= 2e-6 * scale).all()
    assert np.isinf(aligned["bound"].values[~np.eye(20, dtype=bool)]).all()


def test_permutations_add_up_to_the_products(layer, database):
    for other in (None, database):
        found = all_pairs(layer, other, tile=TILE, permutations=True)
        x, y = layer.tokens().double(), (layer if other is None else other).tokens().double()
        for i in range(len(x)):
            for j in range(len(y)):
                order = found["permutation"].values[i, j].astype(int)
                assert sorted(order) == list(range(9))
                product = float((x[i] * y[j][order]).sum())
                assert product == pytest.approx(float(found["product"][i, j]), rel=1e-6, abs=1e-6)
        assert found["permutation"].dtype == np.int16


@pytest.mark.parametrize("matching", ["identity", "translation", "batch-optimal"])
def test_permutations_of_methods_that_read_no_affinity(layer, matching):
    found = all_pairs(layer, tile=TILE, matching=matching, permutations=True)
    x = layer.tokens().double()
    for i, j in ((0, 0), (3, 1), (1, 3), (19, 2)):
        product = float((x[i] * x[j][found["permutation"].values[i, j].astype(int)]).sum())
        assert product == pytest.approx(float(found["product"][i, j]), rel=1e-6, abs=1e-6)


def test_surplus_locations_have_no_partner(layer, tmp_path):
    other = captured(tmp_path / "few.zarr", tokens(5, 4, seed=2), "few")
    found = all_pairs(layer, other, permutations=True)["permutation"].values
    assert ((found >= 0).sum(axis=2) == 4).all()
    with pytest.raises(MatchingError, match="score and pairs no locations"):
        all_pairs(layer, matching="late-interaction", permutations=True)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_extreme_sizes(tmp_path, scale):
    plain = all_pairs(captured(tmp_path / "a.zarr", tokens()), tile=TILE)
    scaled = all_pairs(captured(tmp_path / "b.zarr", tokens() * scale), tile=TILE)
    np.testing.assert_allclose(scaled["product"] / scale**2, plain["product"], rtol=1e-5)


@pytest.mark.slow
def test_every_executor_gives_the_same_bits(layer, database, tmp_path):
    for other in (None, database):
        expected = all_pairs(layer, other, tile=TILE, workers=1)
        for workers in (2, 4):
            assert_same(all_pairs(layer, other, tile=TILE, workers=workers), expected)
        context = multiprocessing.get_context("spawn")
        with ThreadPoolExecutor(3) as threads, ProcessPoolExecutor(2, mp_context=context) as processes:
            for k, executor in enumerate((threads, processes, Watching())):
                out = tmp_path / f"{other is None}-{k}.zarr"
                assert_same(all_pairs(layer, other, out, tile=TILE, executor=executor), expected)


def test_where_it_is_computed_twice_it_is_the_same(layer, tmp_path):
    assert_same(all_pairs(layer, tile=TILE), all_pairs(Capture.open(layer.where)["layer"], tile=TILE))


def test_threads_of_the_caller_stay_as_they_were(layer):
    before = torch.get_num_threads()
    found = []
    all_pairs(layer, tile=TILE)
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *found] == [before, before]


class Reversed(rsm_probe.matching.Matching):
    """A method of a user's own, which is no dataclass."""

    name, exact, symmetric, needs_affinity, growth = "reversed", False, True, True, 1.0

    def __init__(self, shift):
        self.shift = shift

    def permutation(self, affinity):
        return (np.arange(len(affinity))[::-1] + self.shift) % len(affinity)


def test_one_affinity_above_the_memory_is_refused_with_what_needs_none(tmp_path):
    large = captured(tmp_path / "c.zarr", tokens(3, 300, 2))
    with pytest.raises(
        CostError, match=r"one affinity of 300 x 300 .* 360 KB.*100 KB.*identity.*rewindowed"
    ) as refused:
        all_pairs(large, memory="100KB")
    all_pairs(large, memory=re.findall(r"memory= to at least '(.*)'", str(refused.value))[0])
    all_pairs(large, matching="identity", memory="100KB")


def test_tiles_that_do_not_fit_are_refused(layer):
    with pytest.raises(
        CostError, match=r"a tile of 20 x 20 images takes .* above the memory budget of 16\.8 MB"
    ) as refused:
        all_pairs(layer, memory="16.8MB", tile=20)
    all_pairs(layer, memory=re.findall(r"memory= to at least '(.*)'", str(refused.value))[0], tile=20)
    with pytest.raises(CostError, match="tile must be at least 1"):
        all_pairs(layer, tile=0)
    with pytest.raises(CostError, match="workers must be at least 1"):
        all_pairs(layer, workers=0)
    with pytest.raises(CostError, match="cannot run on device 'cuda:99'"):
        all_pairs(layer, device="cuda:99")


def test_wrong_places(layer, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="cannot write"):
        all_pairs(layer, out=tmp_path / "file" / "p.zarr")
    with pytest.raises(StorageError):
        all_pairs(layer, out=tmp_path / "file")
    with pytest.raises(StorageError, match="holds something else"):
        all_pairs(layer, out=tmp_path)
    with pytest.raises(StorageError, match="must be a store of kind 'pairs', found 'capture'"):
        all_pairs(layer, out=layer.where)
    with pytest.raises(StorageError, match="give out="):
        all_pairs(layer, executor=Watching())
    assert (tmp_path / "file").read_text() == "mine"


def test_wrong_arguments(layer, tmp_path):
    with pytest.raises(RepresentationError, match="takes layers of captures"):
        all_pairs(tokens())
    with pytest.raises(RepresentationError, match="differ in their channels"):
        all_pairs(layer, captured(tmp_path / "d.zarr", tokens(channels=3)))
    with pytest.raises(RepresentationError, match="channel-mean"):
        all_pairs(layer, captured(tmp_path / "e.zarr", tokens(locations=3)), centering="location-mean")
    with pytest.raises(RepresentationError, match="both tokens, or both layers"):
        rsm_probe.rsm(layer, tokens())
    with pytest.raises(RepresentationError, match="both tokens, or both layers"):
        rsm_probe.rsm(tokens(), layer)
    with pytest.raises(RepresentationError, match="know their own grid"):
        rsm_probe.rsm(layer, ids=["a"])
    with pytest.raises(RepresentationError, match=r"rsm_probe\.capture makes them"):
        rsm_probe.rsm(tokens(), out=tmp_path / "p.zarr")


def test_neither_workers_nor_cores_decide_the_size_of_a_tile(tmp_path):
    layer = captured(tmp_path / "c.zarr", tokens(300, 64, 16))
    sizes = {Plan.of(layer, layer, Auction(), False, Execution(workers=workers)).tile for workers in (1, 2, 16, 96)}
    assert len(sizes) == 1
    plan = Plan.of(layer, layer, Auction(), False, Execution(workers=96, memory="200MB"))
    assert plan.workers(plan.tile) * plan.tile_bytes(plan.tile) <= 200 * 10**6


def test_each_side_moves_along_its_own_grid(tmp_path):
    values = tokens(6, 12)
    sides = [captured(tmp_path / f"{grid}.zarr", values, grid=grid) for grid in ((3, 4), (2, 6))]
    with pytest.raises(MatchingError, match="grid"):
        all_pairs(*sides, matching="translation")
    expected = rsm_probe.rsm(values, matching="translation", kernel="linear", grid=(3, 4)).values
    np.testing.assert_allclose(all_pairs(sides[0], matching="translation")["product"], expected, rtol=1e-6)


def test_too_long_is_refused_before_it_begins(layer, tmp_path):
    with pytest.raises(CostError, match=r"190 pairs would take about .* above max_hours"):
        all_pairs(layer, max_hours=1e-9)


def test_reading_and_writing_tiles_count_where_matching_takes_no_time(layer):
    # 210 tiles of one image each
    with pytest.raises(CostError, match=r"190 pairs would take about"):
        all_pairs(layer, matching="identity", tile=1, max_hours=3 / 3600)
    assert all_pairs(layer, matching="identity", tile=20, max_hours=1).sizes == {"image_a": 20, "image_b": 20}


def test_a_cluster_that_does_not_answer():
    refused = pytest.raises(CostError, match="no Dask scheduler answers at tcp://127")
    with refused, cluster("tcp://127.0.0.1:1", patience=1):
        pass


def test_what_xarray_opens(layer, tmp_path):
    all_pairs(layer, out=tmp_path / "p.zarr", tile=TILE, centering="location-mean")
    found = xr.open_zarr(tmp_path / "p.zarr", chunks=None, consolidated=False)
    assert found["product"].dims == ("image_a", "image_b")
    assert float(found["product"].sel(image_a="image-3", image_b="image-3")) == pytest.approx(float(found["norm_a"][3]))
    assert found.attrs["centering"] == "location-mean"


def test_of_one_location_the_bound_is_the_product(tmp_path):
    pairs = all_pairs(captured(tmp_path / "c.zarr", tokens(5, 1)))
    np.testing.assert_array_equal(pairs["bound"].values, pairs["product"].values)


class Counting(Reversed):
    """Counts the pairs that it is given."""

    calls = 0

    def permutation(self, affinity):
        type(self).calls += 1
        return super().permutation(affinity)


def test_pairs_are_timed_only_for_those_who_are_told(layer, capsys):
    counts = []
    for options in ({"max_hours": None}, {"max_hours": None, "progress": True}, {}):
        before = Counting.calls
        all_pairs(layer, matching=Counting(0), workers=1, **options)
        counts.append(Counting.calls - before)
    assert counts[0] == 190
    assert counts[1] == counts[2] > 190


@pytest.mark.parametrize("options", [{"tile": 2.5}, {"tile": "a"}, {"workers": "2"}])
def test_numbers_that_are_no_whole_ones_are_refused(layer, options):
    with pytest.raises(CostError, match="must be a whole number, found"):
        all_pairs(layer, **options)
