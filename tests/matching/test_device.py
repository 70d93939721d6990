"""The device's kernel, interpreted where there is no device: values, certificates, batches, and what falls back."""

import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from test_auction import FAMILIES, FLOAT32_ROUNDING, GAP, SLACK, family, optimum_and_reference
from test_windows import batch_optimal_by_hand

from rsm_probe import match_affinity
from rsm_probe.errors import MatchingError
from rsm_probe.matching.compiled import gpu_batches as device
from rsm_probe.matching.compiled.gpu_batches import LARGEST, solve_on_device
from rsm_probe.matching.matching import Locations, Pairs
from rsm_probe.matching.methods import optimal as auction
from rsm_probe.matching.methods.batch_optimal import BatchOptimal
from rsm_probe.matching.methods.optimal import Auction
from rsm_probe.matching.methods.rewindowed import Rewindowed

pytestmark = pytest.mark.gpu
ON_CUDA = torch.cuda.is_available()
HERE = torch.device("cuda" if ON_CUDA else "cpu")
# The same families on a GPU and in the interpreter, which takes milliseconds for a bid, and a small gap many bids.
SIZES = [
    ((64, 64), GAP), ((100, 100), GAP), ((513, 513), GAP), ((300, 500), GAP), ((1024, 1024), GAP), ((9, 1), GAP)
] if ON_CUDA else [((6, 6), GAP), ((3, 5), 1e-2), ((5, 3), 1e-2)]  # fmt: skip


def on_device(*affinities):
    return torch.from_numpy(np.stack(affinities)).to(HERE)


def assert_optimal(found, affinity, gap=GAP):
    optimum, reference = optimum_and_reference(affinity)
    rows = np.flatnonzero(found.permutation >= 0)
    assert len(rows) == len(set(found.permutation[rows].tolist())) == min(affinity.shape)
    np.testing.assert_array_equal(found.affinities[rows], affinity[rows, found.permutation[rows]])
    assert abs(found.value - found.affinities[rows].sum()) <= SLACK * reference
    assert abs(found.value - optimum) <= max(FLOAT32_ROUNDING, gap) * reference
    assert found.bound >= optimum - SLACK * reference
    assert found.gap <= gap * reference * (1 + 1e-6) or found.solver == "scipy"


@pytest.mark.slow
@pytest.mark.parametrize(("size", "gap"), SIZES)
def test_every_family_is_solved_and_certified_by_the_kernel_in_one_batch(size, gap):
    affinities = [family(name, *size, np.float32) for name in FAMILIES]
    answers = match_affinity(on_device(*affinities), Auction(gap, where="device"))
    for found, affinity, name in zip(answers, affinities, FAMILIES, strict=True):
        assert_optimal(found, affinity, gap)
        # On large ones, float32 prices cannot prove everything; what they leave is finished on the CPU.
        assert found.solver == "auction-device" or ON_CUDA, name


# Beyond 1e15, or altogether below 1e-15, nothing is for the kernel; the last two lie within its range.
@pytest.mark.parametrize("size", [1e28, 2e15, 5e-16, 1e-30, 9e14, 2e-15])
@pytest.mark.parametrize(
    ("locations", "gap"),
    SIZES[:4] if ON_CUDA else [((5, 4), GAP), pytest.param((2, 3), GAP, marks=pytest.mark.slow)],
)
@pytest.mark.slow
def test_every_family_has_a_valid_bound_at_the_ends_of_the_range(locations, gap, size):
    plain = [family(name, *locations) for name in FAMILIES]
    affinities = [(each / (np.abs(each).max() or 1.0) * size).astype(np.float32) for each in plain]
    beyond = not 1e-15 < size < 1e15
    # A loose gap besides, so that values are not the optimum, and only the bound knows it.
    for asked in {gap, 1e-2} if beyond else {1e-2}:
        short = 0
        answers = match_affinity(on_device(*affinities), Auction(asked, where="device"))
        for found, affinity, name in zip(answers, affinities, FAMILIES, strict=True):
            scaled = affinity.astype(np.float64) / size
            optimum, reference = optimum_and_reference(scaled)
            assert found.bound / size >= optimum - SLACK * reference, name
            assert found.value / size <= optimum + SLACK * reference, name
            assert found.gap / size <= asked * reference * (1 + 1e-6) or found.solver == "scipy", name
            assert (found.solver == "auction-device") != (beyond and bool(affinity.any())) or ON_CUDA, name
            short += found.value / size < optimum - 1e-9 * reference
        assert short or asked < 1e-2 or not beyond, "every value is the optimum: this test could not fail"


def test_dead_locations_are_set_aside_where_nothing_is_negative():
    rng = np.random.default_rng(0)
    living = rng.random((6, 6), np.float32) + 0.1
    half = living * np.outer(np.arange(6) % 2, np.arange(6) > 1).astype(np.float32)
    signed = half * np.where(np.arange(6) == 3, -1, 1).astype(np.float32)
    for found, affinity in zip(match_affinity(on_device(living, half, signed), Auction(1e-3, where="device")),
                               (living, half, signed), strict=True):  # fmt: skip
        assert_optimal(found, affinity, 1e-3)
    batch = on_device(living, half, signed)
    order, aside, counts, permutations = device.live_lines(batch, batch.amin(dim=(1, 2)))
    # Three rows and four columns of the second live; the third has something negative, and keeps everything.
    assert counts.tolist() == [6, 4, 6]
    assert order[1, :3].tolist() == [1, 3, 5]
    assert aside.sum(dim=1).tolist() == [0, 2, 0]
    assert permutations[1, order[1, 4:].long()].tolist() == aside[1].nonzero().flatten().tolist()


def test_what_the_kernel_cannot_prove_is_finished_on_the_cpu():
    affinity = family("normal", 5, 5, np.float32)
    rescued = match_affinity(on_device(affinity), Auction(bids_per_row=1, where="device"))[0]
    assert rescued.solver == "scipy"
    assert_optimal(rescued, affinity)
    # Prices in float32 carry some 1e-7 of the range, so a gap of 1e-12 needs more.
    finer = match_affinity(on_device(affinity, affinity), Auction(1e-12, where="device"))
    assert {found.solver for found in finer} == {"auction-float64"}
    assert_optimal(finer[0], affinity, 1e-12)


def test_bounds_hold_where_the_bids_ran_out():
    affinities = [family(name, 5, 5, np.float32) for name in ("normal", "features", "lognormal")]
    _, values, bounds, certified, bids = solve_on_device(on_device(*affinities), np.zeros(3), GAP, 2)
    assert not certified.any()
    assert (bids == 2 * 5).all()
    assert np.isneginf(values).all()
    for affinity, bound in zip(affinities, bounds, strict=True):
        optimum, reference = optimum_and_reference(affinity)
        assert bound >= optimum - SLACK * reference


def test_affinities_beyond_the_range_of_the_kernel_are_solved_on_the_cpu():
    normal = family("normal", 4, 4, np.float32)
    batch = on_device(normal * np.float32(1e30), normal, normal * np.float32(1e-30))
    for found, unit in zip(match_affinity(batch, Auction(where="device")), (1e30, 1, 1e-30), strict=True):
        assert found.solver == ("auction-device" if unit == 1 else "auction")
        assert_optimal(found, normal * np.float32(unit))


def test_equal_locations_are_kept_where_they_add_up_to_more_than_what_a_loose_gap_allows():
    affinity = np.float32(1) + np.eye(5, dtype=np.float32) / 100
    found = match_affinity(on_device(affinity), Auction(0.5, where="device"))[0]
    assert found.permutation.tolist() == list(range(5))
    assert found.value == pytest.approx(5.05)


def test_the_gap_is_relative_to_the_norms_where_tokens_are_known():
    x, y = (torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(k)).to(HERE) for k in (0, 1))
    numbers, images = np.arange(2), (Locations(x), Locations(y))
    pairs = Pairs(numbers, numbers, *images, torch.bmm(x, y.mT))
    found = Auction(1e-4, where="device").solve(pairs)
    assert (found.bounds - found.values <= 1e-4 * pairs.scales()).all()
    assert (found.bounds - found.values > 1e-6 * pairs.scales()).any()


@pytest.mark.parametrize(("count", "others", "window"), [(7, 7, 3), (7, 5, 3), (4, 6, 9)])
def test_windows_are_a_batch_of_small_problems(count, others, window):
    x, y = (torch.randn(3, size, 4, generator=torch.Generator().manual_seed(size)) for size in (count, others))
    rows, columns = np.array([2, 0, 1]), np.array([0, 0, 2])
    pairs = Pairs(rows, columns, Locations(x.to(HERE)), Locations(y.to(HERE)))
    found = BatchOptimal(window, where="device").solve(pairs)
    assert found.solvers == ["batch-optimal-device"] * 3
    for k in range(3):
        left, right = x[rows[k]].numpy(), y[columns[k]].numpy()
        expected, windows = batch_optimal_by_hand(left, right, window)
        scale = np.linalg.norm(left) * np.linalg.norm(right)
        assert found.values[k] == pytest.approx(expected, abs=1e-5 * float(scale))
        partners = found.permutations[k]
        assert len(set(partners[partners >= 0])) == min(count, others)
        assert found.values[k] == pytest.approx((left[partners >= 0] * right[partners[partners >= 0]]).sum(), rel=1e-5)
        for row, partner in enumerate(partners):
            assert partner < 0 or any(row in first and partner in second for first, second in windows)


@pytest.fixture
def cuda(monkeypatch):
    """A GPU whose kernel runs; where there is none, one of a number that is not there, for which it is interpreted."""
    if ON_CUDA:
        return HERE
    eye = torch.eye
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "eye", lambda size, device: eye(size))
    return torch.device("cuda:63")


def test_the_cpu_or_the_device_is_chosen_by_locations_and_batch(cuda):
    def chosen(kind=cuda, dtype=torch.float32, locations=256, pairs=1000, **options):
        return Auction(**options).on_device(torch.device(kind), dtype, locations, pairs)

    assert chosen()
    assert chosen(locations=LARGEST)
    assert not chosen(locations=LARGEST + 1)
    assert chosen(pairs=auction._FEWEST_ON_DEVICE)
    assert not chosen(pairs=auction._FEWEST_ON_DEVICE - 1)
    # A program of 4096 locations has eight warps.
    assert chosen(pairs=auction._FEWEST_ON_DEVICE // 8, locations=4096)
    assert not chosen(gap=1e-9)
    assert not chosen(dtype=torch.float64)
    assert not chosen("cpu")
    assert not chosen("mps")
    assert not chosen(where="cpu")
    assert chosen("cpu", where="device", pairs=1)
    assert not chosen(where="device", dtype=torch.float64)
    here = cuda, torch.float32
    # Windows count, not pairs.
    assert BatchOptimal(512).on_device(*here, 4096, 16)
    assert not BatchOptimal(512).on_device(*here, 4096, 15)
    assert not Rewindowed().on_device(*here, 4096, 1000)


def test_options_that_mean_nothing_are_refused_and_where_it_runs_is_no_part_of_a_method():
    with pytest.raises(MatchingError, match=r'where must be "auto", "cpu" or "device", found \'gpu\''):
        Auction(where="gpu")
    with pytest.raises(MatchingError, match=r'precision must be "float32" or "float16", found \'int8\''):
        Auction(precision="int8")
    assert repr(Auction(where="device")) == repr(Auction()) == "Auction(gap=1e-06, bids_per_row=2000)"
    assert repr(BatchOptimal(where="device")) == repr(BatchOptimal())
    assert "float16" in repr(Auction(precision="float16"))


# In one interpreter, as PyTorch takes seconds to import: first without a device, then for one that is not there.
WITHOUT = """
import sys, numpy as np, torch, rsm_probe
from rsm_probe.matching.methods.optimal import Auction
rsm_probe.rsm(torch.randn(20, 8, 4))
assert not torch.cuda.is_initialized() and "rsm_probe.matching.compiled.gpu_auction" not in sys.modules
try:
    rsm_probe.match_affinity(torch.ones(1, 3, 3), Auction(where="device"))
except rsm_probe.RsmProbeError as error:
    print(error)
"""
COMPILE = """
import re, subprocess, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rsm_probe.matching.compiled.gpu_batches import warps_of
from rsm_probe.matching.compiled.gpu_auction import solve_pairs

names = ["affinities", "scales", "orders", "aside", "counts", "permutations", "values", "bounds", "bids_made",
         "size", "order_stride", "gap", "bids_per_row", "BLOCK"]
kinds = "*fp32 *fp64 *i32 *i32 *i32 *i32 *fp64 *fp64 *i32 i32 i32 fp32 i32 constexpr".split()
assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
# Triton compiles other code for arguments that are 1, and for those that 16 divides.
for block, constants, aligned in ((16, {9: 1}, 9), (256, {}, 9), (1024, {10: 0}, 10)):
    kinds_now = ["constexpr" if k in constants else kind for k, kind in enumerate(kinds)]
    fixed = {(k,): value for k, value in {**constants, 13: block}.items()}
    source = ASTSource(solve_pairs, dict(zip(names, kinds_now)), fixed,
                       {(k,): [["tt.divisibility", 16]] for k in range(aligned)})
    code = triton.compile(source, target=GPUTarget("cuda", 80, 32),
                          options={"num_warps": warps_of(block), "enable_fp_fusion": False}).asm
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(code["ptx"])
        file.flush()
        said = subprocess.run([assembler, "-v", "-arch=sm_80", "-o", "/dev/null", file.name], capture_output=True,
                              text=True, check=True).stderr
    registers, = re.findall(r"Used (\\d+) registers", said)
    spilled = re.findall(r"(\\d+) bytes spill", said)
    print(block, registers, *spilled)
"""
HAS_TRITON = find_spec("triton") is not None


@pytest.fixture(scope="module")
def compiled():
    """What an interpreter prints that does not interpret kernels."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    code = WITHOUT + COMPILE if HAS_TRITON else WITHOUT
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


@pytest.mark.slow
def test_without_a_device_nothing_of_it_is_loaded_and_asking_for_it_is_refused(compiled):
    assert "the affinities are on the CPU" in compiled[0]


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is for Linux")
@pytest.mark.slow
def test_the_kernel_compiles_for_a_device_that_is_not_there_and_keeps_its_registers(compiled):
    lines = [[int(number) for number in line.split()] for line in compiled[1:]]
    assert [block for block, *_ in lines] == [16, 256, 1024]
    for block, registers, *spilled in lines:
        # What is known of the columns stays in registers, of which a thread has 255; which instructions reduce over
        # them is for the compiler to choose, and for benchmarks/device_code.py to count.
        assert 0 < registers <= 255, block
        assert len(spilled) == 2, block
        assert not any(spilled), block
