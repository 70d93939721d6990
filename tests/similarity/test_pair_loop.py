"""One pair loop: bounds and permutations in every reduction, preparation, and one decision about the device."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from stores import captured

from rsm_probe import all_pairs, match, nearest, rsm
from rsm_probe.errors import MatchingError, RepresentationError
from rsm_probe.execution.execution import Execution
from rsm_probe.matching.cpu_or_gpu import Workload
from rsm_probe.matching.matching import Solution
from rsm_probe.matching.methods.greedy import TopKGreedy
from rsm_probe.matching.methods.library_solvers import ScipyAssignment
from rsm_probe.matching.methods.translation import Translation
from rsm_probe.matching.registry import get_matching
from rsm_probe.pairs.affinities import BLOCK_BYTES, BlockMemory
from rsm_probe.pairs.matcher import PairMatcher
from rsm_probe.pairs.pair_loop import PairLoop
from rsm_probe.pairs.sides import Side
from rsm_probe.probe.representation import Representation

METHODS = ["optimal", "identity", "scipy", TopKGreedy(4), "rewindowed", Translation((4, 4))]


def tokens(images=5, locations=16, seed=0, channels=6):
    return torch.randn(images, locations, channels, generator=torch.Generator().manual_seed(seed)) + 0.3


def representation(values, grid=(4, 4)):
    return Representation(values, values[:, :0], grid)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("others", [None, 4])
def test_tokens_have_the_bounds_and_permutations_that_tiles_on_disk_have(method, others, tmp_path):
    x = tokens()
    y = None if others is None else tokens(others, seed=1)
    columns = None if y is None else captured(tmp_path / "y.zarr", y)
    expected = all_pairs(captured(tmp_path / "x.zarr", x), columns, None, method, permutations=True)
    found = rsm(x, y, method, "linear", permutations=True).dataset
    for name in ("product", "bound"):
        np.testing.assert_allclose(found[name].values, expected[name].values, rtol=1e-6)
    assert (found["bound"] >= found["product"]).all()
    certified = get_matching(method)[0] in ("optimal", "rewindowed")
    assert np.isfinite(found["bound"].values).any() == (y is None or certified)
    assert found["permutation"].dims == ("image_a", "image_b", "location")
    np.testing.assert_array_equal(found["permutation"].values, expected["permutation"].values)
    assert found["permutation"].dtype == expected["permutation"].dtype


def test_bounds_are_kept_and_permutations_only_where_they_are_asked_for(tmp_path):
    x, y = tokens(3, 9), tokens(4, 16, seed=1)
    found = rsm(x, y, "optimal", permutations=True)
    for i, j in np.ndindex(3, 4):
        partners = found.dataset["permutation"].values[i, j]
        assert len(set(partners)) == 9
        product = float((x[i].double() * y[j].double()[partners]).sum())
        assert found.dataset["product"].values[i, j] == pytest.approx(product, rel=1e-6)
    plain = rsm(x, y, "optimal")
    assert "permutation" not in plain.dataset
    np.testing.assert_array_equal(plain.dataset["bound"].values, found.dataset["bound"].values)
    layers = captured(tmp_path / "x.zarr", x), captured(tmp_path / "y.zarr", y)
    assert rsm(*layers, permutations=True).dataset["permutation"].shape == (3, 4, 9)
    with PairMatcher(Execution(workers=1)) as matcher:  # as a sweep uses it
        known = matcher.submit(x, y, {"optimal": get_matching("optimal")[1]}).matched()["optimal"]
    assert known.bounds is None
    assert known.permutations is None


def test_permutations_of_scores_and_of_nothing_are_refused():
    with pytest.raises(MatchingError, match="late-interaction is a score and pairs no locations"):
        rsm(tokens(), None, "late-interaction", "linear", permutations=True)
    with pytest.raises(RepresentationError, match="permutations must be True or False, found 'all'"):
        rsm(tokens(), permutations="all")


def test_representations_are_taken_with_their_grids():
    x, y = tokens(), tokens(4, seed=1)
    shifts = Translation((4, 4))
    np.testing.assert_array_equal(
        rsm(representation(x), representation(y), "translation").values, rsm(x, y, shifts).values
    )
    np.testing.assert_array_equal(rsm(representation(x), matching="translation"), rsm(x, matching=shifts))
    without = representation(x, None)
    np.testing.assert_array_equal(rsm(without, matching="translation", grid=(4, 4)), rsm(x, None, shifts))
    found, expected = nearest(representation(x), representation(y), 2, "translation"), nearest(x, y, 2, shifts)
    np.testing.assert_array_equal(found["index"], expected["index"])
    np.testing.assert_array_equal(found["similarity"], expected["similarity"])
    with pytest.raises(MatchingError, match="the grid of these 16 locations is unknown"):
        rsm(representation(x), representation(y, None), "translation")
    with pytest.raises(RepresentationError, match=r"z is a representation with the grid \(4, 4\); leave grid= out"):
        rsm(representation(x), matching="translation", grid=(2, 8))
    with pytest.raises(RepresentationError, match="first in image 2"):
        rsm(representation(torch.where(torch.arange(5)[:, None, None] == 2, torch.nan, x)))


@dataclass(frozen=True)
class Prepared(ScipyAssignment):
    """Exact matching that reads what it prepared, and counts how often it did so for how many images."""

    seen: list = field(default_factory=list)

    def prepare(self, images):
        self.seen.append(len(images))
        return images.tokens.double().sum(dim=(1, 2)).cpu().numpy()

    def solve(self, pairs):
        x, y = pairs.prepared_by(self)
        solution = super().solve(pairs)
        return Solution(x[pairs.rows] + y[pairs.columns], solution.permutations, solution.bounds, solution.solvers)


@dataclass(frozen=True)
class OneWay(Prepared):
    """The same, seen from x only."""

    symmetric = False

    def solve(self, pairs):
        x, y = pairs.prepared_by(self)
        solution = ScipyAssignment().solve(pairs)
        return Solution(
            2 * x[pairs.rows] + y[pairs.columns] + 100, solution.permutations, solution.bounds, solution.solvers
        )


def test_what_a_method_prepares_is_handed_back_to_it_once_for_all_pairs(tmp_path):
    method = Prepared()
    x, y = tokens().abs(), tokens(4, seed=1).abs()
    sums = [part.double().sum(dim=(1, 2)).numpy() for part in (x, y)]
    # Values are stored as the identity's product plus what is gained over it.
    np.testing.assert_allclose(rsm(x, y, method, "linear").values, sums[0][:, None] + sums[1], rtol=1e-6)
    assert method.seen == [5, 4]
    method.seen.clear()
    rsm(x, None, method, "linear", workers=3, memory=16 * 16 * 4)
    assert method.seen == [5]
    method.seen.clear()
    layers = captured(tmp_path / "x.zarr", x), captured(tmp_path / "y.zarr", y)
    found = all_pairs(*layers, matching=method, tile=5, workers=1, max_hours=None)["product"].values
    np.testing.assert_allclose(found, sums[0][:, None] + sums[1], rtol=1e-6)
    assert method.seen == [5, 4]
    assert match(x[0], y[0], method).permutation is not None
    # From the other side, what was prepared has changed sides.
    turned = rsm(x, y, OneWay(), "linear").values
    a, b = sums[0][:, None], sums[1]
    np.testing.assert_allclose(turned, np.maximum(2 * a + b, a + 2 * b) + 100, rtol=1e-6)


@dataclass(frozen=True)
class Asked(ScipyAssignment):
    """Exact matching that remembers for which work it was asked where to run."""

    asked: list = field(default_factory=list)

    def on_device(self, device, dtype, locations, pairs):
        self.asked.append((locations, pairs))
        return False


def test_where_pairs_are_solved_is_decided_once_by_the_whole_work():
    x, y, method = tokens(6), tokens(5, 9, seed=1), Asked()
    rsm(x, None, method, workers=2)
    assert method.asked == [(16, 15)]
    method.asked.clear()
    rsm(x, y, method)
    assert method.asked == [(16, 30)]
    method.asked.clear()
    nearest(x, y, 2, method, memory="20KB")
    assert set(method.asked) == {(16, 30)}
    assert Workload.of((6, 9, 3)) == Workload(15, 9)
    assert Workload.of((6, 9, 3), (5, 16, 3)) == Workload(30, 16)


def test_the_memory_of_solved_blocks_is_reused_by_later_ones():
    z, methods = tokens(images=12, locations=600), {"optimal": get_matching("optimal")[1]}  # 66 pairs of 1.4 MB
    memory, side = BlockMemory(), Side.of(z)
    loop = PairLoop(side, side, methods, solved=memory)
    loop.fill_all()
    assert memory.allocated == 5 * 4 * 600**2  # the largest block
    budget = 3 * BLOCK_BYTES
    with PairMatcher(Execution(workers=2, memory=budget)) as matcher:
        for _ in range(2):
            matched = matcher.submit(z, None, methods).result()["optimal"]
        assert 0 < matcher.reused.allocated <= budget
    np.testing.assert_array_equal(matched, loop.matrices["optimal"].completed().products)


def test_memory_of_blocks_is_reused_in_and_out_of_inference_mode():
    memory, sides = BlockMemory(), [Side.of(tokens(locations=count, seed=count)) for count in (40, 1500, 40)]
    values = []
    for inference, side in zip((True, False, True), sides, strict=True):
        with torch.inference_mode(inference):
            loop = PairLoop(side, side, {"optimal": get_matching("optimal")[1]}, solved=memory)
            loop.fill_all()
        values.append(loop.matrices["optimal"].completed().products)
    np.testing.assert_array_equal(values[0], values[2])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of this process from /proc")
def test_memory_of_blocks_returns_to_the_operating_system():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    # The C library keeps whatever is smaller than the largest memory that was freed before.
    torch.ones(6 << 20)
    memory, lasting, before = BlockMemory(), [], resident()
    taken = []
    for _ in range(40):
        taken.append(memory.take(BLOCK_BYTES))
        taken[-1].fill_(1)
        lasting.append(np.ones(4000))  # results that last lie between the blocks
    assert resident() > before + 39 * BLOCK_BYTES
    for buffer in taken:
        memory.give_back(buffer)
    del taken, buffer, memory
    assert resident() < before + 4 * BLOCK_BYTES
