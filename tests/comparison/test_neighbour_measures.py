"""Mutual nearest neighbours and CKNNA against the formulas of Huh et al. (2024), written out image by image."""

import numpy as np
import pytest

from rsm_probe import RSM, cka
from rsm_probe.comparison import (
    CKNNA,
    MEASURES,
    MutualNeighbours,
    NeighbourJaccard,
    bootstrap,
    bootstrap_batches,
    cknna,
    compare,
    compare_batches,
    mutual_neighbours,
    permutation_test,
)
from rsm_probe.comparison.grid import RsmKey
from rsm_probe.errors import ComparisonError


def cosine_rsms(images=30, width=6, noise=1.0, seed=0):
    """Cosine similarities of related features, as in the paper."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(images, width))
    features = (x, x + noise * rng.normal(size=x.shape))
    return [(f @ f.T) / np.outer(np.linalg.norm(f, axis=1), np.linalg.norm(f, axis=1)) for f in features]


def symmetric(images, seed):
    """Not a covariance, with negative entries and eigenvalues."""
    a = np.random.default_rng(seed).normal(size=(images, images))
    return a + a.T


def with_copies(images, seed):
    """Images that are the same, so that whole rows are."""
    x = np.random.default_rng(seed).normal(size=(images, 4))
    x[images // 2 :] = x[: images - images // 2]
    return x @ x.T


def hubs(images, seed):
    """Two images are alike to all others, which are equally unlike each other, and to each other most."""
    k = np.full((images, images), 0.1)
    first, second = seed % images, (seed + 3) % images
    for hub, level in ((first, 0.6), (second, 0.5)):
        k[hub] = k[:, hub] = level
    k[first, second] = k[second, first] = 0.7
    np.fill_diagonal(k, 1.0)
    return k


KINDS = {
    "cosines": lambda images, seed: cosine_rsms(images, seed=seed),
    "any symmetric": lambda images, seed: [symmetric(images, seed), symmetric(images, seed + 100)],
    "tied": lambda images, seed: [np.round(3 * k) / 3 for k in cosine_rsms(images, seed=seed)],
    "copies": lambda images, seed: [with_copies(images, seed), symmetric(images, seed)],
    "hubs": lambda images, seed: [hubs(images, seed), symmetric(images, seed)],
    "distances": lambda images, seed: [2 * k - 2 for k in cosine_rsms(images, seed=seed)],
}


def nearest(k, image, count):
    """The most similar other images, the earlier ones first among equals."""
    others = [j for j in range(len(k)) if j != image]
    return set(sorted(others, key=lambda j: (-k[image, j], j))[:count])


def mutual(k, l, count):  # noqa: E741
    """Equation 11, with the sets of equation 10."""
    return np.mean([len(nearest(k, i, count) & nearest(l, i, count)) / count for i in range(len(k))])


def u_centred(k):
    """Song et al. 2012, as Székely & Rizzo 2014 write it."""
    n = len(k)
    result = np.zeros((n, n))
    sums = [sum(k[i, j] for j in range(n) if j != i) for i in range(n)]
    for i in range(n):
        for j in range(n):
            if i != j:
                result[i, j] = k[i, j] - sums[i] / (n - 2) - sums[j] / (n - 2) + sum(sums) / ((n - 1) * (n - 2))
    return result


def aligned(k, l, count):  # noqa: E741
    """Equation 18 with equations 16 and 17; the matrices are centred."""

    def align(first, second):
        common = [(i, j) for i in range(len(k)) for j in nearest(first[0], i, count) & nearest(second[0], i, count)]
        return sum(first[1][i, j] * second[1][i, j] for i, j in common)

    x, y = (k, u_centred(k)), (l, u_centred(l))
    return align(x, y) / np.sqrt(align(x, x) * align(y, y))


def published(k, l, count):  # noqa: E741
    """Zeros but for common neighbours, then HSIC_1 of Song et al. 2012, equation 5, of matrices that are asymmetric."""
    n = len(k)

    def hsic(first, second):
        a, b = np.zeros((n, n)), np.zeros((n, n))
        for i in range(n):
            for j in nearest(first, i, count) & nearest(second, i, count):
                a[i, j], b[i, j] = first[i, j], second[i, j]
        one = np.ones(n)
        whole = (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2))
        return (np.trace(a @ b) + whole - 2 * (one @ a @ b @ one) / (n - 2)) / (n * (n - 3))

    own = hsic(k, k), hsic(l, l)
    return hsic(k, l) / np.sqrt(own[0] * own[1]) if min(own) > 0 else np.nan


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("neighbours", [1, 2, 5, 15])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_written_out_formulas(kind, neighbours, seed):
    k, l = KINDS[kind](16, seed)  # noqa: E741
    grid = MutualNeighbours(neighbours).grid(k[None], l[None])
    assert grid[0, 0] == pytest.approx(mutual(k, l, neighbours), abs=1e-12)
    assert CKNNA(neighbours).grid(k[None], l[None])[0, 0] == pytest.approx(aligned(k, l, neighbours), abs=1e-10)


@pytest.mark.parametrize("neighbours", [2, 5, 15])
@pytest.mark.parametrize("kind", ["cosines", "any symmetric", "tied", "copies"])
def test_masked_first_is_what_the_published_code_computes(kind, neighbours):
    k, l = KINDS[kind](16, 3)  # noqa: E741
    stacks = np.stack([k, l]), np.stack([l, k, k + l])
    grid = CKNNA(neighbours, masked_first=True).grid(*stacks)
    expected = [[published(a, b, neighbours) for b in stacks[1]] for a in stacks[0]]
    np.testing.assert_allclose(grid, expected, atol=1e-10, rtol=1e-10)


def test_masked_first_depends_on_a_shift_and_on_the_order_of_the_two_and_the_default_does_not():
    k, l = cosine_rsms(50)  # noqa: E741
    assert abs(cknna(k, l, masked_first=True) - cknna(l, k, masked_first=True)) > 1e-4
    assert abs(cknna(k, l, masked_first=True) - cknna(k - 1, l - 1, masked_first=True)) > 0.1
    assert cknna(k, l) == pytest.approx(cknna(l, k), abs=1e-12)
    assert cknna(k, l) == pytest.approx(cknna(k - 1, l - 1), abs=1e-12)


@pytest.mark.parametrize("masked_first", [False, True])
@pytest.mark.parametrize("kind", ["cosines", "any symmetric", "tied", "copies"])
def test_with_all_neighbours_cknna_is_unbiased_cka(kind, masked_first):
    k, l = KINDS[kind](12, 1)  # noqa: E741
    assert cknna(k, l, 11, masked_first) == pytest.approx(cka(k, l), abs=1e-10)


def test_the_diagonal_does_not_count():
    k, l = cosine_rsms()  # noqa: E741
    for measure in (MutualNeighbours(4), CKNNA(4), CKNNA(4, masked_first=True)):
        before = measure.grid(k[None], l[None])
        assert measure.grid((k + 50 * np.eye(30))[None], (l - np.diag(np.arange(30.0)))[None]) == pytest.approx(before)


def test_mutual_neighbours_and_jaccard_are_functions_of_each_other_image_by_image():
    # In a ring, each image shares the same number of neighbours with its place in the other ring.
    places = np.arange(12)
    ring = -np.minimum((places[:, None] - places) % 12, (places - places[:, None]) % 12).astype(float) + 12
    other = ring[np.ix_(places * 5 % 12, places * 5 % 12)]
    share = mutual_neighbours(ring, other, 6)
    assert 0 < share < 1
    assert NeighbourJaccard(6).grid(ring[None], other[None])[0, 0] == pytest.approx(share / (2 - share), abs=1e-12)


def test_unrelated_rsms_share_neighbours_by_chance():
    shares = [mutual_neighbours(symmetric(41, seed), symmetric(41, seed + 500), 8) for seed in range(40)]
    assert np.mean(shares) == pytest.approx(8 / 40, abs=0.01)
    assert mutual_neighbours(symmetric(10, 0), symmetric(10, 1), 9) == 1


def test_constant_rsms_have_no_value_and_are_named():
    k, l = cosine_rsms()  # noqa: E741
    rows = np.arange(30.0)
    flat = {"same": np.full((30, 30), 0.3), "only its diagonal": np.eye(30)}
    for name, rsm in flat.items():
        for measure in ("mutual-knn", "cknna"):
            with pytest.warns(UserWarning, match=rf"{measure} is undefined \(NaN\) for 1 RSMs.*first {name}"):
                grid = compare({name: rsm, "k": k}, measure=measure, eigenvalues=False)
            assert np.isnan(grid.values).tolist() == [[True, True], [True, False]]
        with pytest.raises(ComparisonError, match=r"the second RSM is constant.*mutual-knn is undefined"):
            mutual_neighbours(k, rsm)
    # The sum of two numbers, one per image: centring leaves nothing.
    with pytest.raises(ComparisonError, match=r"the first RSM is constant.*cknna is undefined"):
        cknna(rows[:, None] + rows, l)


def test_an_rsm_that_is_not_aligned_with_itself_has_no_value_masked_first():
    # A row of images, each nearer to its right: neighbours are not mutual, and less alike on the left.
    places = np.cumsum([0, *range(10, 0, -1)]).astype(float)
    k, l = -np.abs(places[:, None] - places), cosine_rsms(11)[0]  # noqa: E741
    assert np.isnan(published(k, k, 1))
    assert np.isnan(CKNNA(1, masked_first=True).grid(k[None], np.stack([k, l]))).all()
    assert np.isfinite(CKNNA(1).grid(k[None], np.stack([k, l]))).all()
    with pytest.raises(ComparisonError, match=r"the first RSM .*or has no positive alignment with itself"):
        cknna(RSM.from_array(k, kind="similarity"), l, 1, masked_first=True)


def test_wrong_input_is_named():
    k, l = cosine_rsms(12)  # noqa: E741
    for compared, name in ((cknna, "cknna"), (mutual_neighbours, "mutual-knn")):
        for count in (0, 12, 2.0, True, "5"):
            with pytest.raises(ComparisonError, match=f"{name} needs between 1 and 11 neighbours for 12 images, found"):
                compared(k, l, count)
        with pytest.raises(ComparisonError, match="12 and 11 images"):
            compared(k, l[1:, 1:], 3)
        with pytest.raises(ComparisonError, match="not symmetric"):
            compared(np.triu(k), l, 3)
    with pytest.raises(ComparisonError, match="cknna needs at least 4 images, found 3"):
        cknna(k[:3, :3], l[:3, :3], 1)
    with pytest.raises(ComparisonError, match="masked_first must be True or False, found 'yes'"):
        CKNNA(5, "yes")
    ids = [*"abcdefghijkl"]
    with pytest.raises(ComparisonError, match="another order, first at position 0"):
        cknna(RSM.from_array(k, ids), RSM.from_array(l, ids[::-1]), 3)


def test_images_cannot_be_drawn_but_mini_batches_and_orders_can():
    k, l = cosine_rsms(40, noise=0.3)  # noqa: E741
    for name in ("cknna", "mutual-knn"):
        with pytest.raises(ComparisonError, match=f"{name} cannot count an image more than once"):
            bootstrap({"k": k}, {"l": l}, name, repeats=5)
        assert permutation_test({"k": k}, {"l": l}, name, repeats=19)["p"].item() == 0.05

    class Batches:
        keys = tuple(RsmKey("net", str(n), n, "optimal", "linear") for n in range(2))
        sizes = (20,) * 8

        @staticmethod
        def rsms(batch):
            return np.stack(cosine_rsms(20, seed=batch))

    for measure in (CKNNA(5), MutualNeighbours(5)):
        values = [measure.grid(Batches.rsms(b), Batches.rsms(b)) for b in range(8)]
        np.testing.assert_allclose(compare_batches(Batches, measure), np.mean(values, axis=0), atol=1e-12)
        drawn = bootstrap_batches(Batches, measure, repeats=50)
        assert drawn.attrs["drawn"] == "mini-batches"
        assert (drawn["low"] <= drawn["value"] + 1e-12).all()


def test_both_are_found_by_name():
    assert MEASURES["cknna"] == CKNNA(10)
    assert MEASURES["mutual-knn"] == MutualNeighbours(10)
