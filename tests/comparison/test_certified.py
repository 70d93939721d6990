"""Intervals for the CKA of exact matching: nothing within the bounds leaves them, and they are not much too wide."""

import itertools
from functools import partial

import numpy as np
import pytest

from rsm_probe import RSM, compare, rsm
from rsm_probe.comparison import compare_batches, get_estimator
from rsm_probe.comparison.certified import CertifiedSums
from rsm_probe.comparison.grid import RsmKey
from rsm_probe.errors import ComparisonError
from rsm_probe.matching.methods.optimal import Auction
from rsm_probe.similarity.kernels import RBF, Cosine, Kernel, Linear, highest_similarities

MEASURE = {"unbiased": "cka", "biased": "cka-biased"}
KERNELS = {"linear": Linear(), "cosine": Cosine(), "rbf": RBF()}


class Boxes:
    """RSMs of several mini-batches, with the highest that their bounds allow."""

    def __init__(self, low, high):
        self.low, self.high = low, high
        self.sizes = [len(stack[0]) for stack in low]
        self.keys = [RsmKey("net", f"layer{k}", k, "greedy", "linear") for k in range(len(low[0]))]

    def rsms(self, batch):
        return self.low[batch]

    def boxes(self, batch):
        return self.low[batch], self.high[batch]


def products(images, seed, gap, rsms=3):
    """Products that share a part of their features, upper bounds up to a share `gap` of the norms above, and norms."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(images, 6))
    features = shared + 0.7 * rng.normal(size=(rsms, images, 6)) + 0.3
    values = features @ features.transpose(0, 2, 1)
    norms = np.einsum("rii->ri", values)
    above = gap * rng.random(values.shape) ** 2 * np.sqrt(norms[:, :, None] * norms[:, None, :])
    above = np.tril(above, -1) + np.tril(above, -1).transpose(0, 2, 1)
    return values, np.minimum(values + above, np.sqrt(norms[:, :, None] * norms[:, None, :])), norms


def boxed(sizes, kernel, gap, exact=1):
    """RSMs under a kernel with their highest; the last `exact` of them are known exactly."""
    low, high = [], []
    for seed, size in enumerate(sizes):
        values, bounds, norms = products(size, seed, gap)
        bounds[len(bounds) - exact :] = values[len(bounds) - exact :]
        low.append(np.stack([kernel(g, n, n, same=True) for g, n in zip(values, norms, strict=True)]))
        ends = [
            highest_similarities(kernel, *one, one[2], same=True) for one in zip(values, bounds, norms, strict=True)
        ]
        high.append(np.stack(ends))
    return Boxes(low, high)


def cka_of(rsms, measure):
    return compare_batches(Boxes(rsms, rsms), measure).values


def centred(rsms, estimator):
    """All mini-batches of one RSM as one centred row."""
    one = get_estimator(estimator)
    return np.concatenate([one.rows(k[None])[0] * one.divisor(len(k)) ** 0.5 for k in rsms])


def extreme(boxes, estimator, a, b, sign, start):
    """RSMs a and b within their boxes whose CKA a search over vertices made large (sign 1) or small (-1)."""
    rng = np.random.default_rng(start)
    ends = [
        [low[k] + (high[k] - low[k]) * triangle(rng.integers(0, 2, low[k].shape)) for low, high in pairs_of(boxes)]
        for k in (a, b)
    ]
    for step in range(16):
        own, other = step % 2, 1 - step % 2
        k, l = centred(ends[own], estimator), centred(ends[other], estimator)  # noqa: E741
        slope = sign * (l / np.linalg.norm(l) - (k @ l) / np.linalg.norm(k) ** 2 / np.linalg.norm(l) * k)
        begin = 0
        for batch, (low, high) in enumerate(pairs_of(boxes)):
            row, column = get_estimator(estimator).pairs(len(low[0]))
            up = np.zeros(low[0].shape, bool)
            up[row, column] = up[column, row] = slope[begin : begin + len(row)] > 0
            ends[own][batch] = np.where(up, high[(a, b)[own]], low[(a, b)[own]])
            begin += len(row)
    return ends


def pairs_of(boxes):
    return list(zip(boxes.low, boxes.high, strict=True))


def triangle(values):
    return np.tril(values) + np.tril(values, -1).T


@pytest.mark.parametrize("estimator", MEASURE)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("sizes", "gap"), [((20,), 0.03), ((12, 9, 11), 0.1), ((5, 4), 0.3)])
def test_nothing_within_the_bounds_leaves_the_interval(estimator, kernel, sizes, gap):
    boxes, measure = boxed(sizes, KERNELS[kernel], gap), MEASURE[estimator]
    grid = compare_batches(boxes, measure)
    low, high, value = grid["proven_low"].values, grid["proven_high"].values, grid.values
    assert (low <= value).all()
    assert (value <= high).all()
    assert np.diagonal(low) == pytest.approx([1, 1, 1], abs=1e-14)
    assert np.diagonal(high) == pytest.approx([1, 1, 1], abs=1e-14)
    if gap <= 0.03:
        assert (high - low < 0.25).all()
    rng, apart = np.random.default_rng(0), ~np.eye(3, dtype=bool)
    for _ in range(40):
        shares = [rng.random(stack.shape) ** rng.choice([0.1, 1, 10]) for stack in boxes.low]
        shares = [np.tril(part) + np.tril(part, -1).transpose(0, 2, 1) for part in shares]
        drawn = [bottom + share * (top - bottom) for (bottom, top), share in zip(pairs_of(boxes), shares, strict=True)]
        inside = cka_of(drawn, measure)
        assert (low <= inside)[apart].all()
        assert (inside <= high)[apart].all()
    shrunk_were_left = 0
    for a, b in ((0, 1), (0, 2), (1, 2)):
        for sign, start in itertools.product((1, -1), range(3)):
            k, l = (centred(part, estimator) for part in extreme(boxes, estimator, a, b, sign, start))  # noqa: E741
            reached = k @ l / np.linalg.norm(k) / np.linalg.norm(l)
            assert low[a, b] <= reached <= high[a, b]
            middle, half = (low[a, b] + high[a, b]) / 2, (high[a, b] - low[a, b]) / 2
            shrunk_were_left += abs(reached - middle) > 0.7 * half
    assert shrunk_were_left or gap > 0.1, "intervals shrunk by a factor of 0.7 are left"


@pytest.mark.parametrize("estimator", MEASURE)
@pytest.mark.parametrize("gap", [1e-3, 0.01, 0.03])
def test_the_interval_is_close_to_what_all_vertices_of_both_boxes_reach(estimator, gap):
    boxes = boxed((5,), Linear(), gap, exact=0)
    (low, high), row = pairs_of(boxes)[0], np.tril_indices(5, -1)
    choices = np.array(list(itertools.product((0, 1), repeat=len(row[0]))))
    ends = []
    for k in range(2):
        every = np.repeat(low[k][None], len(choices), axis=0)
        every[:, row[0], row[1]] += choices * (high[k] - low[k])[row]
        every[:, row[1], row[0]] = every[:, row[0], row[1]]
        rows = get_estimator(estimator).rows(every)
        ends.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    reached = ends[0] @ ends[1].T
    grid = compare_batches(boxes, MEASURE[estimator])
    proven = float(grid["proven_low"][0, 1]), float(grid["proven_high"][0, 1])
    assert proven[0] <= reached.min() <= reached.max() <= proven[1]
    assert (proven[1] - proven[0]) / np.ptp(reached) < 1.5


def test_exact_rsms_have_no_interval_to_prove():
    boxes = boxed((9, 8), Linear(), 0.1, exact=3)
    assert "proven_low" not in compare_batches(boxes).coords
    boxes = boxed((9, 8), Linear(), 0.1, exact=2)
    grid = compare_batches(boxes)
    assert grid["proven_low"].values[1:, 1:].tolist() == grid.values[1:, 1:].tolist()
    assert (grid["proven_low"].values[0, 1:] < grid.values[0, 1:]).all()
    assert "proven_low" not in compare_batches(boxes, "rsa-pearson").coords


@pytest.mark.parametrize("scale", [1e-70, 1.0, 1e120])
def test_the_scale_of_an_rsm_changes_nothing(scale):
    boxes = boxed((9, 8), Linear(), 0.1)
    expected = compare_batches(boxes)
    factors = np.array([scale, 1, 1 / scale])[:, None, None]
    grid = compare_batches(Boxes([part * factors for part in boxes.low], [part * factors for part in boxes.high]))
    for end in ("proven_low", "proven_high"):
        np.testing.assert_allclose(grid[end], expected[end], atol=1e-11)


@pytest.mark.parametrize("estimator", MEASURE)
def test_a_batch_that_is_much_larger_counts_alone(estimator):
    boxes = boxed((9, 8), Linear(), 0.1)
    for ends in (boxes.low, boxes.high):
        ends[0], ends[1] = ends[0] * 2.0**-300, ends[1] * 2.0**300
    grid = compare_batches(boxes, MEASURE[estimator])
    alone = compare_batches(Boxes(boxes.low[1:], boxes.high[1:]), MEASURE[estimator])
    for end in ("proven_low", "proven_high"):
        np.testing.assert_allclose(grid[end], alone[end], atol=1e-11)


@pytest.mark.parametrize("estimator", MEASURE)
def test_blocks_and_states_change_nothing(estimator):
    boxes = boxed((9, 8), Linear(), 0.1, exact=0)
    whole, parts = (CertifiedSums(get_estimator(estimator)) for _ in range(2))
    for low, high in pairs_of(boxes):
        part_of = partial(lambda low, high, part: (low[part], high[part]), low, high)
        whole.add(part_of, [slice(0, 3)], len(low[0]))
        before, parts = parts.state(), CertifiedSums(get_estimator(estimator))
        parts.restore(before)
        parts.add(part_of, [slice(0, 2), slice(2, 3)], len(low[0]))
    values = compare_batches(boxes, MEASURE[estimator]).values
    for one, other in zip(whole.intervals(values), parts.intervals(values), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-11)


@pytest.mark.parametrize("estimator", MEASURE)
def test_rounding_of_rsms_that_differ_in_their_last_digits_is_counted(estimator):
    rng = np.random.default_rng(3)
    for offset in (1e3, 1e6):
        a, b = (triangle(rng.normal(size=(12, 12))) + offset for _ in range(2))
        boxes = Boxes([np.stack([a, b])], [np.stack([a * (1 + 1e-16) + 1e-9, b])])
        grid = compare_batches(boxes, MEASURE[estimator])
        k, l = (exactly_centred(one, estimator) for one in (a, b))  # noqa: E741
        exact = float((k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum()))
        assert float(grid["proven_low"][0, 1]) <= exact <= float(grid["proven_high"][0, 1])
        assert float(grid["proven_high"][0, 1] - grid["proven_low"][0, 1]) < 1e-3


def exactly_centred(k, estimator):
    """A centred RSM with three more decimal digits than float64."""
    k, n = k.astype(np.longdouble), len(k)
    if estimator == "biased":
        h = np.eye(n, dtype=np.longdouble) - np.longdouble(1) / n
        return h @ k @ h
    np.fill_diagonal(k, 0)
    sums, total = k.sum(axis=0) / (n - 2), k.sum() / ((n - 1) * (n - 2))
    k += total - sums - sums[:, None]
    np.fill_diagonal(k, 0)
    return k


def tokens(images=14, locations=16, seed=0):
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(images, 1, 5))
    return rng.normal(size=(images, locations, 5)) + common


@pytest.mark.parametrize("kernel", ["linear", "cosine", RBF(), RBF(sigma2=40.0)], ids=str)
@pytest.mark.parametrize("measure", MEASURE.values())
def test_rsms_of_an_early_stopped_auction_bracket_those_of_exact_matching(kernel, measure, tmp_path):
    layers = {name: tokens(seed=seed) + tokens(seed=9) for seed, name in enumerate(("a", "b"))}
    rough = {name: rsm(z, matching=Auction(gap=0.05), kernel=kernel) for name, z in layers.items()}
    if isinstance(kernel, RBF) and kernel.sigma2 is None:  # at the width of the values
        widths = {name: kernel.at_width_of(*parts(one), same=True) for name, one in rough.items()}
    else:
        widths = dict.fromkeys(layers, kernel)
    exact = {name: rsm(z, matching="scipy", kernel=widths[name]) for name, z in layers.items()}
    spatial = {f"{name}-spatial": rsm(z, matching="identity", kernel=kernel) for name, z in layers.items()}
    grid = compare({**rough, **spatial}, measure=measure)
    truth = compare({**exact, **spatial}, measure=measure)
    certain = np.arange(4) >= 2
    # Of the others, the last bit depends on the order of sums.
    apart = ~(certain[:, None] & certain) & ~np.eye(4, dtype=bool)
    assert (grid["proven_low"].values <= truth.values)[apart].all()
    assert (truth.values <= grid["proven_high"].values)[apart].all()
    assert (grid["proven_high"] - grid["proven_low"]).values[0, 1] < 0.5
    assert grid["proven_low"].values[2:, 2:].tolist() == grid.values[2:, 2:].tolist(), "identity is no approximation"
    # As a rectangle, and after a detour over the disk.
    rough["a"].save(tmp_path / "a.zarr")
    corner = compare({"a": RSM.open(tmp_path / "a.zarr")}, spatial, measure=measure)
    for end in ("proven_low", "proven_high"):
        np.testing.assert_allclose(corner[end], grid[end][:1, 2:], atol=1e-12)


def parts(one):
    return one.dataset["product"].values, one.dataset["norm_a"].values, one.dataset["norm_b"].values


class Cubed(Kernel):
    """A kernel of the user's."""

    name = "cubed"
    needs_norms = False

    def __call__(self, products, norms_x, norms_y, *, same):
        return products**3


def test_where_nothing_is_known_nothing_is_proven():
    z = tokens()
    grid = compare({"greedy": rsm(z, matching="greedy", kernel="linear"), "exact": rsm(z, matching="identity")})
    assert (float(grid["proven_low"][0, 1]), float(grid["proven_high"][0, 1])) == (-1, 1)
    # The name of a user's kernel does not tell what it computes.
    own = rsm(z, matching=Auction(gap=0.01), kernel=Cubed())
    grid = compare({"own": own, "exact": rsm(z, matching="identity")})
    assert (float(grid["proven_low"][0, 1]), float(grid["proven_high"][0, 1])) == (-1, 1)
    # A width that an earlier version did not note must not be taken for the default.
    noted = rsm(z, matching=Auction(gap=0.01), kernel=RBF(sigma2=3.0))
    del noted.dataset.attrs["sigma2"]
    assert np.isinf(noted.highest_values).all()
    assert rsm(z, matching="late-interaction", kernel="linear").highest_values is None
    assert RSM.from_array(np.eye(4)).highest_values is None
    # Another kernel forgets the width.
    other = rsm(z, matching=Auction(gap=0.01), kernel=RBF(sigma2=3.0)).with_kernel("rbf")
    assert np.isfinite(other.highest_values).all()


def test_kernels_that_do_not_grow_with_the_product_are_refused():
    class Falling(Cubed):
        name = "falling"

        def __call__(self, products, norms_x, norms_y, *, same):
            return -products

    values, bounds, norms = (part[0] for part in products(6, 0, 0.1))
    with pytest.raises(ComparisonError, match=r"kernel 'falling' is not increasing: it falls from"):
        highest_similarities(Falling(), values, bounds, norms, norms, same=True)


def test_undefined_values_stay_undefined():
    boxes = boxed((9,), Linear(), 0.1)
    boxes.low[0][0] = boxes.high[0][0] = 1.0
    with pytest.warns(UserWarning, match="undefined"):
        grid = compare_batches(boxes)
    assert np.isnan(grid["proven_low"].values[0]).all()
    assert np.isfinite(grid["proven_low"].values[1:, 1:]).all()
