"""Matching within windows, against SciPy window by window: the paper's Batch-Optimal, and our windows cut anew."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.optimize import linear_sum_assignment

from rsm_probe import match, match_affinity, rsm
from rsm_probe.errors import CostError, MatchingError
from rsm_probe.matching.methods.batch_optimal import _BLOCK_BYTES, BatchOptimal
from rsm_probe.matching.methods.rewindowed import Rewindowed
from rsm_probe.stored_products.series import matching_text


def best(affinity):
    rows, columns = linear_sum_assignment(affinity, maximize=True)
    return affinity[rows, columns].sum()


def padded(x, y):
    size = max(len(x), len(y))
    return tuple(np.vstack([t, np.zeros((size - len(t), t.shape[1]))]).astype(np.float64) for t in (x, y))


def batch_optimal_by_hand(x, y, window):
    """Sorts both images by norm (those filled in come last), and solves window after window."""
    first, second = (np.argsort(-np.linalg.norm(t.astype(np.float64), axis=1), kind="stable") for t in (x, y))
    x, y = padded(x, y)
    first, second = (np.concatenate([o, np.arange(len(o), len(x))]) for o in (first, second))
    value, windows = 0.0, []
    for start in range(0, len(x), window):
        rows, columns = first[start : start + window], second[start : start + window]
        value += best(x[rows] @ y[columns].T)
        windows.append((set(rows.tolist()), set(columns.tolist())))
    return value, windows


def scale(x, y):
    return float(np.linalg.norm(np.asarray(x, np.float64)) * np.linalg.norm(np.asarray(y, np.float64)))


def smooth_field(side, channels, seed, noise=0.2):
    """Channels that vary slowly over a square, and every location's own noise."""
    rng = np.random.default_rng(seed)
    field = gaussian_filter(rng.normal(size=(side, side, channels)), (side / 8, side / 8, 0), mode="wrap")
    return (field / field.std() + noise * rng.normal(size=field.shape)).reshape(-1, channels).astype(np.float32)


def clusters(locations, channels, seed):
    """Locations around eight centres that are the same in every image, as often as chance has it."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(8, channels))
    noise = 0.3 * rng.normal(size=(locations, channels))
    return (centres[rng.choice(8, locations, p=rng.dirichlet(np.ones(8)))] + noise).astype(np.float32)


def assert_is_valid(found, x, y):
    """A partial permutation whose value is what it picks; of unequal images the smaller may miss partners."""
    partners = found.permutation[found.permutation >= 0]
    assert found.permutation.shape == (len(x),)
    assert found.permutation.min() >= -1
    assert found.permutation.max() < len(y)
    assert len(set(partners.tolist())) == len(partners)
    if len(x) == len(y):
        assert len(partners) == len(x)
    by_hand = sum(float(x[s].astype(np.float64) @ y[t]) for s, t in enumerate(found.permutation) if t >= 0)
    assert abs(found.value - by_hand) <= 1e-9 * scale(x, y)


@pytest.mark.parametrize("window", [1, 4, 7, 12])
@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (25, 25), (23, 30), (30, 23), (5, 24), (24, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_batch_optimal_is_the_optimum_of_every_window_of_sorted_norms(window, rows, columns, dtype):
    rng = np.random.default_rng(rows * 100 + columns)
    x, y = (rng.normal(size=(n, 5)) * rng.lognormal(size=(n, 1)) for n in (rows, columns))
    x, y = x.astype(dtype), y.astype(dtype)
    found = match(x, y, BatchOptimal(window))
    expected, windows = batch_optimal_by_hand(x, y, window)
    assert abs(found.value - expected) <= 1e-6 * scale(x, y)
    assert_is_valid(found, x, y)
    of_row = {row: k for k, (members, _) in enumerate(windows) for row in members}
    for row, column in enumerate(found.permutation):
        assert column < 0 or column in windows[of_row[row]][1]  # partners come from the same window
    # Those without partner were matched to vectors that were filled in: as many as their window holds of these.
    for members, partners in windows:
        alone = sum(found.permutation[row] < 0 for row in members if row < rows)
        filled = sum(column >= columns for column in partners)
        assert filled - sum(row >= rows for row in members) <= alone <= filled
    turned = match(y, x, BatchOptimal(window))
    assert turned.value == pytest.approx(found.value, abs=1e-6 * scale(x, y))


def test_equal_norms_keep_their_order():
    # Unit vectors in windows of two: only the stable order puts these partners into one window.
    x = np.eye(8, dtype=np.float32)
    y = x[[1, 0, 3, 2, 5, 4, 7, 6]]
    found = match(x, y, BatchOptimal(2))
    assert found.value == 8.0
    assert found.permutation.tolist() == [1, 0, 3, 2, 5, 4, 7, 6]


@pytest.mark.parametrize("method", [BatchOptimal(40), BatchOptimal(4000), Rewindowed(40, gap=0.5), Rewindowed()])
@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (31, 31), (17, 40), (40, 17), (1, 1), (1, 9)])
def test_one_window_that_holds_everything_is_the_optimum(method, rows, columns):
    rng = np.random.default_rng(rows + columns)
    x, y = rng.normal(size=(rows, 6)), rng.normal(size=(columns, 6))
    # Filling up with zero vectors is the rectangular problem: everything of the smaller image has a partner.
    expected = best(np.dot(*[t if k == 0 else t.T for k, t in enumerate(padded(x, y))]))
    found = match(x, y, method)
    assert abs(found.value - expected) <= 1e-6 * scale(x, y)
    assert abs(found.value - match(x, y, "optimal").value) <= 2e-6 * scale(x, y)
    assert_is_valid(found, x, y)
    assert (found.permutation >= 0).sum() == min(rows, columns)


AWKWARD = {
    "multiple": lambda rng: rng.normal(size=(2, 96, 8)),
    "no multiple": lambda rng: rng.normal(size=(2, 101, 8)),
    "one over": lambda rng: rng.normal(size=(2, 33, 8)),
    "larger first": lambda rng: (rng.normal(size=(120, 8)), rng.normal(size=(70, 8))),
    "larger second": lambda rng: (rng.normal(size=(7, 8)), rng.normal(size=(90, 8))),
    "one location": lambda rng: (rng.normal(size=(1, 8)), rng.normal(size=(90, 8))),
    "three channels": lambda rng: rng.normal(size=(2, 90, 3)),
    "one channel": lambda rng: rng.normal(size=(2, 90, 1)),
    "constant": lambda rng: np.ones((2, 90, 4)) * np.array([1.0, -2.0])[:, None, None],
    "constant and not": lambda rng: (np.ones((90, 4)), rng.normal(size=(90, 4))),
    "dead locations": lambda rng: rng.normal(size=(2, 90, 4)) * (rng.random((2, 90, 1)) > 0.7),
    "dead image": lambda rng: (np.zeros((90, 4)), rng.normal(size=(90, 4))),
    "rank one": lambda rng: rng.normal(size=(2, 90, 1)) * np.ones(5),
    "tiny": lambda rng: rng.normal(size=(2, 90, 5)) * 1e-30,
    "huge": lambda rng: rng.normal(size=(2, 90, 5)) * 1e30,
    "offset": lambda rng: rng.normal(size=(2, 90, 5)) * 1e-3 + 100.0,
}


@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rewindowed_rises_with_rounds_up_to_the_optimum_on_awkward_images(kind, dtype):
    x, y = (t.astype(dtype) for t in AWKWARD[kind](np.random.default_rng(3)))
    unit = scale(x, y)
    optimum = best(x.astype(np.float64) @ y.astype(np.float64).T)
    last = -np.inf
    for rounds in range(1, 7):
        found = match(x, y, Rewindowed(32, rounds))
        assert_is_valid(found, x, y)
        assert found.value >= last - 1e-6 * unit
        assert found.value <= optimum + 1e-6 * unit
        assert match(x, y, Rewindowed(32, rounds)).permutation.tolist() == found.permutation.tolist()
        assert found.bound >= found.value
        last = found.value


@pytest.mark.parametrize("kind", AWKWARD)
def test_rewindowed_with_windows_solved_exactly_gives_equal_values_both_ways(kind):
    x, y = AWKWARD[kind](np.random.default_rng(3))
    for rounds in (1, 3, 6):
        first, second = match(x, y, Rewindowed(32, rounds, 1e-9)), match(y, x, Rewindowed(32, rounds, 1e-9))
        assert first.value == pytest.approx(second.value, abs=1e-6 * scale(x, y))


def test_rewindowed_with_its_usual_gap_gives_equal_values_both_ways():
    x, y = np.random.default_rng(0).normal(size=(2, 96, 8))
    first, second = match(x, y, Rewindowed(32)), match(y, x, Rewindowed(32))
    assert first.value == pytest.approx(second.value, abs=1e-6 * scale(x, y))


@pytest.mark.parametrize("images", ["field", "clusters"])
def test_rewindowed_loses_less_than_half_of_what_batch_optimal_loses_on_structured_features(images):
    lost = {BatchOptimal(64): 0.0, Rewindowed(64): 0.0}
    for seed in range(0, 6, 2):
        if images == "field":
            x, y = smooth_field(24, 12, seed), smooth_field(24, 12, seed + 1)
        else:
            x, y = clusters(576, 12, seed), clusters(576, 12, seed + 1)
        optimum = best(x.astype(np.float64) @ y.T)
        for method in lost:
            lost[method] += optimum - match(x, y, method).value
    assert 0 <= lost[Rewindowed(64)] < lost[BatchOptimal(64)] / 2


@pytest.mark.parametrize("method", [BatchOptimal(512), Rewindowed(256)])
def test_20000_locations_never_need_the_full_affinity(method, monkeypatch):
    largest = 0

    def measured(product):
        def inner(*arguments, **named):
            nonlocal largest
            found = product(*arguments, **named)
            largest = max(largest, found.numel() * found.element_size())
            return found

        return inner

    for name in ("bmm", "matmul", "einsum", "mm"):
        monkeypatch.setattr(torch, name, measured(getattr(torch, name)))
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 20_000, 8)).astype(np.float32)
    found = match(*z, method)
    assert 0 < largest <= _BLOCK_BYTES
    assert_is_valid(found, *z)
    # Its affinity of 1.6 GB does not count against the budget, as none exists.
    # Of the two images of a pair, rsm() takes the later one first.
    expected = match(z[1], z[0], method).value
    assert rsm(z, matching=method, kernel="linear", memory="1MB").values[0, 1] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(CostError, match=r"1\.6 GB"):
        rsm(z, matching="optimal", memory="1GB")


@pytest.mark.parametrize("method", [BatchOptimal, Rewindowed])
def test_windows_and_rounds_below_one_are_refused(method):
    with pytest.raises(MatchingError, match="window must be at least 1, found 0"):
        method(window=0)
    with pytest.raises(MatchingError, match="rounds must be at least 1, found 0"):
        Rewindowed(rounds=0)
    with pytest.raises(MatchingError, match=r"rounds must be a whole number, found 1\.5"):
        Rewindowed(rounds=1.5)


@pytest.mark.parametrize("name", ["batch-optimal", "rewindowed"])
def test_an_affinity_alone_is_refused_with_what_to_use_instead(name):
    with pytest.raises(MatchingError, match=rf"needs the tokens of both images; use match\(x, y, '{name}'\)"):
        match_affinity(np.ones((3, 3)), name)


def test_mirrored_channels_give_equal_values_both_ways():
    half = np.random.default_rng(0).normal(size=(12, 130, 2))
    for x, y in np.concatenate([half, -half], axis=2).reshape(6, 2, 130, 4):
        first, second = match(x, y, Rewindowed(32, 1, 1e-9)), match(y, x, Rewindowed(32, 1, 1e-9))
        assert first.value == pytest.approx(second.value, abs=1e-6 * scale(x, y))


class InSmallWindows(Rewindowed):
    """The default method, with windows so small that few locations fill several."""

    most_exact, usual_window = 32, 64


LARGER = {
    "multiple": lambda rng: rng.normal(size=(2, 256, 8)),
    "no multiple": lambda rng: rng.normal(size=(2, 201, 8)),
    "one over": lambda rng: rng.normal(size=(2, 65, 8)),
    "larger first": lambda rng: (rng.normal(size=(220, 8)), rng.normal(size=(70, 8))),
    "larger second": lambda rng: (rng.normal(size=(7, 8)), rng.normal(size=(190, 8))),
    "one location": lambda rng: (rng.normal(size=(1, 8)), rng.normal(size=(190, 8))),
    "one channel": lambda rng: rng.normal(size=(2, 190, 1)),
    "constant": lambda rng: np.ones((2, 190, 4)) * np.array([1.0, -2.0])[:, None, None],
    "constant and not": lambda rng: (np.ones((190, 4)), rng.normal(size=(190, 4))),
    "dead locations": lambda rng: np.maximum(rng.normal(size=(2, 190, 4)), 0) * (rng.random((2, 190, 1)) > 0.7),
    "dead image": lambda rng: (np.zeros((190, 4)), rng.normal(size=(190, 4))),
    "tiny": lambda rng: rng.normal(size=(2, 190, 5)) * 1e-30,
    "huge": lambda rng: rng.normal(size=(2, 190, 5)) * 1e30,
    "offset": lambda rng: rng.normal(size=(2, 190, 5)) * 1e-3 + 100.0,
    "opposite": lambda rng: np.abs(rng.normal(size=(2, 190, 5))) * np.array([1.0, -1.0])[:, None, None],
}


@pytest.mark.parametrize("kind", LARGER)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounds_of_its_own_choice_stay_between_identity_and_optimum_on_awkward_images(kind, dtype):
    x, y = (t.astype(dtype) for t in LARGER[kind](np.random.default_rng(3)))
    unit, method = scale(x, y), InSmallWindows()
    optimum = best(np.matmul(*(t if k == 0 else t.T for k, t in enumerate(padded(x, y)))))
    found, turned = match(x, y, method), match(y, x, method)
    assert_is_valid(found, x, y)
    assert match(x, y, "identity").value <= found.value <= optimum + 1e-6 * unit
    assert turned.value == pytest.approx(found.value, abs=1e-9 * unit)
    assert found.bound >= found.value
    assert match(x, y, method).permutation.tolist() == found.permutation.tolist()
    # Where rounds could be cut short at once, the optimum would be far: the least of these is 0.95 on noise.
    assert optimum - found.value <= 0.06 * max(abs(optimum), 0.1 * unit)


@pytest.mark.parametrize("images", ["field", "clusters"])
def test_rounds_of_its_own_choice_come_close_to_the_optimum_on_structured_features(images):
    share = []
    for seed in range(0, 6, 2):
        if images == "field":
            x, y = smooth_field(24, 12, seed), smooth_field(24, 12, seed + 1)
        else:
            x, y = clusters(576, 12, seed), clusters(576, 12, seed + 1)
        share.append(match(x, y, InSmallWindows()).value / best(x.astype(np.float64) @ y.T))
    assert min(share) > 0.985  # in windows of 64 of 576 locations


def test_a_smaller_tolerance_takes_further_rounds_and_never_loses():
    x, y = smooth_field(24, 12, 0), smooth_field(24, 12, 1)
    values = [match(x, y, InSmallWindows(tolerance=tolerance)).value for tolerance in (1, 0.03, 0.003, 0.0003)]
    assert values == sorted(values)
    assert len(set(values)) == 4


@pytest.mark.parametrize(("rows", "columns"), [(300, 300), (300, 200), (90, 300), (1024, 1024)])
def test_up_to_1024_locations_the_default_is_exact_and_certified(rows, columns):
    rng = np.random.default_rng(rows + columns)
    x, y = (rng.normal(size=(n, 6)).astype(np.float32) for n in (rows, columns))
    found, optimal = match(x, y, "rewindowed"), match(x, y, "optimal")
    assert found.permutation.tolist() == optimal.permutation.tolist()
    assert found.value == optimal.value
    assert found.bound == pytest.approx(optimal.bound, rel=1e-8)
    assert found.share == found.value / found.bound > 1 - 1e-5


def test_beyond_1024_locations_a_share_of_the_optimum_can_be_proven():
    x, y = smooth_field(40, 12, 0), smooth_field(40, 12, 1)
    optimum = match(x, y, "optimal").value
    found = match(x, y, "rewindowed", certify=True)
    assert 0.99 < found.share <= found.value / optimum < 1
    assert match(x, y, "rewindowed").share < found.share
    assert match(-x[:3], x[:3] * 0, "rewindowed").share is None


def test_given_windows_rounds_and_gaps_are_those_of_earlier_versions():
    # Computed by the version before rounds were chosen. No whole numbers: a processor's last bits would sort equal
    # coordinates.
    z = np.random.default_rng(5).normal(size=(2, 96, 8)).astype(np.float32)
    for options, value in (((16, 1), 360.00118), ((16, 3), 476.58188), ((32, 3), 495.22826), ((32, 6), 505.72509)):
        assert match(*z, Rewindowed(*options, 1e-9)).value == pytest.approx(value, rel=1e-6)
    assert Rewindowed(window=128) == Rewindowed(128, 3, 0.01)
    assert Rewindowed(rounds=6) == Rewindowed(256, 6, 0.01)
    assert Rewindowed(gap=0.5) == Rewindowed(256, 3, 0.5)
    assert matching_text(Rewindowed(256)) == "Rewindowed(window=256, rounds=3, gap=0.01)"  # as in earlier stores
    assert matching_text(Rewindowed()) == "Rewindowed(tolerance=0.0025)"
    assert matching_text(Rewindowed(tolerance=0.1)) == "Rewindowed(tolerance=0.1)"
    for options in ({"window": 9}, {"rounds": 2}, {"gap": 0.1}):
        with pytest.raises(MatchingError, match="tolerance ends the rounds"):
            Rewindowed(**options, tolerance=0.1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 5, 64, 70])
def test_windows_improved_from_earlier_prices_end_within_epsilon_of_their_optimum(size, dtype):
    from rsm_probe.matching.compiled.cpu_auction import improve_windows

    affinities = np.random.default_rng(size).normal(size=(3, size, size)).astype(dtype)
    before, optima = affinities.trace(axis1=1, axis2=2), np.array([best(one) for one in affinities])
    prices, positions = np.zeros((3, size), dtype), np.empty((3, size), np.int64)
    for first, epsilon in ((True, 0.0), (False, 1e-2), (False, 1e-4)):
        improve_windows(affinities, prices, epsilon, first, 500, positions)
        assert (np.sort(positions, axis=1) == np.arange(size)).all()
        values = np.take_along_axis(affinities, positions[:, :, None], axis=2).sum(axis=(1, 2))
        assert (values >= before - 1e-4).all()
        if not first:
            assert (values >= optima - size * epsilon - 1e-4).all()
    # Within a single bid per row, windows cannot be solved, and keep their pairs.
    crowded = np.ones((1, size, size), dtype)
    crowded[0, :, 0] = 5
    improve_windows(crowded, np.zeros((1, size), dtype), 1e-4, False, 1, positions[:1])
    assert positions[0].tolist() == list(range(size))
