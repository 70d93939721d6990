"""Sweeps say how far CKA of exact matching can be from theirs, streamed or stored, now or from the store later."""

import numpy as np
import pytest
import torch
from torch import nn

from rsm_probe import Accumulator, sweep
from rsm_probe.matching.methods.optimal import Auction
from rsm_probe.probe import Representation
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.streaming import RsmStore, SweepResult

KERNELS = ("linear", "cosine")
ESTIMATORS = ("unbiased", "biased")
ROUGH = ("identity", Auction(gap=0.003))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU()).eval()


@pytest.fixture(scope="module")
def images() -> ImageSet:
    pictures = torch.rand(23, 3, 15, 15, generator=torch.Generator().manual_seed(1))
    return ImageSet("noise", [f"{k:02d}" for k in range(len(pictures))], lambda k: pictures[k])


def swept(images, matchings, **keys) -> SweepResult:
    models = {"a": network(0), "b": network(1)}
    return sweep(models, images, ["1", "3"], matchings, KERNELS, batch_size=8, estimators=ESTIMATORS, workers=1, **keys)


@pytest.fixture(scope="module")
def stored(images, tmp_path_factory):
    where = tmp_path_factory.mktemp("sweep")
    return where, swept(images, ROUGH, out=where)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_exact_matching_lies_in_the_interval_of_an_early_stopped_auction(images, stored, estimator):
    proven = stored[1].proven_by(estimator)
    truth = swept(images, ("identity", Auction(gap=1e-9))).cka_by(estimator).values
    low, high = proven["low"].values, proven["high"].values
    assert (low <= truth).all()
    assert (truth <= high).all()
    assert (np.abs(truth - proven["value"].values) > 1e-4).any(), "the early stop is not one"
    approximate = proven["matching_a"].values == "optimal"
    assert (high > low)[approximate][:, ~approximate].all()
    assert (high == low)[~approximate][:, ~approximate].all()
    assert np.median(high - low) < 0.5


def test_streamed_stored_and_reopened_intervals_are_the_same(images, stored):
    where, result = stored
    streamed, reopened = swept(images, ROUGH), SweepResult.open(where / "result.zarr")
    later = RsmStore.open(where).result(KERNELS, ESTIMATORS)
    for estimator in ESTIMATORS:
        expected = result.proven_by(estimator)
        assert set(expected) == {"value", "low", "high"}
        for other in (streamed, reopened, later):
            for name, values in expected.items():
                np.testing.assert_allclose(other.proven_by(estimator)[name], values, atol=1e-12)
    compared = RsmStore.open(where).select(kernels=KERNELS).compare("cka-biased")
    np.testing.assert_allclose(compared["proven_low"], result.proven_by("biased")["low"], atol=1e-12)


def test_the_repr_says_how_far_off_values_can_be(images, stored):
    proven = stored[1].proven
    most = max(float((proven["high"] - proven["value"]).max()), float((proven["value"] - proven["low"]).max()))
    assert f"; CKA of exact matching lies within ±{most:.2g} of every cell)" in repr(stored[1])
    result = swept(images, ("identity", "greedy"))
    unknown = (result.proven["low"] == -1) & (result.proven["high"] == 1)
    assert int(unknown.sum()) > 100, "greedy proves nothing but what norms allow"
    assert f" of {256 - int(unknown.sum())} of 256 cells)" in repr(result)
    assert result.proven["value"].equals(result.cka)
    certain = swept(images, ("identity", "translation"))
    assert certain.proven is None
    assert "exact matching" not in repr(certain)


def test_results_of_earlier_versions_open_without_intervals(stored, tmp_path):
    _, result = stored
    names = [name for name in result.dataset if str(name).startswith("proven_")]
    SweepResult(result.dataset.drop_vars(names)).save(tmp_path / "old.zarr")
    old = SweepResult.open(tmp_path / "old.zarr")
    assert old.proven is None
    assert old.cka.equals(result.cka)
    assert "exact matching" not in repr(old)


def layers(seed: int) -> dict[str, Representation]:
    generator = torch.Generator().manual_seed(seed)
    tokens = {name: torch.rand(9, 16, 3, generator=generator) for name in "xy"}
    return {name: Representation(z, z[:, :0], None) for name, z in tokens.items()}


def test_a_continued_accumulator_proves_as_much_and_one_of_an_earlier_state_nothing():
    whole, first, second, third = (Accumulator((Auction(gap=0.003),)) for _ in range(4))
    for part, accumulator in ((0, whole), (1, whole), (0, first)):
        accumulator.update(layers(part))
    first.finish()
    state = first.state()
    second.restore(state)
    second.update(layers(1))
    for name, values in whole.result().proven.items():
        np.testing.assert_array_equal(second.result().proven[name], values)
    third.restore({name: values for name, values in state.items() if not name.startswith("certified_")})
    third.update(layers(1))
    assert third.result().proven is None
    np.testing.assert_array_equal(third.cka, whole.cka)
