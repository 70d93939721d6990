"""The device's kernel, interpreted without a device: the CPU's values and certificates, batches, and what falls back."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from test_auction import FAMILIES, FLOAT32_ROUNDING, GAP, SLACK, family, optimum_and_reference

from rsm_probe import match_affinity
from rsm_probe.errors import MatchingError
from rsm_probe.matching.auction import Auction
from rsm_probe.matching.device import LARGEST, has_kernel, solve_on_device
from rsm_probe.matching.protocol import Locations, Pairs
from rsm_probe.matching.windows import BatchOptimal, Rewindowed

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DEVICE = Auction(where="device")
# The interpreter takes a millisecond for a bid.
SIZES = [(4, 7)] if HERE.type == "cpu" else [
    (64, 64), (100, 100), (257, 257), (513, 513), (600, 600), (300, 500), (600, 550), (1, 1), (1, 9), (9, 1)
]  # fmt: skip


def batch_of(affinities):
    return torch.from_numpy(np.stack(affinities)).to(HERE)


def assert_optimal(found, affinity, gap=GAP):
    optimum, reference = optimum_and_reference(affinity)
    rows = np.flatnonzero(found.permutation >= 0)
    assert len(rows) == len(set(found.permutation[rows].tolist())) == min(affinity.shape)
    by_hand = affinity[rows, found.permutation[rows]].astype(np.float64).sum()
    assert abs(found.value - by_hand) <= SLACK * reference
    assert abs(found.value - optimum) <= FLOAT32_ROUNDING * reference
    assert found.bound >= optimum - SLACK * reference
    assert found.gap <= gap * reference * (1 + 1e-6) or found.solver == "scipy"
    np.testing.assert_array_equal(found.affinities[rows], affinity[rows, found.permutation[rows]])


@pytest.mark.parametrize("size", SIZES)
def test_every_family_is_solved_and_certified_by_the_kernel_in_one_batch(size):
    affinities = [family(name, *size, np.float32) for name in FAMILIES]
    for found, affinity, name in zip(match_affinity(batch_of(affinities), DEVICE), affinities, FAMILIES, strict=True):
        assert found.solver == "auction-device", name
        assert_optimal(found, affinity)
