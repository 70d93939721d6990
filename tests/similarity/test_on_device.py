"""Pairs that a device matches, with its kernel interpreted where there is none: the CPU's values in any blocks."""

import itertools
import threading
import time
import warnings
import weakref
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stores import Watching, assert_same, captured

from rsm_probe import all_pairs, nearest, rsm
from rsm_probe.errors import CostError, ModelError
from rsm_probe.execution import devices, executors
from rsm_probe.execution.devices import block_bytes, find_device, in_halves
from rsm_probe.execution.execution import Execution
from rsm_probe.matching.methods.greedy import Greedy
from rsm_probe.matching.methods.identity import Identity
from rsm_probe.matching.methods.library_solvers import ScipyAssignment
from rsm_probe.matching.methods.optimal import Auction
from rsm_probe.pairs.affinities import Affinities
from rsm_probe.pairs.device_cache import DeviceCache
from rsm_probe.pairs.matcher import PairMatcher
from rsm_probe.pairs.pair_loop import PairLoop, match_sides
from rsm_probe.pairs.sides import Side
from rsm_probe.pairs.timing import seconds_per_pair

pytestmark = pytest.mark.gpu
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter takes milliseconds for a bid.
GAP = 1e-3
DEVICE, CPU = Auction(GAP, where="device"), Auction(1e-9, where="cpu")
# Without estimates, which match some pairs more.
pairs_on_device = partial(all_pairs, matching=DEVICE, device=HERE.type, max_hours=None)
METHODS = {"optimal": DEVICE, "identity": Identity(), "greedy": Greedy(), "exact": CPU}


def tokens(images, locations, seed=0, channels=3):
    return torch.randn(images, locations, channels, generator=torch.Generator().manual_seed(seed)).to(HERE)


def products_of(x, y=None, methods=METHODS, on_pairs=lambda count: None, block_memory=None, **options):
    with PairMatcher(Execution(**options), on_pairs, block_memory) as matcher:
        return matcher.submit(x, y, methods).result()


def norms(x, y):
    return np.outer(*(side.flatten(1).norm(dim=1).cpu().numpy() for side in (x, y)))


def assert_close(found, exact, x, y):
    scale = norms(x, y)
    assert (found <= exact + 1e-6 * scale).all()
    assert (found >= exact - (GAP + 1e-6) * scale).all()


@pytest.mark.slow
@pytest.mark.parametrize("others", [None, (3, 4), (3, 6)])
def test_a_device_and_cpu_threads_match_the_same_pairs_side_by_side(others):
    x = tokens(4, 4)
    y = x if others is None else tokens(*others, seed=1)
    counts = []
    found = products_of(x, None if others is None else y, workers=2, on_pairs=counts.append)
    assert sum(counts) == (6 if others is None else 12)
    assert_close(found["optimal"], found["exact"], x, y)
    assert (found["optimal"] >= found["identity"]).all()
    if others is None:
        np.testing.assert_array_equal(found["optimal"], found["optimal"].T)


def test_blocks_for_a_device_hold_every_pair_once_and_are_full():
    x, y = Side.of(torch.zeros(7, 5, 2)), Side.of(torch.zeros(4, 5, 2))
    for own, diagonal, expected in (
        (x, False, [(i, j) for j in range(7) for i in range(j + 1, 7)]),
        (x, True, [(i, j) for j in range(7) for i in range(j, 7)]),
        (y, False, [(i, j) for j in range(4) for i in range(7)]),
    ):
        blocks = list(Affinities(x, own, on_device=True, block_memory=10 * 5 * 5 * 4).all_pairs(diagonal))
        assert [pair for rows, columns in blocks for pair in zip(rows, columns, strict=True)] == expected
        assert all(len(rows) <= 10 for rows, _ in blocks)
        assert all(len(a[0]) + np.sum(b[1] == b[1][0]) > 10 for a, b in itertools.pairwise(blocks))
    # A block for the CPU is of one image of y.
    assert all(len(set(columns)) == 1 for _, columns in Affinities(x, y).all_pairs())


def test_affinities_of_any_pairs_are_inner_products_of_locations():
    x, y = tokens(5, 4), tokens(3, 6, seed=1)
    rows, columns = np.array([0, 1, 2, 4, 3, 3]), np.array([0, 0, 0, 0, 2, 1])
    source = Affinities(Side.of(x), Side.of(y), on_device=True)
    expected = [(x[i].double() @ y[j].double().T).cpu().numpy() for i, j in zip(rows, columns, strict=True)]
    for one_by_one in (False, True):
        found = source.block(rows, columns, one_by_one).affinity()
        assert isinstance(found, torch.Tensor)
        np.testing.assert_allclose(found.cpu(), expected, atol=1e-5)
    on_cpu = Affinities(Side.of(x), Side.of(y)).block(rows, columns).affinity()
    assert isinstance(on_cpu, np.ndarray)
    np.testing.assert_allclose(on_cpu, expected, atol=1e-5)


@pytest.mark.parametrize("pairs", [1, 2])
def test_the_size_of_a_device_does_not_change_the_result(pairs):
    x = tokens(4, 3)
    ample = products_of(x, methods={"optimal": DEVICE})
    tight = products_of(x, methods={"optimal": DEVICE}, workers=2, block_memory=pairs * 3 * 3 * 4)
    np.testing.assert_allclose(tight["optimal"], ample["optimal"], atol=GAP * norms(x, x).max())


class Memory:
    """Makes affinities for as many pairs as a device has room for, counting those that somebody still holds."""

    def __init__(self, monkeypatch, room):
        self.room, self.held, self.most = room, 0, 0
        self._products = Affinities._products
        monkeypatch.setattr(Affinities, "_products", lambda source, rows, *rest: self.make(source, rows, *rest))

    def make(self, source, rows, *rest):
        if self.held + len(rows) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        values = self._products(source, rows, *rest)
        self.held += len(rows)
        self.most = max(self.most, self.held)
        weakref.finalize(values, self.give_back, len(rows))
        return values

    def give_back(self, pairs):
        self.held -= pairs


@pytest.mark.parametrize("path", ["in memory", "tiles", "search"])
@pytest.mark.slow
def test_a_device_that_is_out_of_memory_gets_half_of_the_pairs_and_says_so(monkeypatch, tmp_path, path):
    x, y = tokens(5, 3).cpu(), tokens(3, 3, seed=1).cpu()
    layers = captured(tmp_path / "x.zarr", x), captured(tmp_path / "y.zarr", y)
    work = {
        "in memory": lambda: products_of(x.to(HERE), y.to(HERE), methods={"optimal": DEVICE})["optimal"],
        "tiles": lambda: pairs_on_device(*layers, tile=4)["product"].values,
        "search": lambda: nearest(*layers, k=3, matching=DEVICE, device=HERE.type)["product"].values,
    }[path]
    ample = work()
    # Two halves of a block do not fit at once, either: each must be given back before the next.
    memory = Memory(monkeypatch, room=4)
    with pytest.warns(UserWarning, match="out of memory: splitting a block of [0-9]+ pairs of images in two"):
        np.testing.assert_allclose(work(), ample, atol=GAP * norms(x, y).max())
    assert 1 < memory.most <= 4
    memory.room = 0
    with pytest.raises(CostError, match="too small even for one pair of images: CUDA out of memory"):
        work()


def test_what_is_being_matched_is_waited_for_before_anything_is_halved(monkeypatch):
    x = tokens(6, 3)
    exact = products_of(x, methods={"slow": ScipyAssignment()})["slow"]
    memory = Memory(monkeypatch, room=5)

    @dataclass(frozen=True)
    class SlowOnDevice(ScipyAssignment):
        def on_device(self, device, dtype, locations, pairs):
            return True

        def solve(self, pairs):
            time.sleep(0.05)
            return super().solve(pairs)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = products_of(x, methods={"slow": SlowOnDevice()}, workers=2, block_memory=5 * 3 * 3 * 4)["slow"]
    np.testing.assert_allclose(found, exact, rtol=1e-6)
    assert memory.most == 5


@pytest.mark.slow
def test_no_more_than_two_blocks_are_held_at_a_time(monkeypatch):
    memory, x, four_pairs = Memory(monkeypatch, room=1000), tokens(8, 3), 4 * 3 * 3 * 4
    products_of(x, methods={"optimal": DEVICE}, workers=2, block_memory=four_pairs)
    assert 4 < memory.most <= 8
    memory.most = 0
    side = Side.of(x)
    PairLoop(side, side, {"optimal": DEVICE}, block_memory=four_pairs).fill_all()  # as tiles are filled
    assert 0 < memory.most <= 4


@dataclass(frozen=True)
class Hungry(ScipyAssignment):
    """Has room for two pairs at a time."""

    def solve(self, pairs):
        if len(pairs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().solve(pairs)


def test_what_a_device_has_no_room_to_solve_is_solved_in_halves():
    x = tokens(6, 4)
    with pytest.warns(UserWarning, match="out of memory"):
        found = products_of(x, methods={"hungry": Hungry(), "exact": ScipyAssignment()})
    np.testing.assert_array_equal(found["hungry"], found["exact"])


def up_to_three(start, stop):
    if stop - start > 3:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return start, stop


def test_halves_come_in_order_and_other_errors_pass():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert list(in_halves(up_to_three, 10)) == [(0, 2), (2, 5), (5, 7), (7, 10)]
    assert len(said) == 3
    with pytest.raises(ZeroDivisionError):
        list(in_halves(lambda start, stop: 1 // 0, 4))


@pytest.mark.slow
def test_tiles_and_search_on_a_device_give_what_the_cpu_gives(tmp_path):
    x, y = tokens(5, 4).cpu(), tokens(4, 4, seed=1).cpu()
    layer, other = captured(tmp_path / "x.zarr", x), captured(tmp_path / "y.zarr", y)
    found, exact = (all_pairs(layer, other, matching=m, permutations=True, max_hours=None) for m in (DEVICE, CPU))
    assert_close(found["product"].values, exact["product"].values, x, y)
    assert (found["bound"].values >= exact["product"].values - 1e-9).all()
    assert (found["bound"].values - found["product"].values <= GAP * norms(x, y) * (1 + 1e-5)).all()
    assert (np.sort(found["permutation"].values, axis=2) == np.arange(4)).all()
    near, expected = (nearest(layer, other, k=4, matching=m, kernel="linear") for m in (DEVICE, CPU))
    gap = GAP * norms(x, y).max()
    np.testing.assert_allclose(near["product"], expected["product"], atol=2 * gap)
    of_tiles = np.take_along_axis(found["product"].values, near["index"].values, axis=1)
    np.testing.assert_allclose(near["product"], of_tiles, atol=gap)


def test_half_precision_moves_values_by_less_than_it_says_and_bounds_allow_for_it(tmp_path):
    x, y = tokens(6, 16, channels=8) * 1e4, tokens(5, 16, seed=1, channels=8) * 1e-4
    exact = products_of(x, y, methods={"o": CPU})["o"]
    half = products_of(x, y, methods={"o": Auction(precision="float16")})["o"]
    error = np.abs(half - exact) / norms(x, y)
    assert 0 < error.max() < 1e-3
    layer, other = captured(tmp_path / "x.zarr", x.cpu()), captured(tmp_path / "y.zarr", y.cpu())
    pairs = all_pairs(layer, other, matching=Auction(precision="float16"), out=tmp_path / "p.zarr")
    assert (pairs["bound"].values >= exact).all()
    assert (pairs["bound"].values - exact <= 2.1e-3 * norms(x, y)).all()
    near = nearest(layer, other, k=5, kernel="linear", matching=Auction(precision="float16"))
    np.testing.assert_allclose(-np.sort(-exact, axis=1), near["product"], atol=1e-3 * norms(x, y).max())
    # Numbers of another precision are another result.
    with pytest.raises(OSError, match=r"precision='float16'"):
        all_pairs(layer, other, out=tmp_path / "p.zarr")


def test_bounds_in_half_precision_hold_where_rounding_is_at_its_worst():
    just_above = 1 + 2**-11 - 1e-5  # rounded down by all but half of a unit
    x = torch.tensor([[[just_above], [-just_above]]])
    exact = 2 * just_above**2
    pairs = match_sides(Side.of(x), Side.of(-x), Auction(precision="float16"))
    assert abs(pairs.products[0, 0] - exact) > 1e-3
    assert pairs.bounds[0, 0] >= exact


def test_who_matches_is_settled_by_the_whole_work_and_not_by_its_parts(tmp_path):
    solved = []

    @dataclass(frozen=True)
    class ManyOnDevice(ScipyAssignment):
        """Goes to the device where there are as many pairs as the whole work has."""

        def on_device(self, device, dtype, locations, pairs):
            return pairs >= 136

        def solve(self, pairs):
            assert isinstance(pairs.affinity, torch.Tensor), "a part of the work went to the CPU"
            solved.append(len(pairs))
            return super().solve(pairs)

    x = tokens(17, 2).cpu()
    layer = captured(tmp_path / "x.zarr", x)
    all_pairs(layer, matching=ManyOnDevice(), tile=5, max_hours=None)  # which would time some before
    assert sum(solved) == 136
    assert max(solved) <= 25
    solved.clear()
    products_of(x.to(HERE), methods={"many": ManyOnDevice()}, block_memory=7 * 2 * 2 * 4)
    assert sum(solved) == 136
    assert max(solved) <= 7
    nearest(layer, layer, k=2, matching=ManyOnDevice())


def test_a_global_switch_to_fast_products_does_not_reach_ours():
    device = torch.device("cuda")
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with devices.full_precision(device), devices.full_precision(device):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    with torch.autocast("cpu", dtype=torch.bfloat16), devices.full_precision(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_an_estimate_for_a_device_times_as_many_pairs_as_it_matches_at_once(monkeypatch):
    seen = []

    @dataclass(frozen=True)
    class Counting(Auction):
        def solve(self, pairs):
            seen.append((len(pairs), isinstance(pairs.affinity, torch.Tensor)))
            return ScipyAssignment().solve(pairs)

    x = tokens(3, 4)
    assert seconds_per_pair(x, Counting(where="device"), at_once=7) > 0
    assert seen == [(7, True)] * 2
    seen.clear()
    assert seconds_per_pair(x, Counting(where="cpu"), at_once=7) > 0
    # On the CPU a few, once untimed, and where they are fast as many as are matched at once.
    assert seen[:2] == [(3, False)] * 2
    assert set(seen[2:]) <= {(7, False)}


def test_devices_by_name(monkeypatch):
    assert find_device(None) == find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == HERE.type
    for name in ("cuda:99", "gpu", "mps:7"):
        with pytest.raises(ModelError, match=rf'cannot run on device \'{name}\'; use "cpu", or "auto"'):
            find_device(name, ModelError)
    made = []
    monkeypatch.setattr(torch, "zeros", lambda *size, device: made.append(device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # Without a number: the current one of each thread that uses it.
    assert find_device("auto") == torch.device("cuda")
    assert made == [torch.device("cuda")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert find_device("auto") == torch.device("mps")


def test_a_device_gets_blocks_of_an_eighth_of_what_pytorch_may_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=16 << 30))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_getMemoryFraction", [0.25, 0.5].__getitem__, raising=False)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    assert block_bytes(torch.device("cuda")) == 1 << 30
    assert devices.token_bytes(torch.device("cuda")) == 4 << 30
    assert devices.token_bytes(torch.device("cuda:0")) == 2 << 30


def test_every_thread_gets_a_gpu_of_its_own(monkeypatch):
    bound, together = [], threading.Barrier(4, timeout=10)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", bound.append)
    assert executors.device_workers(torch.device("cuda")) == 4
    assert executors.device_workers(torch.device("cuda:1")) == executors.device_workers(torch.device("cpu")) == 1
    with executors.threads(4, torch.device("cuda")) as pool:
        list(pool.map(lambda _: together.wait(), range(4)))
    assert sorted(bound) == [0, 1, 2, 3]
    for named in (torch.device("cuda:1"), torch.device("cpu"), None):
        with executors.threads(4, named) as pool:
            list(pool.map(lambda _: together.wait(), range(4)))
    assert len(bound) == 4


def test_tokens_are_moved_once_while_there_is_room():
    read, held = [], DeviceCache(lambda device: 3 * 4)

    def get(key, device="meta"):
        return held.get(key, lambda: read.append(key) or torch.zeros(1), torch.device(device))

    assert [get(key).device.type for key in "abcab"] == ["meta"] * 5
    assert read == ["a", "b", "c"]
    # c is not asked for any more, and makes room.
    for key in "dabdab":
        get(key)
    assert read == ["a", "b", "c", "d"]
    get("c")
    assert read == ["a", "b", "c", "d", "c"]
    get("a", "cpu")
    get("a", "cpu")  # what is in main memory already is not held twice
    assert read[-2:] == ["a", "a"]


@pytest.mark.skipif(HERE.type == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("size", [49, 64, 256])
def test_on_cuda_kernel_and_threads_agree_with_the_cpu(size):
    x, y = tokens(40, size, channels=32), tokens(30, size, seed=1, channels=32)
    methods = {"device": Auction(where="device"), "threads": Auction(where="cpu"), "auto": Auction()}
    found = products_of(x, y, methods)
    expected = products_of(x.cpu(), y.cpu(), {"cpu": Auction(1e-9)})["cpu"]
    for name in methods:
        np.testing.assert_allclose(found[name], expected, atol=3e-6 * norms(x, y).max(), err_msg=name)
    np.testing.assert_array_equal(rsm(x, y).values, rsm(x, y).values)


@pytest.mark.parametrize("damage", [None, "product/c/0/1"])
@pytest.mark.slow
def test_what_a_device_began_it_continues_to_the_same_bits(tmp_path, damage):
    layer, out = captured(tmp_path / "x.zarr", tokens(6, 3).cpu()), tmp_path / "p.zarr"
    run = partial(pairs_on_device, layer, tile=3)
    expected = run()
    if damage is None:  # interrupted after the first of three tiles
        with pytest.raises(RuntimeError, match="power"):
            run(out=out, executor=Watching(1, RuntimeError("power")))
    else:
        run(out=out)
        (out / damage).unlink()
    assert_same(run(out=out), expected)


def test_nearest_images_of_captures_on_the_default_device_are_those_of_all_pairs(tmp_path):
    x, y = (
        captured(tmp_path / f"{name}.zarr", tokens(count, 4, seed=count).cpu()) for name, count in (("x", 3), ("y", 9))
    )
    near, pairs = nearest(x, y, k=2, kernel="linear"), all_pairs(x, y)["product"].values
    np.testing.assert_array_equal(near["index"].values, np.argsort(-pairs, axis=1, kind="stable")[:, :2])
