"""Certificates against exact optima, on both paths; and bounds that are wrong, which must not pass for perfect ones."""

import importlib
from dataclasses import dataclass
from fractions import Fraction
from itertools import permutations
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from rsm_probe import match, match_affinity, rsm
from rsm_probe.errors import MatchingError
from rsm_probe.matching import Matching
from rsm_probe.matching.matching import Locations, Pairs, Solution
from rsm_probe.matching.methods.optimal import Auction

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def certificates():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("certificates")


def test_the_exact_optimum_is_that_of_all_permutations(certificates):
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (2, 2), (3, 5), (5, 3), (5, 5)):
        affinity = rng.normal(size=shape) * 10 ** rng.uniform(-20, 20, (shape[0], 1))
        wide = [[Fraction(float(value)) for value in row] for row in (affinity if shape[0] <= shape[1] else affinity.T)]
        orders = permutations(range(len(wide[0])), len(wide))
        expected = max(sum(wide[row][column] for row, column in enumerate(order)) for order in orders)
        assert certificates.exact_optimum(affinity) == expected


# The interpreter takes a millisecond for a bid.
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("where", "count", "most"),
    [("cpu", 600, 7), ("device", 2000, 7) if torch.cuda.is_available() else ("device", 40, 4)],
)
def test_no_certificate_is_violated(certificates, where, count, most):
    tally = certificates.counted(where, count, 23, most)
    assert tally.checked == count
    # Or nothing was tried that a wrong bound could hide behind.
    assert tally.short > count / 50
    assert tally.beyond > count / 10
    assert where == "cpu" or tally.solvers["auction-device"] > count / 5
    assert not tally.violations, tally.examples


@pytest.mark.parametrize("wrong", ["bound", "value"])
def test_a_wrong_answer_is_counted(certificates, wrong):
    affinity = np.random.default_rng(0).normal(size=(4, 4))
    found, tally = match_affinity(affinity), certificates.Tally()
    object.__setattr__(found, wrong, getattr(found, wrong) * (1 - 1e-4 if wrong == "bound" else 1 + 1e-4))
    certificates.check(found, affinity, 1e-6, tally)
    assert tally.violations["bound below the optimum" if wrong == "bound" else "value above the optimum"] == 1


@dataclass(frozen=True)
class Claims(Matching):
    """Equal locations, with a bound that lies above or below what they add up to."""

    excess: float = 0.0
    name: ClassVar[str] = "claims"
    exact: ClassVar[bool] = False
    symmetric: ClassVar[bool] = True
    needs_affinity: ClassVar[bool] = True
    growth: ClassVar[float] = 2.0

    def solve(self, pairs):
        affinities = pairs.affinities()
        values = np.trace(affinities, axis1=1, axis2=2, dtype=np.float64)
        orders = np.tile(np.arange(affinities.shape[1]), (len(values), 1))
        return Solution(values, orders, values + self.excess, [self.name] * len(values))


def test_a_bound_below_the_value_is_refused_unless_rounding_explains_it():
    x = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    affinity = x[0] @ x[1].T
    for use in (
        lambda method: match_affinity(affinity, method),
        lambda method: match(x[0], x[1], method),
        lambda method: rsm(x, matching=method),
    ):
        with pytest.raises(MatchingError, match=r"claims gave pair \d a bound of .* the bound is wrong"):
            use(Claims(-1e-6))
    for excess in (-1e-15, 0.0, 1.0):
        found = match_affinity(affinity, Claims(excess))
        assert found.gap == pytest.approx(max(excess, 0.0), abs=1e-14)
        assert found.gap >= 0


# Entries above 1e15, or all of them below 1e-15, are not for the device's kernel; below 1e-15 and above 1e25, the CPU
# rescales float32.
@pytest.mark.gpu
@pytest.mark.parametrize("size", [3e16, 1e22, 1e27, 1e-17, 1e-24, 1e-36])
@pytest.mark.parametrize("where", ["cpu", "device"])
def test_bounds_lie_above_the_optimum_where_the_value_does_not(certificates, where, size):
    rng = np.random.default_rng(1)
    # The gap allows any matching, and an auction stops at its first.
    batch = ((1 + 1e-3 * rng.normal(size=(3, 5, 5))) * size).astype(np.float32)
    batch[1] *= (10.0 ** np.arange(-4, 1))[:, None]
    below = 0
    here = "cuda" if where == "device" and torch.cuda.is_available() else "cpu"
    for found, affinity in zip(
        match_affinity(torch.from_numpy(batch).to(here), Auction(0.01, where=where)), batch, strict=True
    ):
        optimum = certificates.exact_optimum(affinity)
        below += Fraction(found.value) < optimum
        assert found.solver == "auction"
        assert Fraction(found.bound) >= optimum
        assert 0 <= found.gap <= 0.01 * max(np.linalg.norm(affinity / size) * size, found.value)
    assert below, "every value is the optimum: this test could not fail"


def test_a_gap_that_was_proved_is_not_closed_by_rounding():
    # In float64, the value may lie above what was proved for affinities in float32.
    tokens = torch.randn(24, 2, 32, generator=torch.Generator().manual_seed(0)) + 3e3
    above, method = 0, Auction(1e-9)
    for x, y in zip(tokens[::2], tokens[1::2], strict=True):
        one = np.zeros(1, int)
        rounded = method.solve(Pairs(one, one, Locations(x[None]), Locations(y[None]), (x @ y.T).numpy()[None]))
        found = match(x, y, method)
        above += found.value > rounded.bounds[0]
        assert found.gap >= (rounded.bounds - rounded.values)[0] * (1 - 1e-6) > 0
        assert (
            found.value
            <= match_affinity(x.double() @ y.double().T, "scipy").value
            <= match(x, y, method, certify=True).bound
        )
    assert above, "no value lies above a bound: this test could not fail"
