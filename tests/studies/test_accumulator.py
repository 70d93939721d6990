import numpy as np
import pytest
import torch

import rsm_probe
from rsm_probe import Accumulator, Means, Probe, Representation
from rsm_probe.errors import ComparisonError, CostError, LayerError, RepresentationError


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
        with torch.no_grad(), Probe(small_resnet, "blocks") as probe:
            if means is not None:
                probe.reduce = means.summed if reducing else None
                small_resnet(images)
                means.update(probe)
            accumulator = Accumulator(matchings, means=means)
            probe.reduce = accumulator.reducer() if reducing else None
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


def test_batches_add_up_as_a_ratio_of_sums():
    batches = [random_layers(size, size, a=(4, 3), b=(9, 5)) for size in (10, 11)]
    accumulator = Accumulator(matchings=("identity",))
    for batch in batches:
        accumulator.update(batch)
    hsic = {"aa": 0.0, "ab": 0.0, "bb": 0.0}
    for batch in batches:
        rsms = {name: rsm_probe.rsm(kept.tokens, matching="identity", kernel="linear") for name, kept in batch.items()}
        for pair in hsic:
            hsic[pair] += rsm_probe.hsic(rsms[pair[0]], rsms[pair[1]])
    assert accumulator.cka.values[0, 1] == pytest.approx(hsic["ab"] / np.sqrt(hsic["aa"] * hsic["bb"]), abs=1e-12)
    assert accumulator.result().dataset.attrs["images"] == 21


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
    with pytest.raises(ComparisonError, match=r"other layers.*model/a/identity/linear became model/b/identity/linear"):
        accumulator.update(random_layers(6, 0, b=(4, 3)))
    with pytest.raises(RepresentationError, match=r"'b' of model 'm2' holds 5 images, others 6"):
        Accumulator().update({"m1": batch, "m2": random_layers(5, 0, b=(4, 3))})
    with pytest.raises(LayerError, match="'model' captured nothing"):
        Accumulator().update(Probe(torch.nn.Linear(2, 2), "all"))
    with pytest.raises(LayerError, match="no model was given"):
        Accumulator().update({})
    with pytest.raises(ComparisonError, match="no batch was seen"):
        Accumulator().result()
    with pytest.raises(ComparisonError, match="matchings is empty"):
        Accumulator(matchings=())
    with pytest.raises(CostError, match="memory budget"):
        Accumulator(memory=10).update(batch)
    with pytest.raises(RepresentationError, match="hold no layer 'a'"):
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
    with pytest.raises(LayerError, match=r"keep names no layer of this sweep: 'layr'; nearest: 'layer'"):
        Accumulator(keep=["layr"]).update(random_layers(6, 0, layer=(4, 3)))


def test_a_batch_that_fails_takes_later_ones_with_it(monkeypatch):
    # On a device that works ahead, a later batch waits while an earlier one fails; it must not count in its place.
    from rsm_probe.studies.submitted import Batch

    accumulator = Accumulator(matchings=("identity",))
    accumulator.update(random_layers(6, 0, a=(4, 3)))
    failing, later = Batch([]), Batch([])
    accumulator._waiting = [failing, later]
    finished = []

    def finish(batch):
        if batch is failing:
            raise KeyboardInterrupt
        finished.append(batch)

    monkeypatch.setattr(accumulator, "_finish_batch", finish)
    with pytest.raises(KeyboardInterrupt):
        accumulator.finish()
    accumulator.finish()
    assert finished == []
    assert accumulator.batches == 1


def test_names_that_do_not_fit_the_batch_are_refused_at_once():
    with pytest.raises(RepresentationError, match="ids holds 2 names for a batch of 6 images"):
        Accumulator().update(random_layers(6, 0, a=(4, 3)), ids=["a", "b"])


def test_methods_that_are_not_symmetric_run_both_ways():
    from rsm_probe.matching.protocol import Matching
    from rsm_probe.similarity.between import rsm

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
    with pytest.raises(ComparisonError, match="of another accumulator"):
        mine.update(probe)
    with pytest.raises(ComparisonError, match=r"layer 'layer1.0' of model 'b' was reduced by the reducer\('model'\)"):
        other.update({"b": probe})
