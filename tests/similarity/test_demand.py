"""What work takes is said before it starts, and what does not fit is refused with a way out that works."""

import re

import pytest
import torch

from rsm_probe import match, rsm
from rsm_probe.errors import CostError
from rsm_probe.execution.execution import Execution
from rsm_probe.matching import demand
from rsm_probe.matching.matching import Locations
from rsm_probe.matching.registry import get_matching
from rsm_probe.neighbours import nearest
from rsm_probe.pairs.timing import core_seconds_per_pair, timing_matcher
from rsm_probe.streaming.cost import Cost, LayerCost


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def named(error: pytest.ExceptionInfo[CostError]) -> str:
    (name,) = re.findall(r"matching='([a-z-]+)'", str(error.value))
    return name


@pytest.mark.parametrize(("matching", "free", "way_out"), [("soft", 800, "rewindowed"), ("ortools", 1200, "optimal")])
def test_the_matching_that_is_named_fits_where_the_other_does_not(memory_is, matching, free, way_out):
    z = tokens(2, 9000, 2) if matching == "soft" else tokens(2, 9000, 2).relu() * (torch.arange(9000) < 40)[:, None]
    memory_is(free * 10**6)
    for work in (
        lambda matching: match(z[0], z[1], matching),
        lambda matching: rsm(z, matching=matching, kernel="linear"),
        lambda matching: nearest(z[:1], z[1:], 1, matching, "linear"),
    ):
        with pytest.raises(CostError, match=r"9000 x 9000 locations by .* takes [\d.]+ GB .* GB are free") as refused:
            work(matching)
        assert named(refused) == way_out
        work(way_out)


def test_where_no_matching_fits_the_number_of_locations_that_does_is_named(memory_is):
    memory_is(300 * 10**6)
    text = demand.way_out(get_matching("greedy")[1], 20_000, 20_000, 10**6, 4, 300 * 10**6)
    most = int(re.findall(r"at most (\d+) per image", text)[0])
    assert 2 * 4 * most**2 <= 300 * 10**6 < 2 * 4 * (most * 17 / 15) ** 2


def test_a_budget_that_is_too_small_is_refused_with_one_that_suffices(memory_is):
    z = tokens(3, 600, 2)
    with pytest.raises(CostError, match=r"600 x 600 locations takes 1.44 MB, .*memory= to at least '1.5MB'"):
        rsm(z, memory="1MB")
    assert rsm(z, memory="1.5MB").values.shape == (3, 3)
    memory_is(10**6)
    with pytest.raises(
        CostError, match=r"this machine has 999 KB free; use a matching that needs no affinity: identity"
    ):
        rsm(z, memory="1MB")


def test_long_or_large_work_is_remarked_on_and_other_work_is_not():
    assert demand.remark("this", 59, 10**9) is None
    assert re.match(r"this takes about 10\.0 min and 1 GB of memory", demand.remark("this", 600, 10**9) or "")
    assert re.match(r"this takes 20 GB of memory", demand.remark("this", 0, 20 * 10**9) or "")


def test_the_time_of_a_pair_comes_from_a_part_of_its_locations():
    x, y = (Locations(tokens(1, count, 3)) for count in (5000, 3000))
    for name in ("optimal", "rewindowed", "greedy", "late-interaction"):
        assert demand.pair_seconds(get_matching(name)[1], x, y) > 0
    assert demand.pair_seconds(get_matching("identity")[1], x, y) == 0


def test_progress_says_what_tokens_in_memory_take(capfd):
    z = tokens(11, 30, 3)
    rsm(z, progress=True)
    nearest(z[:2], z, 1, progress=True)
    said = capfd.readouterr().err
    assert "rsm: 55 pairs of 30 x 30 locations by 'optimal'; " in said
    assert "nearest: 22 pairs of 30 x 30 locations by 'optimal'; " in said


def test_pairs_are_timed_as_they_are_matched_and_at_once_where_they_are():
    x = tokens(3, 30, 4)
    with timing_matcher(Execution(workers=2)) as matcher:
        for name in ("optimal", "scipy", "rewindowed", "identity", "translation"):
            assert core_seconds_per_pair(x, get_matching(name)[1], matcher, 20, 190, grid=(5, 6)) > 0
        assert core_seconds_per_pair(x[:, :1], get_matching("scipy")[1], matcher, 20, 190) == 0


def test_an_estimate_counts_what_was_spent_before_and_every_batch():
    layer = LayerCost("m/l", 9, 36, {"optimal": 2.0}, 0)
    cost = Cost([layer], 0.5, 10, [5, 5], 4, 1, 1, 0, batch_seconds=3.0, start_seconds=7.0, end_seconds=1.0)
    assert cost.seconds == pytest.approx(0.5 * 10 + 2.0 * 20 / 4 + 2 * 3.0 + 1.0, abs=1e-4)
    assert cost.all_seconds == cost.seconds + 7.0
    assert "about 29 s (of which 7.0 s have passed) with 4 workers" in str(cost)
