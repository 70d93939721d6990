import warnings

import numpy as np
import pytest
import torch

import rsm_probe
from rsm_probe import Accumulator, Probe
from rsm_probe.errors import (
    ComparisonError,
    CostError,
    LayerError,
    MatchingError,
    RepresentationError,
    RsmProbeError,
)
from rsm_probe.probe import Representation
from rsm_probe.streaming import Means
from rsm_probe.streaming.batch_consumer import Backlog


def layer(tokens: torch.Tensor) -> Representation:
    return Representation(tokens, tokens[:, :0], None)


def random_layers(count: int, seed: int, **shapes: tuple[int, int]) -> dict[str, Representation]:
    generator = torch.Generator().manual_seed(seed)
    return {name: layer(torch.randn(count, *shape, generator=generator)) for name, shape in shapes.items()}


def test_own_loop_equals_rsm_and_cka(small_resnet):
    images = torch.randn(12, 3, 32, 32)
    accumulator = Accumulator(kernels=("linear", "rbf"), keep=["*"])
    with torch.no_grad(), Probe(small_resnet, "blocks") as probe:
        small_resnet(images)
        accumulator.update(probe)
        kept = dict(probe.representations)
    grid = accumulator.cka
    assert grid.sizes == {"rsm_a": 16, "rsm_b": 16}
    computed = [
        rsm_probe.rsm(kept[str(name)].tokens, matching=str(matching), kernel=str(kernel))
        for name, matching, kernel in zip(
            grid.layer_a.values, grid.matching_a.values, grid.kernel_a.values, strict=True
        )
    ]
    for estimator in ("unbiased", "biased"):
        values = accumulator.result().cka_by(estimator).values
        expected = [[rsm_probe.cka(a, b, estimator) for b in computed] for a in computed]
        np.testing.assert_allclose(values, expected, atol=1e-9)
    stored = accumulator.result().rsms.isel(batch=0).values
    np.testing.assert_allclose(stored, np.stack([one.values for one in computed]), rtol=1e-9)


@pytest.mark.parametrize("matchings", [("identity",), ("identity", "optimal")])
@pytest.mark.parametrize("centering", [None, "location-mean"])
def test_layers_that_are_reduced_as_they_run_give_the_same(small_resnet, matchings, centering):
    images = torch.randn(12, 3, 32, 32)
    grids = []
    for reducing in (False, True):
        means = None if centering is None else Means(centering)
        if means is not None:
            reduce = means.reducer() if reducing else None
            with torch.no_grad(), Probe(small_resnet, "blocks", reduce=reduce) as probe:
                small_resnet(images)
                means.update(probe)
        accumulator = Accumulator(matchings, means=means)
        reduce = accumulator.reducer() if reducing else None
        with torch.no_grad(), Probe(small_resnet, "blocks", reduce=reduce) as probe:
            for _ in range(2):
                small_resnet(images)
                accumulator.update(probe)
        grids.append(accumulator.cka)
    np.testing.assert_allclose(grids[1].values, grids[0].values, atol=1e-9)
    assert grids[1].coords.to_dataset().equals(grids[0].coords.to_dataset())


class Overwriting(torch.nn.Module):
    """What its first part gave, tokens as they are matched, is changed in place at once."""

    def __init__(self):
        super().__init__()
        self.patch, self.first = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.first(self.patch(x).flatten(2).transpose(1, 2).contiguous()).mul_(0)


def test_what_the_model_overwrites_is_matched_as_it_was():
    model, images = Overwriting(), torch.randn(30, 3, 18, 18)
    results = []
    for reducing in (False, True):
        accumulator = Accumulator(("optimal",), keep=["first"], workers=1)
        reduce = accumulator.reducer() if reducing else None
        with torch.no_grad(), Probe(model, "first", reduce=reduce) as probe:
            model(images)
            accumulator.update(probe)
        results.append(accumulator.result().rsms.values)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-12)


def test_nan_in_a_reduced_layer_names_layer_and_image():
    model, images = Overwriting(), torch.randn(6, 3, 8, 8)
    images[4, 0, 2, 2] = float("nan")
    accumulator = Accumulator(("identity",))
    with torch.no_grad(), Probe(model, "first*", reduce=accumulator.reducer()) as probe:
        model(images)
        with pytest.raises(RepresentationError, match=r"layer 'first' of model 'model' holds NaN .* image 'cat'"):
            accumulator.update(probe, ids=["a", "b", "c", "d", "cat", "e"])


PAIRS = {"unbiased": lambda n: n * (n - 3), "biased": lambda n: (n - 1) ** 2}


@pytest.mark.parametrize("estimator", PAIRS)
@pytest.mark.parametrize("sizes", [(10, 11), (10, 10), (17, 5, 4)])
def test_batches_add_up_as_a_ratio_of_sums_over_pairs(estimator, sizes):
    batches = [random_layers(size, seed, a=(4, 3), b=(9, 5)) for seed, size in enumerate(sizes)]
    accumulator = Accumulator(matchings=("identity",), estimators=(estimator,))
    for batch in batches:
        accumulator.update(batch)
    hsic = {"aa": 0.0, "ab": 0.0, "bb": 0.0}
    for batch, size in zip(batches, sizes, strict=True):
        rsms = {name: rsm_probe.rsm(kept.tokens, matching="identity", kernel="linear") for name, kept in batch.items()}
        for pair in hsic:
            weight = PAIRS[estimator](size) if len(set(sizes)) > 1 else 1  # of equal batches, it cancels out
            hsic[pair] += weight * rsm_probe.comparison.hsic(rsms[pair[0]], rsms[pair[1]], estimator)
    assert accumulator.cka.values[0, 1] == pytest.approx(hsic["ab"] / np.sqrt(hsic["aa"] * hsic["bb"]), abs=1e-12)
    assert accumulator.result().dataset.attrs["images"] == sum(sizes)


def related_layers(count: int) -> dict[str, Representation]:
    """Two layers that share a part of what they see in each image."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(count, 2, 6, generator=generator)
    mixed = [shared @ torch.randn(6, 8, generator=generator) for _ in "ab"]
    noise = [torch.randn(count, 2, 8, generator=generator) for _ in "ab"]
    return {name: layer(m + 2 * n) for name, m, n in zip("ab", mixed, noise, strict=True)}


def cut(layers: dict[str, Representation], numbers: torch.Tensor) -> dict[str, Representation]:
    return {name: layer(kept.tokens[numbers]) for name, kept in layers.items()}


def test_a_small_last_batch_does_not_outweigh_the_others():
    everything, values = related_layers(200), {}
    for size in (49, 50):  # 49 leaves a last batch of 4
        values[size] = []
        for seed in range(12):
            accumulator = Accumulator(("identity",), estimators=("unbiased",), workers=1)
            for numbers in torch.from_numpy(np.random.default_rng(seed).permutation(200)).split(size):
                accumulator.update(cut(everything, numbers))
            values[size].append(accumulator.cka.values[0, 1])
    whole = rsm_probe.cka(*[rsm_probe.rsm(z.tokens, matching="identity", kernel="linear") for z in everything.values()])
    assert np.mean(values[49]) == pytest.approx(whole, abs=0.02)
    assert np.std(values[49]) < 1.5 * np.std(values[50])


@pytest.mark.parametrize(("estimators", "small"), [(("unbiased", "biased"), 3), (("unbiased",), 1), (("biased",), 1)])
def test_a_last_batch_that_is_too_small_is_left_out_of_everything(estimators, small):
    everything = related_layers(16 + small)
    accumulators = [Accumulator(("identity", "optimal"), estimators=estimators, keep=["*"]) for _ in range(2)]
    for start in (0, 8):
        for accumulator in accumulators:
            accumulator.update(cut(everything, torch.arange(start, start + 8)))
    with pytest.warns(
        UserWarning, match=f"{small} images is too small for {estimators[0]} CKA.*left out.*drop_last=True"
    ):
        accumulators[0].update(cut(everything, torch.arange(16, 16 + small)), ids=[f"i{k}" for k in range(small)])
    with pytest.warns(
        UserWarning, match=f"covers 16 images in 2 batches; a last batch of {small} images was too small"
    ):
        found = accumulators[0].result()
    expected = accumulators[1].result()
    for estimator in estimators:
        np.testing.assert_array_equal(found.cka_by(estimator).values, expected.cka_by(estimator).values)
    assert (found.dataset.attrs["images"], found.dataset.attrs["batches"]) == (16, 2)
    assert (found.dataset.attrs["left_out"], expected.dataset.attrs["left_out"]) == (small, 0)
    assert (accumulators[0].images, accumulators[0].batches) == (16, 2)
    np.testing.assert_array_equal(found.rsms.values, expected.rsms.values)


@pytest.mark.parametrize("count", [3, 8])
def test_only_the_very_last_batch_may_be_too_small(count):
    everything = related_layers(24)
    accumulator = Accumulator(("identity",))
    accumulator.update(cut(everything, torch.arange(8)))
    before = accumulator.cka.values
    with pytest.warns(UserWarning, match="left out"):
        accumulator.update(cut(everything, torch.arange(3)))
    continued = Accumulator(("identity",))
    continued.restore(accumulator.state())
    for one in (accumulator, continued):
        with pytest.raises(ComparisonError, match=r"number 2, was left out: a batch of 3 images.*drop_last=True"):
            one.update(cut(everything, torch.arange(8, 8 + count)))
        with pytest.warns(UserWarning, match="a last batch of 3 images"):
            np.testing.assert_array_equal(one.cka.values, before)


def test_a_loader_that_drops_the_last_batch_is_the_way_out():
    images = torch.randn(19, 3, 6, 6)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    for dropping in (False, True):
        accumulator = Accumulator(("identity", "optimal"))
        with torch.no_grad(), Probe(net, "*", reduce=accumulator.reducer()) as probe, warnings.catch_warnings():
            warnings.simplefilter("error" if dropping else "ignore")
            for batch in torch.utils.data.DataLoader(images, batch_size=8, drop_last=dropping):
                net(batch)
                accumulator.update(probe)
            assert accumulator.result().dataset.attrs["images"] == 16


def test_sums_of_an_earlier_version_are_not_continued():
    accumulator = Accumulator(("identity",))
    old = {"batches": np.array(1), "images": np.array(8), "keys": np.array([["m", "a", "0", "identity", "linear"]])}
    old |= {"smallest": np.array([np.nan]), "hsic_unbiased": np.eye(1), "hsic_biased": np.eye(1)}
    with pytest.raises(ComparisonError, match=r"earlier version.*start again"):
        accumulator.restore(old)
    with pytest.raises(ComparisonError, match=r"not the state of an accumulator for biased, unbiased CKA: .* missing"):
        accumulator.restore({})
    accumulator.update(random_layers(8, 0, a=(4, 3)))
    with pytest.raises(ComparisonError, match="not the state of an accumulator for biased CKA"):
        Accumulator(("identity",), estimators=("biased",)).restore(accumulator.state())


@pytest.mark.parametrize("make", [lambda: Accumulator(("identity",)), lambda: Means("channel-mean")])
def test_each_pass_is_taken_once(make):
    nets = {name: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)) for name in "ab"}
    taking, images = make(), torch.randn(6, 3, 8, 8)
    with torch.no_grad(), Probe(nets["a"], "0") as one, Probe(nets["b"], "0") as other:
        for net in nets.values():
            net(images)
        taking.update({"a": one, "b": other})
        with pytest.raises(LayerError, match="probe of model 'a' was already added; call the model on the next batch"):
            taking.update({"a": one, "b": other})
        nets["a"](images)
        with pytest.raises(LayerError, match="probe of model 'b' was already added"):
            taking.update({"a": one, "b": other})
        nets["b"](images)
        taking.update({"a": one, "b": other})
        assert taking.images == 12
        make().update({"a": one, "b": other})  # everything that takes passes counts for itself


@pytest.mark.parametrize("make", [lambda: Accumulator(("identity",)), lambda: Means("channel-mean")])
@pytest.mark.parametrize("first", [lambda probe: probe, lambda probe: probe.representations])
def test_what_a_probe_held_is_taken_once(make, first):
    net, taking = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), make()
    with torch.no_grad(), Probe(net, "0") as probe:
        net(torch.randn(6, 3, 8, 8))
        taking.update(first(probe))
        for again in (probe, probe.representations, dict(probe.representations), {"model": probe.representations}):
            with pytest.raises(LayerError, match="probe of model 'model' was already added"):
                taking.update(again)
        net(torch.randn(6, 3, 8, 8))
        taking.update(probe.representations)
    assert taking.images == 12


class Encoding(torch.nn.Module):
    """A model with another way in than its forward, as CLIP has."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)

    def encode(self, x):
        return self.conv(x)

    def forward(self, x):
        return self.encode(x).relu()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [lambda: Accumulator(("identity",)), lambda: Means("channel-mean")])
def test_a_probe_that_another_way_in_emptied_is_refused(make):
    net, taking = Encoding().eval(), make()
    with torch.no_grad(), Probe(net, "conv") as probe:
        net(torch.randn(6, 3, 8, 8))
        net.encode(torch.randn(6, 3, 8, 8))
        with pytest.raises(
            LayerError, match=r"'model' captured nothing; call the model .* outside of the model's forward"
        ):
            taking.update(probe)
        net(torch.randn(6, 3, 8, 8))
        taking.update(probe)
    assert taking.images == 6


def test_a_pass_that_was_refused_may_be_taken():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    accumulator = Accumulator(("identity",))
    with torch.no_grad(), Probe(net, "0") as probe:
        net(torch.randn(6, 3, 8, 8))
        with pytest.raises(RepresentationError, match="ids holds 2 names"):
            accumulator.update(probe, ids=["a", "b"])
        accumulator.update(probe)
    assert accumulator.images == 6


def test_models_of_different_depth_are_compared_with_each_other():
    models = {"deep": random_layers(8, 0, x=(4, 3), y=(4, 3), z=(2, 6)), "flat": random_layers(8, 1, u=(1, 7))}
    accumulator = Accumulator(matchings=("identity",))
    accumulator.update(models)
    result = accumulator.result()
    assert list(result.cka.depth_a.values) == [0, 1, 2, 0]
    assert result.models == ["deep", "flat"]
    assert result.layers("deep") == ["x", "y", "z"]
    assert result.grid("deep", "flat").shape == (3, 1)


def test_means_equal_centring_of_the_whole():
    batches = [random_layers(6, seed, a=(5, 3)) for seed in range(3)]
    for centering in ("location-mean", "channel-mean"):
        means = Means(centering)
        for batch in batches:
            means.update(batch)
        accumulator = Accumulator(matchings=("optimal",), means=means, keep=["a"])
        for batch in batches:
            accumulator.update(batch)
        everything = torch.cat([batch["a"].tokens for batch in batches])
        axes = (0,) if centering == "location-mean" else (0, 1)
        centred = everything - everything.double().mean(dim=axes, keepdim=True).float()
        expected = rsm_probe.rsm(centred[:6], kernel="linear").values
        np.testing.assert_allclose(accumulator.result().rsms.values[0, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_layer_model_and_image(value):
    batch = random_layers(6, 0, good=(4, 3), bad=(4, 3))
    batch["bad"].tokens[2, 1, 0] = value
    with pytest.raises(RepresentationError, match=r"'bad' of model 'net'.*'cat\.png'"):
        Accumulator().update({"net": batch}, ids=["a", "b", "cat.png", "d", "e", "f"])
    with pytest.raises(RepresentationError, match="image 2 of this batch"):
        Accumulator().update(batch)


@pytest.mark.parametrize("scale", [2.0**100, 2.0**-90])
def test_scale_changes_no_digit_and_is_not_taken_for_infinite(scale):
    batch, scaled = random_layers(6, 0, a=(4, 3), b=(9, 2)), {}
    for name, kept in batch.items():
        scaled[name] = layer(kept.tokens.abs() * scale)
        batch[name] = layer(kept.tokens.abs())
    grids = []
    for layers in (batch, scaled):
        accumulator = Accumulator(kernels=("linear", "cosine"))
        accumulator.update(layers)
        grids.append(accumulator.cka.values)
    np.testing.assert_allclose(*grids, rtol=1e-12)


def test_wrong_use_is_said():
    batch = random_layers(6, 0, a=(4, 3))
    with pytest.raises(ComparisonError, match="3 images is too small for unbiased CKA, which needs 4"):
        Accumulator().update(random_layers(3, 0, a=(4, 3)))
    Accumulator(estimators=("biased",)).update(random_layers(3, 0, a=(4, 3)))
    accumulator = Accumulator()
    accumulator.update(batch)
    with pytest.raises(
        ComparisonError, match=r"layers of this batch differ.*model/a/identity/linear became model/b/identity/linear"
    ):
        accumulator.update(random_layers(6, 0, b=(4, 3)))
    with pytest.raises(RepresentationError, match=r"'b' of model 'm2' holds 5 images, but the first layer holds 6"):
        Accumulator().update({"m1": batch, "m2": random_layers(5, 0, b=(4, 3))})
    with pytest.raises(LayerError, match="'model' captured nothing"):
        Accumulator().update(Probe(torch.nn.Sequential(torch.nn.Linear(2, 2)), "all"))
    with pytest.raises(LayerError, match="no model given"):
        Accumulator().update({})
    with pytest.raises(ComparisonError, match="no batch was added"):
        Accumulator().result()
    with pytest.raises(ComparisonError, match="matchings is empty"):
        Accumulator(matchings=())
    with pytest.raises(CostError, match="memory budget"):
        Accumulator(memory=10).update(batch)
    with pytest.raises(RepresentationError, match="no mean for layer 'a'"):
        Accumulator(means=Means("channel-mean")).update(batch)


def test_constant_layer_is_undefined_and_the_others_are_not():
    batch = random_layers(8, 0, a=(4, 3), b=(4, 3))
    batch["dead"] = layer(torch.zeros(8, 4, 3))
    accumulator = Accumulator(matchings=("identity",))
    accumulator.update(batch)
    with pytest.warns(UserWarning, match="model/dead/identity/linear"):
        values = accumulator.cka.values
    assert np.isnan(values[2]).all()
    assert np.isfinite(values[:2, :2]).all()


def test_state_continues_to_the_same_numbers():
    batches = [random_layers(6, seed, a=(5, 3), b=(2, 4)) for seed in range(4)]
    whole = Accumulator()
    for batch in batches:
        whole.update(batch)
    first = Accumulator()
    for batch in batches[:2]:
        first.update(batch)
    first.finish()
    second = Accumulator()
    second.restore(first.state())
    for batch in batches[2:]:
        second.update(batch)
    np.testing.assert_array_equal(whole.cka.values, second.cka.values)
    assert second.images == 24


def test_names_that_cannot_be_told_apart_or_found_are_refused():
    from rsm_probe.similarity.kernels import RBF

    with pytest.raises(ComparisonError, match="kernels holds 'rbf' more than once"):
        Accumulator(kernels=(RBF(1.0), RBF(2.0)))
    with pytest.raises(LayerError, match=r"keep='layr' matches no layer of this sweep; nearest: 'layer'"):
        Accumulator(keep=["layr"]).update(random_layers(6, 0, layer=(4, 3)))


def test_a_batch_that_fails_takes_later_ones_with_it():
    # On a device that works ahead, a later batch waits while an earlier one fails; it must not count in its place.
    finished = []

    def finish(batch):
        if batch == "failing":
            raise KeyboardInterrupt
        finished.append(batch)

    backlog = Backlog(finish)
    for batch in ("first", "failing", "later"):
        backlog.add(batch, ahead=2)
    assert finished == ["first"]
    with pytest.raises(KeyboardInterrupt):
        backlog.finish()
    backlog.finish()
    assert finished == ["first"]
    backlog.add("afresh")
    assert finished == ["first", "afresh"]


def test_names_that_do_not_fit_the_batch_are_refused_at_once():
    with pytest.raises(RepresentationError, match="ids holds 2 names for a batch of 6 images"):
        Accumulator().update(random_layers(6, 0, a=(4, 3)), ids=["a", "b"])


def test_methods_that_are_not_symmetric_run_both_ways():
    from rsm_probe.matching.matching import Matching
    from rsm_probe.pairs.compute import rsm

    class FirstBest(Matching):
        name, exact, symmetric, needs_affinity, growth = "first-best", False, False, True, 2.0

        def permutation(self, affinity):
            order, free = [], set(range(affinity.shape[1]))
            for row in affinity:
                order.append(max(free, key=lambda column, row=row: row[column]))
                free.discard(order[-1])
            return np.array(order)

    z = torch.randn(5, 6, 3)
    found = rsm(z, matching=FirstBest(), kernel="linear").values
    turned = rsm(z.flip(0), matching=FirstBest(), kernel="linear").values[::-1, ::-1]
    np.testing.assert_allclose(found, turned, rtol=1e-6)
    for i, j in ((0, 1), (2, 4)):
        ways = []
        for affinity in ((z[i] @ z[j].T).numpy(), (z[j] @ z[i].T).numpy()):
            ways.append(affinity[np.arange(6), FirstBest().permutation(affinity)].sum())
        assert found[i, j] == pytest.approx(max(ways), rel=1e-5)


def test_the_smallest_eigenvalue_of_matched_rsms_is_reported():
    accumulator = Accumulator(kernels=("linear", "cosine"), keep=["*"])
    for seed in range(2):
        accumulator.update(random_layers(40, seed, a=(4, 2)))
    result = accumulator.result()
    expected = np.linalg.eigvalsh(result.rsms.values)[:, :, 0].min(axis=0)
    found = result.dataset["smallest_eigenvalue"].values
    assert np.isnan(found).tolist() == [True, True, False, False]
    np.testing.assert_allclose(found[2:], expected[2:], atol=1e-12)
    assert (found[2:] < -1e-3).all(), "or the RSMs are positive and nothing was tested"


class Twice(torch.nn.Module):
    """One module, called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3), torch.nn.ReLU()

    def forward(self, x):
        return self.relu(self.b(self.relu(self.a(x))))


@pytest.mark.parametrize("centering", ["location-mean", "channel-mean"])
def test_layers_that_run_twice_are_centred_each_by_its_own_mean(centering):
    torch.manual_seed(0)
    model, images = Twice().eval(), torch.randn(12, 3, 9, 9)
    found = rsm_probe.sweep(model, images, ["*"], ("identity",), batch_size=6, centering=centering)
    assert found.layers("Twice") == ["a", "relu#0", "b", "relu#1"]
    explicit = rsm_probe.sweep(
        model, images, ["a", "relu#0", "b", "relu#1"], ("identity",), batch_size=6, centering=centering
    )
    np.testing.assert_allclose(found.cka.values, explicit.cka.values, atol=1e-12)


def test_what_another_accumulator_reduced_is_refused(small_resnet):
    mine, other = Accumulator(("identity",)), Accumulator(("optimal",))
    with torch.no_grad(), Probe(small_resnet, "layer1.0", reduce=other.reducer()) as probe:
        small_resnet(torch.randn(6, 3, 32, 32))
    with pytest.raises(ComparisonError, match=r"of another Accumulator; use the reducer.* of this Accum"):
        mine.update(probe)
    with pytest.raises(ComparisonError, match=r"layer 'layer1.0' of model 'b' was reduced by the reducer\('model'\)"):
        other.update({"b": probe})


FULL_RANGE = [2.0**-490, 2.0**-100, 2.0**100, 2.0**126, 2.0**490]


@pytest.mark.parametrize("scale", FULL_RANGE)
@pytest.mark.parametrize("centering", [None, "location-mean"])
def test_outputs_of_any_size_give_the_same_cka(scale, centering):
    """Squares of their similarities leave even 64 bits."""
    grids = []
    for factor in (1.0, scale):
        means = None if centering is None else Means(centering)
        batches = [
            {
                name: layer(kept.tokens.double() * factor)
                for name, kept in random_layers(6, k, a=(4, 3), b=(5, 2)).items()
            }
            for k in range(2)
        ]
        for batch in batches if means else ():
            means.update(batch)
        accumulator = Accumulator(kernels=("linear", "cosine", "rbf"), means=means, keep=["*"])
        for batch in batches:
            accumulator.update(batch)
        grids.append([accumulator.cka.values, accumulator.result().bootstrap(repeats=5)["std"].values])
    np.testing.assert_allclose(grids[1], grids[0], rtol=1e-9, atol=1e-12)


def test_batches_of_very_different_size_are_summed_as_they_are():
    tokens = [random_layers(8, seed, a=(4, 3), b=(5, 2)) for seed in range(3)]
    factors = [2.0**-200, 2.0**200, 2.0**199]
    accumulator = Accumulator(("identity",))
    for batch, factor in zip(tokens, factors, strict=True):
        accumulator.update({name: layer(kept.tokens.double() * factor) for name, kept in batch.items()})
    expected = Accumulator(("identity",))
    for batch, factor in zip(tokens[1:], (2.0, 1.0), strict=True):  # beside these, the first is nothing
        expected.update({name: layer(kept.tokens.double() * factor) for name, kept in batch.items()})
    np.testing.assert_allclose(accumulator.cka.values, expected.cka.values, rtol=1e-12)


@pytest.mark.parametrize("kernel", ["linear", "cosine", "rbf"])
@pytest.mark.parametrize("centering", [None, "location-mean"])
def test_images_of_very_different_size_do_not_vanish_beside_each_other(kernel, centering):
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor([1, 1e-24, 1e-30, 1e-24, 1e-12, 1e20, 1e19, 1e-30])[:, None, None]
    tokens = {name: torch.randn(8, 3, 4, generator=generator) * sizes for name in "ab"}
    means = None if centering is None else Means(centering)
    if means is not None:
        means.update({name: layer(z) for name, z in tokens.items()})
    accumulator = Accumulator(("identity",), kernels=(kernel,), means=means, keep=["*"])
    accumulator.update({name: layer(z) for name, z in tokens.items()})
    for found, z in zip(accumulator.result().rsms.values[0], tokens.values(), strict=True):
        flat = z.double()
        flat = (flat - (0 if means is None else flat.mean(dim=0))).float().double().flatten(1).numpy()
        products, norms = flat @ flat.T, (flat**2).sum(axis=1)
        expected = {"linear": products, "cosine": products / np.sqrt(np.outer(norms, norms))}
        distances = norms[:, None] + norms - 2 * products
        distances[distances < 1.2e-7 * (norms[:, None] + norms)] = 0
        width = np.median(distances[~np.eye(8, dtype=bool)])
        expected["rbf"] = np.exp(-distances / (2 * width)) if width else (distances == 0).astype(float)
        scale = np.sqrt(np.outer(norms, norms)) if kernel == "linear" else 1.0
        np.testing.assert_allclose(found / scale, expected[kernel] / scale, atol=1e-5)


def test_what_leaves_the_range_of_numbers_names_the_layer():
    huge = {"small": layer(torch.randn(6, 4, 3)), "huge": layer(torch.full((6, 4, 3), 1e200, dtype=torch.float64))}
    with pytest.raises(MatchingError, match=r"layer 'huge' of model 'net': the largest token .*1e\+200"):
        Accumulator().update({"net": huge})
    means = Means("location-mean")
    far = {"a": layer(torch.full((6, 4, 3), 3e38) * torch.tensor([1, -1, -1, -1, -1, -1.0])[:, None, None])}
    means.update(far)
    with pytest.raises(RepresentationError, match=r"layer 'a' of model 'model': image 0 .* overflows torch.float32"):
        Accumulator(means=means).update(far)


def test_means_are_over_the_same_images_for_every_layer():
    means = Means("channel-mean")
    means.update(random_layers(6, 0, a=(4, 3), b=(5, 2)))
    before = means.state()
    for wrong, message in (
        (random_layers(6, 1, a=(4, 3)), "layer 'b' of model 'model' is missing from this batch but was in"),
        (
            random_layers(6, 1, a=(4, 3), b=(5, 2), c=(5, 2)),
            "layer 'c' of model 'model' is in this batch but not in",
        ),
        (random_layers(6, 1, a=(4, 3), b=(5, 3)), "layer 'b' had 1 locations of 2 channels"),
        (random_layers(6, 1, a=(4, 3)) | random_layers(5, 1, b=(5, 2)), "layer 'b' of model 'model' holds 5 images"),
        (random_layers(6, 1, a=(4, 3)) | {"b": layer(torch.full((6, 5, 2), torch.nan))}, "layer 'b' .* NaN"),
    ):
        with pytest.raises(RepresentationError, match=message):
            means.update(wrong)
        assert means.images == 6
        for name, values in before.items():  # nothing of what was refused counts
            np.testing.assert_array_equal(means.state()[name], values)


class Named:
    """An object of nobody's kind."""


WRONG = {
    "matchings": (None, 5, (), ("identity", "identity"), ("identity", 3), {"identity": 1}),
    "kernels": (None, 5, (), ("linear", "linear"), (None,), "gaussian"),
    "estimators": (None, 5, (), ("biased", "biased"), "debiased"),
    "means": (5, "location-mean", Named()),
    "keep": (None, 5, [3], b"a", {"a": 1}),
    "workers": (0, -1, True, 1.5, "2", float("nan"), Named()),
    "memory": (None, float("nan"), True, -1, 0, "1XB", 1.5, [1]),
    "on_batch": (5, "print"),
    "on_pairs": (None, 5),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_arguments_of_the_wrong_kind_are_refused_by_name(name, value):
    with pytest.raises(RsmProbeError, match=rf"{name.rstrip('s')}"):
        Accumulator(**{name: value})


@pytest.mark.parametrize("ids", [5, None, "abcdef", [1, 2, 3, 4, 5, 6], [None] * 6, ["a\0"] * 6, {"a": 1}, [b"a"] * 6])
def test_names_of_images_are_texts(ids):
    batch = random_layers(6, 0, a=(4, 3))
    for what in ("ids", "labels"):
        with pytest.raises(RepresentationError, match=rf"{what}(\[0\])? "):
            Accumulator(("identity",)).update(batch, **{what: ids})
    with pytest.raises(RepresentationError, match=r"ids(\[0\])? "):
        Means("channel-mean").update(batch, ids)


@pytest.mark.parametrize(
    ("probed", "message"),
    [
        (None, "give a Probe after a forward pass.*found NoneType"),
        ([1], "found list"),
        (torch.zeros(6, 4, 3), "found Tensor"),
        ({"a": torch.zeros(6, 4, 3)}, "layer 'a' of model 'model' must be a Representation, found Tensor"),
        ({"m": {"a": 5}}, "layer 'a' of model 'm' must be a Representation, found int"),
        ({3: layer(torch.zeros(6, 4, 3))}, "the name of a layer of model 'model' must be text, found 3"),
        ({3: {"a": layer(torch.zeros(6, 4, 3))}}, "the name of a model must be text, found 3"),
        ({"a": layer(torch.zeros(6, 4))}, r"layer 'a' of model 'model': tokens must have shape .* found \(6, 4\)"),
        ({"a": layer(torch.zeros(6, 0, 3))}, r"found \(6, 0, 3\)"),
        ({"a": layer(torch.zeros(6, 4, 3, dtype=torch.complex64))}, "layer 'a' .* complex"),
        ({"a": layer(torch.zeros(6, 4, 3, device="meta"))}, "layer 'a' .* meta device"),
    ],
)
def test_what_is_neither_a_probe_nor_representations_is_refused(probed, message):
    for taking in (Accumulator(), Means("channel-mean")):
        with pytest.raises((LayerError, RepresentationError), match=message):
            taking.update(probed)


def test_what_something_else_reduced_is_refused(small_resnet):
    means, accumulator = Means("channel-mean"), Accumulator(("identity",))
    for reduce, taking in ((means.reducer(), accumulator), (accumulator.reducer(), means)):
        with torch.no_grad(), Probe(small_resnet, "layer1.0", reduce=reduce) as probe:
            small_resnet(torch.randn(6, 3, 32, 32))
            with pytest.raises(ComparisonError, match=r"layer 'layer1\.0' .* of another (Means|Accumulator); use the"):
                taking.update(probe)
    with torch.no_grad(), Probe(small_resnet, "layer1.0", reduce=lambda layer, kept: kept.tokens.sum()) as probe:
        small_resnet(torch.randn(6, 3, 32, 32))
        for taking in (means, accumulator):
            with pytest.raises(RepresentationError, match=r"found Tensor.* no reduce= but the reducer"):
                taking.update(probe)


@pytest.mark.parametrize("make", [lambda: Accumulator(("identity",)), lambda: Means("channel-mean")])
def test_what_a_reducer_took_counts_once_and_only_for_its_own_pass(make):
    net, taking = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), make()
    with torch.no_grad(), Probe(net, "0", reduce=taking.reducer()) as probe:
        net(torch.randn(5, 3, 8, 8))  # a pass that nobody asks for
        net(torch.randn(6, 3, 8, 8))
        with pytest.raises(RepresentationError, match="ids holds 2 names"):
            taking.update(probe, ids=["a", "b"])
        held = dict(probe.representations)
        taking.update(held)
        for again in (probe, held):
            with pytest.raises(LayerError, match="probe of model 'model' was already added"):
                taking.update(again)
        net(torch.randn(6, 3, 8, 8))
        taking.update(probe)
    assert (taking.images, taking.batches) == (12, 2)
