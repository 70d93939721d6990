"""The auction's searches: vector instructions and plain Numba agree, and each name of Numba's insides has a canary."""

import os
import subprocess
import sys
from functools import reduce
from importlib import import_module

import llvmlite
import numba
import numpy as np
import pytest
from numba import njit
from test_auction import DTYPES, FAMILIES, GAP, family

from rsm_probe.matching.compiled import plain_searches
from rsm_probe.matching.methods.optimal import auction

NAMES = [
    *("core.cgutils.unpack_tuple", "core.cgutils.get_or_insert_function", "extending.intrinsic"),
    *("core.base.BaseContext.make_array", "core.base.BaseContext.get_value_type", "core.base.BaseContext.make_tuple"),
]
LLVM_NAMES = [
    *("VectorType", "VectorType.as_pointer", "IntType", "DoubleType", "FunctionType", "Constant", "Undefined"),
    *(f"IRBuilder.{name}" for name in ("append_basic_block", "position_at_end", "branch", "cbranch", "phi", "select")),
    *(f"IRBuilder.{name}" for name in ("gep", "load", "call", "bitcast", "zext", "trunc", "fpext", "fsub", "cttz")),
    *(f"IRBuilder.{name}" for name in ("fcmp_ordered", "icmp_signed", "icmp_unsigned", "add", "sub", "mul", "and_")),
    *(f"IRBuilder.{name}" for name in ("insert_element", "extract_element", "shuffle_vector")),
]


@pytest.mark.parametrize("name", NAMES)
def test_name_of_numba_is_still_there(name):
    module, attributes = name.split("."), []
    while True:
        try:
            found = import_module(".".join(["numba", *module]))
            break
        except ImportError:
            attributes.insert(0, module.pop())
    assert reduce(lambda value, part: getattr(value, part, None), attributes, found), (
        f"Numba {numba.__version__} took numba.{name} away; see rsm_probe/matching/compiled/numba_internals.py"
    )


@pytest.mark.parametrize("name", LLVM_NAMES)
def test_name_of_llvmlite_is_still_there(name):
    from llvmlite import ir

    assert reduce(lambda value, part: getattr(value, part, None), name.split("."), ir), (
        f"llvmlite {llvmlite.__version__} took ir.{name} away; see rsm_probe/matching/compiled/numba_internals.py"
    )


def test_vector_instructions_compile_here():
    from rsm_probe.matching.compiled.simd import VECTORISED

    assert (os.environ.get("RSM_PROBE_SIMD") != "0") == VECTORISED


def searches(module):
    best_lanes, best_in_float64 = module.best_lanes, module.best_in_float64
    lanes_above, best_candidate, lowest_bit = module.lanes_above, module.best_candidate, module.lowest_bit

    @njit
    def run(affinity, row, prices, columns, count, threshold):
        above = lanes_above(affinity, row, prices, 0, threshold)
        return (
            best_lanes(affinity, row, prices),
            best_in_float64(affinity, row, prices),
            above,
            lowest_bit(above | np.uint64(2**63)),
            best_candidate(affinity, columns, row, count, prices),
        )

    return run


@pytest.mark.parametrize("dtype", DTYPES)
def test_searches_by_vector_instructions_and_in_plain_numba_agree_even_on_ties(dtype):
    from rsm_probe.matching.compiled import numba_internals

    vector, plain = searches(numba_internals), searches(plain_searches)
    rng = np.random.default_rng(0)
    for trial in range(500):
        width = 64 * int(rng.integers(1, 12))
        affinity = (rng.integers(-3, 4, (3, width)) if trial % 2 else rng.normal(size=(3, width))).astype(dtype)
        affinity[:, width - int(rng.integers(0, 60)) :] = -3e38 if dtype == np.float32 else -1e300  # padding
        prices = rng.integers(0, 2, width).astype(dtype)
        columns = rng.integers(0, 40, (3, 64)).astype(np.int32)
        arguments = affinity, 1, prices, columns, 16 * int(rng.integers(1, 5)), dtype(0)
        (best, _, lane, threshold), *others = vector(*arguments)
        (plain_best, second, plain_lane, plain_threshold), *plain_others = plain(*arguments)
        assert (best, lane) == (plain_best, plain_lane)
        assert [plain_best, second] == np.sort(affinity[1] - prices)[:-3:-1].tolist()
        assert threshold == plain_threshold or width < plain_searches.FEWEST_FOR_CANDIDATES
        assert others == plain_others


CASES = [(name, size) for name in FAMILIES for size in [(64, 64), (40, 57), (530, 520)]]
SOLVE = """
import sys
import numpy as np
from test_simd import solutions
from rsm_probe.matching.compiled.simd import VECTORISED

assert not VECTORISED
np.savez(sys.argv[1], *solutions(sys.argv[2]))
"""


def solutions(dtype):
    """Permutation, value, bound, certificate and bids of every case, as one array each."""
    for name, size in CASES:
        found = auction(family(name, *size, dtype)[None], np.zeros(1), GAP)
        numbers = [found.values[0], found.bounds[0], found.certified[0], found.bids[0]]
        yield np.concatenate([found.permutations[0], numbers])


# A process of its own compiles everything anew, which takes most of the time.
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", ["switched off", "does not import"])
@pytest.mark.slow
def test_plain_numba_solves_every_family_to_the_same_values_bounds_and_certificates(tmp_path, way, dtype):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RSM_PROBE_SIMD": "1"}
    code = SOLVE
    if way == "switched off":
        environment["RSM_PROBE_SIMD"] = "0"
    else:  # as where a release of llvmlite lacks what it needs
        code = f"import sys\nsys.modules['rsm_probe.matching.compiled.numba_internals'] = None\n{SOLVE}"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "found.npz"), dtype],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ("its vector instructions do not compile" in ran.stderr) == (way != "switched off")
    with np.load(tmp_path / "found.npz") as found:
        for case, expected, key in zip(CASES, solutions(dtype), found.files, strict=True):
            np.testing.assert_array_equal(found[key], expected, str(case))
