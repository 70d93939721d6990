"""The pair loop: same results whatever the workers, memory and blocks; errors surface; nothing hangs."""

import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from rsm_probe.arrays import first_nonfinite
from rsm_probe.errors import CostError
from rsm_probe.execution.amounts import format_bytes, parse_bytes
from rsm_probe.execution.execution import Execution
from rsm_probe.matching.matches import match
from rsm_probe.matching.methods.identity import Identity, squared_norms
from rsm_probe.matching.methods.library_solvers import LapAssignment, ScipyAssignment
from rsm_probe.matching.registry import get_matching
from rsm_probe.pairs.affinities import block_slices, pairs_per_block
from rsm_probe.pairs.matcher import PairMatcher
from rsm_probe.pairs.timing import seconds_per_pair

METHODS = {"identity": Identity(), "optimal": ScipyAssignment(), "lap": LapAssignment()}


def random_tokens(images, locations, channels=5, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, locations, channels, generator=generator, dtype=torch.float64).to(dtype)


def products_of(x, y=None, methods=METHODS, on_pairs=lambda count: None, block_memory=None, **options):
    with PairMatcher(Execution(**options), on_pairs, block_memory) as matcher:
        return matcher.submit(x, y, methods).result()


def matching_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("rsm-probe-match")}


def finishes(work, seconds=5.0):
    """Whether a function returns in time; a thread that does not is left behind and does not hold up the tests."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


# Less than an affinity takes: each is a block of its own.
ONE_PAIR = 1


@dataclass(frozen=True)
class Recording(ScipyAssignment):
    """Exact matching that keeps the shapes of what it was given."""

    shapes: list = field(default_factory=list)

    def permutation(self, affinity):
        self.shapes.append(affinity.shape)
        return super().permutation(affinity)


@dataclass(frozen=True)
class Failing(ScipyAssignment):
    def permutation(self, affinity):
        raise ValueError("this pair cannot be matched")


@dataclass(frozen=True)
class Slow(ScipyAssignment):
    def permutation(self, affinity):
        time.sleep(0.002)
        return super().permutation(affinity)


@pytest.mark.parametrize(("own", "others"), [((7, 6), None), ((4, 6), (5, 6)), ((4, 6), (3, 9)), ((4, 9), (3, 6))])
def test_products_of_all_pairs_equal_matching_each_pair_alone(own, others):
    x = random_tokens(*own, dtype=torch.float64)
    y = None if others is None else random_tokens(*others, seed=1, dtype=torch.float64)
    found = products_of(x, y)
    assert list(found) == list(METHODS)
    for label, method in METHODS.items():
        expected = [[match(a, b, method).value for b in (x if y is None else y)] for a in x]
        np.testing.assert_allclose(found[label], expected, rtol=1e-11, atol=1e-11)
        assert found[label].dtype == np.float64


@pytest.mark.parametrize("others", [None, (6, 7)])
def test_the_number_of_workers_does_not_change_a_bit(others):
    x = random_tokens(9, 8)
    y = None if others is None else random_tokens(*others, seed=1)
    alone, together = (products_of(x, y, workers=workers, block_memory=ONE_PAIR) for workers in (1, 4))
    for label in METHODS:
        np.testing.assert_array_equal(alone[label], together[label])


@pytest.mark.parametrize("others", [None, (6, 7)])
def test_the_memory_budget_does_not_change_a_bit(others):
    x = random_tokens(9, 8)
    y = None if others is None else random_tokens(*others, seed=1)
    one_affinity = 8 * 8 * 4
    tight, ample = products_of(x, y, memory=one_affinity), products_of(x, y, memory="1GB")
    for label in METHODS:
        np.testing.assert_array_equal(tight[label], ample[label])


@pytest.mark.parametrize("block_bytes", [1, 3 * 8 * 8 * 8, 5 * 8 * 8 * 8])
def test_the_size_of_blocks_does_not_change_the_result(block_bytes):
    x, y = random_tokens(11, 8, dtype=torch.float64), random_tokens(6, 8, seed=1, dtype=torch.float64)
    for others in (None, y):
        whole, parts = (products_of(x, others, workers=1, block_memory=size) for size in (None, block_bytes))
        for label in METHODS:
            np.testing.assert_allclose(parts[label], whole[label], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "per_block", "blocks"),
    [
        # 2048 x 2048 float32 affinities are 16 MiB: above one block, so each pair is a block.
        ((4, 2048, 1), 1, 6),
        # 32 affinities of 256 x 256 are 8 MiB: the 69 rows of the first column take three blocks.
        ((70, 256, 1), 32, None),
        ((5, 4, 1), 131072, 4),
    ],
)
def test_blocks_hold_every_pair_below_the_diagonal_once(shape, per_block, blocks):
    x = torch.empty(shape)
    assert pairs_per_block(x, x) == per_block
    slices = list(block_slices(x, x))
    assert all(1 <= rows.stop - rows.start <= per_block for rows, _ in slices)
    seen = [(row, column) for rows, column in slices for row in range(rows.start, rows.stop)]
    assert sorted(seen) == sorted((i, j) for i in range(shape[0]) for j in range(i))
    if blocks is not None:
        assert len(slices) == blocks
    else:
        assert sum(column == 0 for _, column in slices) == 3


def test_blocks_of_two_sets_hold_every_pair_once():
    x, y = torch.empty(40, 256, 1), torch.empty(3, 512, 1)
    seen = [(row, column) for rows, column in block_slices(x, y) for row in range(rows.start, rows.stop)]
    assert sorted(seen) == [(i, j) for i in range(40) for j in range(3)]
    assert pairs_per_block(x, y) == 16


def test_a_forward_pass_in_half_precision_does_not_take_the_pairs_with_it():
    x = random_tokens(4, 1100, channels=64)  # enough features for sums of float32 products
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = products_of(x, methods={"identity": Identity(), "any": ScipyAssignment()})
    for label, products in products_of(x, methods={"identity": Identity(), "any": ScipyAssignment()}).items():
        np.testing.assert_array_equal(found[label], products)


def test_products_within_one_set_are_symmetric_and_match_each_pair_once():
    method = Recording()
    found = products_of(random_tokens(6, 7), methods={"recording": method, "identity": Identity()})
    assert len(method.shapes) == 15
    for products in found.values():
        np.testing.assert_array_equal(products, products.T)


def test_several_methods_share_the_affinities_of_one_submit(monkeypatch):
    made, multiply = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *sides, **options: made.append(sides) or multiply(*sides, **options))
    x = random_tokens(5, 6)
    together = products_of(x, block_memory=ONE_PAIR)
    assert len(made) == 10  # each block is of one pair, and so one product of matrices
    for label, method in METHODS.items():
        np.testing.assert_array_equal(together[label], products_of(x, methods={label: method})[label])


def test_submits_of_one_matcher_do_not_disturb_each_other():
    x, y = random_tokens(6, 5), random_tokens(4, 8, seed=1)
    with PairMatcher(Execution(workers=2)) as matcher:
        first, second = matcher.submit(x, None, METHODS), matcher.submit(y, None, METHODS)
        late, early = second.result(), first.result()
    for label in METHODS:
        np.testing.assert_array_equal(early[label], products_of(x)[label])
        np.testing.assert_array_equal(late[label], products_of(y)[label])


@pytest.mark.parametrize("method", [Identity(), ScipyAssignment()])
@pytest.mark.parametrize(
    ("own", "others", "total"), [((7, 4), None, 21), ((7, 4), (3, 5), 21), ((7, 1), None, 21), ((1, 4), None, 0)]
)
@pytest.mark.parametrize("block_bytes", [1, 2 * 4 * 4 * 4, 8 << 20])
def test_on_pairs_adds_up_to_all_pairs(block_bytes, method, own, others, total):
    counts = []
    y = None if others is None else random_tokens(*others, seed=1)
    options = {"workers": 2, "on_pairs": counts.append, "block_memory": block_bytes}
    products_of(random_tokens(*own), y, methods={"any": method}, **options)
    assert sum(counts) == total


def test_on_pairs_is_called_while_work_goes_on():
    counts, methods = [], {"any": ScipyAssignment()}
    products_of(random_tokens(6, 4), methods=methods, on_pairs=counts.append, block_memory=ONE_PAIR)
    assert counts == [1] * 15


def test_affinities_waiting_to_be_matched_stay_within_the_memory_budget(monkeypatch):
    made, done, waiting, multiply = [], [], [], torch.mm

    def counted(*sides, **options):
        made.append(sides)
        waiting.append(len(made) - len(done))
        return multiply(*sides, **options)

    monkeypatch.setattr(torch, "mm", counted)  # each block is of one pair, and so one product of matrices
    three_affinities = 3 * 6 * 6 * 4
    options = {"workers": 2, "memory": three_affinities, "on_pairs": done.append, "block_memory": ONE_PAIR}
    products_of(random_tokens(8, 6), methods={"slow": Slow()}, **options)
    # The budget is used, so that workers have something to do, and it is kept.
    assert max(waiting) == 3
    assert len(made) == 28


def test_a_budget_below_one_affinity_is_refused_with_both_sizes():
    with pytest.raises(CostError, match=r"50 x 40 locations takes 8 KB, above the memory budget of 5 KB"):
        products_of(random_tokens(3, 50), random_tokens(3, 40), memory="5KB")


def test_a_budget_below_one_affinity_does_not_matter_where_none_is_needed():
    x = random_tokens(3, 50)
    np.testing.assert_array_equal(
        products_of(x, methods={"identity": Identity()}, memory=1)["identity"],
        products_of(x, methods={"identity": Identity()})["identity"],
    )


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("memory", ["1GB", 4 * 4 * 4])
def test_errors_in_a_worker_surface_and_leave_no_threads(workers, memory):
    before = matching_threads()
    options = {"workers": workers, "memory": memory, "block_memory": ONE_PAIR}
    with pytest.raises(ValueError, match="this pair cannot be matched"):
        products_of(random_tokens(6, 4), methods={"failing": Failing()}, **options)
    assert not matching_threads() - before


def test_no_threads_remain_after_finished_work():
    before = matching_threads()
    products_of(random_tokens(5, 4), workers=3)
    assert not matching_threads() - before


def test_an_error_of_the_caller_ends_the_threads_and_is_not_hidden():
    before = matching_threads()

    def interrupted():
        with PairMatcher(Execution(workers=2), block_memory=ONE_PAIR) as matcher:
            matcher.submit(random_tokens(12, 4), None, {"slow": Slow()})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not matching_threads() - before


def test_a_matcher_works_on_after_an_error():
    one_failed, carry_on = threading.Event(), threading.Event()

    @dataclass(frozen=True)
    class FailsFirst(ScipyAssignment):
        def permutation(self, affinity):
            if not one_failed.is_set():
                one_failed.set()
                raise ValueError("the first pair cannot be matched")
            carry_on.wait(10)
            return super().permutation(affinity)

    small, large = random_tokens(4, 4), random_tokens(4, 8, seed=1)
    budget = 6 * 4 * 4 * 4
    found = {}
    matcher = PairMatcher(Execution(workers=1, memory=budget), block_memory=ONE_PAIR)
    # All six pairs of `small` fit in the queue; when the first fails, those that still wait are cancelled.
    pending = matcher.submit(small, None, {"fails": FailsFirst()})
    with pytest.raises(ValueError, match="the first pair"):
        pending.result()
    carry_on.set()
    # What the cancelled pairs had reserved must be free again: one affinity of `large` needs most of the budget.
    finished = finishes(lambda: found.update(matcher.submit(large, None, METHODS).result()))
    assert finished, "the budget of cancelled pairs was never given back"
    matcher.__exit__(None, None, None)
    np.testing.assert_array_equal(found["optimal"], products_of(large)["optimal"])


def test_an_error_in_on_pairs_does_not_block_the_queue():
    def broken(count):
        raise ArithmeticError("the progress bar broke")

    raised = []

    def work():
        try:
            options = {"workers": 1, "memory": 4 * 4 * 4, "block_memory": ONE_PAIR}
            products_of(random_tokens(4, 4), on_pairs=broken, **options)
        except ArithmeticError as error:
            raised.append(error)

    assert finishes(work), "the producer waits for a place in the queue that nobody announces"
    assert len(raised) == 1


@pytest.mark.parametrize("others", [None, (3, 1)])
def test_single_locations_need_no_matching(others):
    method = Recording()
    x = random_tokens(5, 1)
    y = None if others is None else random_tokens(*others, seed=1)
    found = products_of(x, y, methods={"recording": method, "identity": Identity()}, memory=1)
    assert method.shapes == []
    np.testing.assert_array_equal(found["recording"], found["identity"])


def test_views_that_are_not_contiguous_give_the_same_products():
    wide = random_tokens(5, 6, channels=10)
    view = wide.transpose(1, 2)[:, ::2].transpose(1, 2)
    assert not view.is_contiguous()
    found, expected = products_of(view), products_of(view.contiguous())
    for label in METHODS:
        np.testing.assert_array_equal(found[label], expected[label])


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_products_of_float32_tokens_of_extreme_scale_are_those_of_ordinary_ones(scale):
    x = random_tokens(5, 6, dtype=torch.float64)
    found, expected = products_of((x * scale).float()), products_of(x)
    for label in METHODS:
        np.testing.assert_allclose(found[label] / scale**2, expected[label], rtol=1e-5, atol=1e-5)


def test_squared_norms_keep_float64_precision_and_range():
    x = random_tokens(4, 50, channels=20)
    expected = (x.double().numpy() ** 2).sum(axis=(1, 2))
    np.testing.assert_allclose(squared_norms(x), expected, rtol=1e-13)
    # Squares of these leave float32 on either side.
    for scale in (1e-30, 1e30):
        tokens = (x.double() * scale).float()
        np.testing.assert_allclose(squared_norms(tokens), (tokens.double().numpy() ** 2).sum(axis=(1, 2)), rtol=1e-12)


def test_the_first_image_with_values_that_are_not_finite_is_found():
    tokens = torch.zeros(5, 3, 2)
    assert first_nonfinite(tokens) is None
    # The sum of large finite values overflows, which is no fault of theirs.
    assert first_nonfinite(torch.full((2, 3, 4), 3e38)) is None
    tokens[3, 2, 1], tokens[4] = float("-inf"), float("inf")
    assert first_nonfinite(tokens) == 3
    tokens[2, 0, 0] = float("nan")
    assert first_nonfinite(tokens) == 2


def test_seconds_per_pair_is_positive_for_matching_and_zero_where_there_is_nothing_to_match():
    assert seconds_per_pair(random_tokens(3, 16), ScipyAssignment()) > 0
    assert seconds_per_pair(random_tokens(3, 16), Identity()) == 0.0
    assert seconds_per_pair(random_tokens(3, 1), ScipyAssignment()) == 0.0


@pytest.fixture
def clocked(monkeypatch):
    """A matching of which each call takes two seconds by the clock that the pair loop reads."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    @dataclass(frozen=True)
    class Clocked(Recording):
        def permutation(self, affinity):
            self.shapes.append(affinity.shape)
            now[0] += 2.0
            return np.arange(len(affinity))

    return Clocked()


def test_seconds_per_pair_is_the_mean_over_the_samples(clocked):
    assert seconds_per_pair(random_tokens(4, 512, channels=1), clocked, samples=5) == 2.0
    # Each once more before the clock runs: what is compiled at a first call is not part of the cost of a pair.
    assert clocked.shapes == [(512, 512)] * 10


def test_seconds_per_pair_of_many_locations_times_a_part_and_scales_it(clocked):
    # Twice the locations at cubic growth: eight times the time of the part.
    assert seconds_per_pair(random_tokens(3, 2048, channels=1), clocked, samples=2) == 16.0
    assert clocked.shapes == [(1024, 1024)] * 4


@pytest.mark.parametrize("expensive", [0, 1, 2, 5])
def test_what_any_pair_needs_for_the_first_time_is_not_part_of_its_cost(monkeypatch, expensive):
    now, solved = [0.0], dict[bytes, float]()
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Compiling(Recording):
        """Pairs take a millisecond; one of them needs a minute of compilation at first."""

        def permutation(self, affinity):
            first = affinity.tobytes() not in solved
            now[0] += 60.0 if first and len(solved) == expensive else 1e-3
            solved[affinity.tobytes()] = now[0]
            return np.arange(len(affinity))

    assert seconds_per_pair(random_tokens(5, 8), Compiling(), samples=3, at_once=1000) == pytest.approx(1e-3)
    # More pairs than the samples, because they are fast.
    assert len(solved) > 3


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("500MB", 500_000_000),
        ("2 GB", 2_000_000_000),
        ("1.5K", 1500),
        ("1tb", 10**12),
        ("  64 kb ", 64_000),
        ("123", 123),
        ("123B", 123),
        (4096, 4096),
    ],
)
def test_amounts_of_memory_are_read(text, amount):
    assert parse_bytes(text) == amount
    assert Execution(memory=text).memory_bytes == amount


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 XB", "1,5GB", "two GB", "1GBs"])
def test_texts_that_are_no_amount_of_memory_are_refused(text):
    with pytest.raises(CostError, match=f"'2GB', found '{text}'"):
        parse_bytes(text)


@pytest.mark.parametrize("amount", [0, -5, "0", "0GB", "0.1B"])
def test_amounts_of_memory_that_are_not_above_zero_are_refused(amount):
    with pytest.raises(CostError, match="memory must be above 0"):
        parse_bytes(amount)


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (1234, "1.23 KB"),
        (1_500_000, "1.5 MB"),
        (2_000_000_000, "2 GB"),
        (3.5e12, "3.5 TB"),
        (123_456_789, "123 MB"),
        (999_400, "999 KB"),
    ],
)
def test_amounts_of_memory_are_written_as_people_read_them(amount, text):
    assert format_bytes(amount) == text


@pytest.mark.parametrize(("amount", "text"), [(999_600, "1 MB"), (999_999_999, "1 GB")])
def test_amounts_just_below_a_unit_are_not_written_in_powers_of_ten(amount, text):
    assert format_bytes(amount) == text


@pytest.mark.parametrize("channels", [3, 300])
def test_the_optimum_is_never_below_the_identity_in_any_layout(channels):
    # Maps as networks give them: channels before locations. 300 x 16 x 16 features are summed in float32 blocks.
    maps = torch.rand(6, channels, 16, 16, generator=torch.Generator().manual_seed(0)) + 1
    tokens = maps.flatten(2).transpose(1, 2)
    methods = dict(map(get_matching, ("identity", "optimal")))
    with PairMatcher(Execution(workers=1)) as matcher:
        found = matcher.submit(tokens, None, methods).result()
        assert (found["optimal"] >= found["identity"]).all()
        # Locations that are all alike leave nothing to gain, not even a last bit.
        equal = tokens[:, :1].expand(-1, 256, -1).transpose(1, 2).contiguous().transpose(1, 2)
        found = matcher.submit(equal, None, methods).result()
    np.testing.assert_array_equal(found["optimal"], found["identity"])
