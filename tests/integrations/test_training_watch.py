"""Recordings in hand-written loops: values, what they leave alone, what they refuse."""

import copy
import gc
import random
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rsm_probe
from rsm_probe.errors import (
    ComparisonError,
    ConfigError,
    ImageError,
    LayerError,
    ModelError,
    RepresentationError,
    StorageError,
)
from rsm_probe.integrations import TrainingWatch
from tests.integrations.watched_net import LAYERS, WatchedNet, examples, images, watched_net


def trained(net: nn.Module, watch: TrainingWatch | None, steps: int = 6) -> list[float]:
    """Losses of a loop with dropout, BatchNorm and gradients of two batches per step."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the generator that old code draws from
    random.seed(0)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    batches = DataLoader(examples(), batch_size=4, shuffle=True)
    losses = []
    net.train()
    net.layer1[0].eval()  # a flag of its own
    for number, batch in zip(range(2 * steps), batches, strict=False):
        scale = 1 + 0.1 * random.random() + 0.1 * np.random.rand()  # noqa: NPY002
        loss = scale * net(**batch)["loss"]
        loss.backward()
        losses.append(loss.item())
        if watch is not None and number % 2 == 0:
            watch.record(net, number)  # gradients are half accumulated
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def noisy(model, batch):
    """A call that draws from all generators."""
    random.random()
    np.random.rand()  # noqa: NPY002
    return model(batch + 0.0 * torch.rand(()))


def test_training_is_the_same_to_the_bit_with_and_without_a_watch():
    alone, watched = watched_net(), watched_net()
    watch = TrainingWatch(images(), layers=LAYERS, every=1, forward=noisy, centering="channel-mean")
    assert trained(alone, None) == trained(watched, watch)
    for name, value in alone.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    assert watch.steps == [0, 2, 4]
    assert {name: part.training for name, part in alone.named_modules()} == {
        name: part.training for name, part in watched.named_modules()
    }


def test_gradients_flags_and_settings_are_those_of_before():
    net = watched_net()
    net.stem.requires_grad_(False)
    net(pixel_values=images(4), labels=torch.tensor([0, 1, 2, 0]))["loss"].backward()
    before = {name: (p.grad, p.requires_grad, copy.deepcopy(p.grad)) for name, p in net.named_parameters()}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.autocast("cpu"):
        TrainingWatch(images(), layers=LAYERS).record(net, 0)
        assert torch.is_autocast_enabled("cpu")
    of_new_threads: list[int] = []
    thread = threading.Thread(target=lambda: of_new_threads.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    torch.set_num_threads(threads)
    assert of_new_threads == [2]
    assert torch.is_grad_enabled()
    for name, p in net.named_parameters():
        grad, required, values = before[name]
        assert p.grad is grad, name
        assert p.requires_grad == required
        assert grad is None or torch.equal(grad, values)


def test_a_buffer_that_a_call_replaces_is_put_back():
    net = watched_net()
    calls = net.calls

    def replacing(model, batch):
        model.calls = torch.ones((), dtype=torch.long)
        return model(batch)

    TrainingWatch(images(), layers=LAYERS, forward=replacing).record(net, 0)
    assert net.calls is calls
    assert calls == 0


def test_autocast_of_the_loop_does_not_reach_the_recording():
    net, watch, other = watched_net(), *(TrainingWatch(images(), layers=LAYERS, reference=watched_net(1)) for _ in "ab")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = watch.record(net, 0)
    without = other.record(net, 0)
    assert {k: v for k, v in within.items() if "cka" in k} == {k: v for k, v in without.items() if "cka" in k}


def test_making_a_watch_of_a_shuffling_loader_draws_nothing():
    loader = DataLoader(
        TensorDataset(images(), torch.zeros(10)), 5, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    torch.manual_seed(0)
    before = torch.get_rng_state()
    watch = TrainingWatch(loader, layers=LAYERS, reference=lambda: WatchedNet())
    first, second = (watch.record(watched_net(), step) for step in (0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert second["rsm/cka_last/optimal/layer1"] == pytest.approx(1.0, abs=1e-12)  # the loader repeats its order
    assert "rsm/cka_last/optimal/layer1" not in first


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("centering", [None, "location-mean"])
def test_values_are_those_of_a_sweep_over_the_states(estimator, centering):
    settings = {"layers": LAYERS, "kernels": ("linear", "rbf"), "batch_size": 6, "centering": centering}
    a, b, c = (watched_net(seed) for seed in range(3))
    watch = TrainingWatch(images(11), estimator=estimator, reference=c, **settings)  # batches of 6 and 5 images
    net = watched_net(0)
    watch.record(net, 0)
    net.load_state_dict(b.state_dict())
    watch.record(net, 10)
    net.load_state_dict(a.state_dict())
    metrics = watch.record(net, 20)
    states = {"first": a, "last": b, "reference": c}
    for model in states.values():
        model.eval()
    result = rsm_probe.sweep(states, images(11), estimators=(estimator,), **settings)
    expected = {
        f"rsm/cka_{name}/{matching}/{kernel}/{layer}": float(
            result.grid("first", name, matching, kernel=kernel).sel(layer_a=layer, layer_b=layer)
        )
        for name in states
        for matching in ("identity", "optimal")
        for kernel in ("linear", "rbf")
        for layer in LAYERS
    }
    found = {name: value for name, value in metrics.items() if "cka" in name}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    assert min(value for name, value in found.items() if "last" in name) < 0.99


def test_huge_and_constant_layers():
    net = watched_net()
    net.stem.weight.data *= 1e18
    net.layer1[0].weight.data.zero_()
    metrics = TrainingWatch(images(), layers=LAYERS).record(net, 0)
    assert metrics["rsm/cka_first/identity/stem"] == 1.0
    assert np.isnan(metrics["rsm/cka_first/identity/layer1"])


def test_the_schedule():
    watch = TrainingWatch(images(), layers=LAYERS, every=10)
    assert watch.due(0)
    watch.record(watched_net(), 0)
    # Some trainers count two optimizers, so that a multiple may be passed over.
    assert [step for step in range(1, 12) if watch.due(step)] == [10, 11]
    watch.record(watched_net(), 11)
    assert not watch.due(19)
    assert watch.due(20)
    listed = TrainingWatch(images(), layers=LAYERS, every=[100, 1, 10])
    listed.record(watched_net(), 2)
    assert [step for step in (3, 9, 10, 99, 100, 101) if listed.due(step)] == [10, 99, 100, 101]


def test_a_lost_layer_is_named_and_training_goes_on():
    net = watched_net()
    watch = TrainingWatch(images(), layers=["stem", "layer*"])
    net.layer2 = nn.Identity()
    net.forward = lambda x: net.head(net.layer2(net.layer1(torch.relu(net.stem(x)))).mean((2, 3)))
    watch.record(net, 0)
    del net.layer2
    net.forward = lambda x: net.head(net.layer1(torch.relu(net.stem(x))).mean((2, 3)))
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match=r"step 300 failed: the model has lost the layer 'layer2', which step 0 has"):
        assert watch.record(net, 300) == {}
    assert torch.equal(torch.get_rng_state(), before)
    assert net.training
    assert watch.steps == [0]
    net.layer2 = nn.Identity()
    net.forward = lambda x: net.head(net.layer2(net.layer1(torch.relu(net.stem(x)))).mean((2, 3)))
    assert watch.record(net, 400)["rsm/cka_last/identity/layer2"] == pytest.approx(1.0)
    assert watch.steps == [0, 400]


@pytest.mark.parametrize("change", ["named", "new", "unused"])
def test_layers_that_change_under_on_error_raise(change):
    net = watched_net()
    watch = TrainingWatch(images(), layers="layer*" if change == "new" else LAYERS, on_error="raise")
    watch.record(net, 0)
    if change == "named":
        del net.layer1
        net.forward = lambda x: net.head(net.stem(x).mean((2, 3)))
        expected = r"step 7 failed: .*layer1"
    elif change == "new":
        net.layer2, net.forward = nn.Identity(), lambda x: net.layer2(net.layer1(net.stem(x)))
        expected = r"step 7 failed: the model has the layer 'layer2', which step 0 lacks"
    else:
        net.forward = lambda x: net.head(net.stem(x).mean((2, 3)))
        expected = r"step 7 failed: .*layer1.*never ran"
    with pytest.raises(LayerError, match=expected):
        watch.record(net, 7)
    assert watch.steps == [0]
    assert all(part.training for part in net.modules())
    assert not net.stem._forward_hooks


def test_the_first_recording_always_raises():
    watch = TrainingWatch(images(), layers=["stem", "layer9"])
    with pytest.raises(LayerError, match=r"step 0 failed: .*'layer9'"):
        watch.record(watched_net(), 0)
    net = watched_net()
    net.forward = lambda x: x @ x  # an error of the model's own keeps its class
    with pytest.raises((RuntimeError, ModelError)):
        TrainingWatch(torch.randn(8, 3, 4, 5), layers=LAYERS).record(net, 0)


def test_a_diverged_model_is_reported_with_layer_and_step():
    net, watch = watched_net(), TrainingWatch(images(), layers=LAYERS)
    watch.record(net, 0)
    net.layer1[0].weight.data.fill_(float("nan"))
    with pytest.warns(UserWarning, match=r"step 5 failed: .*layer1"):
        assert watch.record(net, 5) == {}
    strict = TrainingWatch(images(), layers=LAYERS, on_error="raise")
    with pytest.raises(RepresentationError, match=r"step 5 failed: .*layer1"):
        strict.record(net, 5)


def test_a_reference_needs_the_same_layers():
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    watch = TrainingWatch(images(), layers="*", reference=other)
    with pytest.raises(LayerError, match="the reference"):
        watch.record(nn.Sequential(nn.Conv2d(3, 4, 3)), 0)


def test_memory_does_not_grow_with_steps():
    net, watch = watched_net(), TrainingWatch(images(), layers=LAYERS)
    watch.record(net, 0)
    middle = []
    for step in range(1, 5):
        watch.record(net, step)
        middle.append(weakref.ref(watch._last))
    gc.collect()
    assert [reference() is None for reference in middle] == [True, True, True, False]
    gone = weakref.ref(net)
    watch.close()
    del net
    gc.collect()
    assert gone() is None


def test_wrappers_are_taken_off():
    net, watch = watched_net(), TrainingWatch(images(), layers=LAYERS, reference=watched_net())
    compiled = torch.compile(net, backend="eager")
    metrics = watch.record(compiled, 0)
    assert metrics["rsm/cka_reference/optimal/layer1"] == pytest.approx(1.0)
    assert watch.record(nn.DataParallel(net, device_ids=[]), 1)["rsm/cka_last/optimal/stem"] == pytest.approx(1.0)


def test_a_part_of_a_model():
    whole = nn.Module()
    whole.backbone = watched_net()
    watch = TrainingWatch(images(), layers=LAYERS, part="backbone")
    assert "rsm/cka_first/optimal/stem" in watch.record(whole, 0)
    with pytest.raises(ModelError, match="backbond"):
        TrainingWatch(images(), layers=LAYERS, part="backbond").record(whole, 0)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"every": 0}, ConfigError, "every"),
        ({"every": "often"}, ConfigError, "every"),
        ({"every": [1, 2.5]}, ConfigError, "every"),
        ({"on_error": "ignore"}, ConfigError, "on_error"),
        ({"layers": 3}, LayerError, "layers"),
        ({"batch_size": 2}, ImageError, "batch_size"),
        ({"images": torch.randn(2, 3, 8, 8)}, ImageError, "at least 4"),
        ({"images": iter([torch.randn(4, 3, 8, 8)])}, ImageError, "give a list"),
    ],
)
def test_bad_arguments_are_refused_at_once(settings, error, match):
    with pytest.raises(error, match=match):
        TrainingWatch(settings.pop("images", images()), **{"layers": LAYERS, **settings})


def test_a_loader_that_shuffles_without_a_seed_is_refused():
    with pytest.raises(ImageError, match="shuffles without a seed"):
        TrainingWatch(DataLoader(TensorDataset(images()), 5, shuffle=True), layers=LAYERS)


def test_steps_that_go_back_begin_another_training():
    watch = TrainingWatch(images(), layers=LAYERS, reference=watched_net(3))
    recorded(watch, [0, 5])
    again = recorded(watch, [1])
    assert again["rsm/cka_first/optimal/stem"] == 1.0
    assert "rsm/cka_last/optimal/stem" not in again
    assert again["rsm/cka_reference/optimal/stem"] < 0.99
    assert recorded(watch, [5]) == recorded(TrainingWatch(images(), layers=LAYERS, reference=watched_net(3)), [1, 5])


def test_time_is_measured():
    watch = TrainingWatch(images(), layers=LAYERS)
    assert watch.summary() == "nothing recorded"
    metrics = watch.record(watched_net(), 0)
    assert 0 < metrics["rsm/seconds"] <= watch.seconds
    assert 0 < metrics["rsm/share_of_time"] <= 1
    assert watch.summary().startswith("1 recording of RSMs took")


def cka_of(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "cka" in name}


def recorded(watch: TrainingWatch, steps, nets=None) -> dict[str, float]:
    for step in steps:
        metrics = watch.record((nets or {}).get(step) or watched_net(step), step)
    return cka_of(metrics)


@pytest.mark.parametrize("source", ["set", "loader"])
@pytest.mark.parametrize("centering", [None, "location-mean"])
def test_a_store_holds_every_step_and_changes_no_number(tmp_path, source, centering):
    given = images(11) if source == "set" else DataLoader(TensorDataset(images(11), torch.zeros(11)), 6)
    settings = {"layers": LAYERS, "kernels": ("linear", "rbf"), "centering": centering}
    settings |= {"batch_size": 6} if source == "set" else {}
    without = recorded(TrainingWatch(given, **settings), [0, 3, 6])
    before = torch.get_rng_state()
    watch = TrainingWatch(given, out=tmp_path, name="net", **settings)
    assert recorded(watch, [0, 3, 6]) == pytest.approx(without, abs=1e-12)
    assert torch.equal(torch.get_rng_state(), before)
    store = rsm_probe.RsmStore.open(tmp_path)
    assert store.models == ["net@0", "net@3", "net@6"]
    grid = store.result(kernels=("rbf",))
    assert grid.networks == {"net": {0: "net@0", 3: "net@3", 6: "net@6"}}
    value = grid.grid("net@0", "net@6", "optimal", kernel="rbf").sel(layer_a="layer1", layer_b="layer1")
    assert float(value) == pytest.approx(without["rsm/cka_first/optimal/rbf/layer1"], abs=1e-12)


def test_a_training_that_continues_is_compared_with_its_first_step(tmp_path):
    whole = recorded(TrainingWatch(images(), layers=LAYERS, out=tmp_path / "whole"), [1, 3, 10])
    recorded(TrainingWatch(images(), layers=LAYERS, out=tmp_path / "halves"), [1, 3])
    assert recorded(TrainingWatch(images(), layers=LAYERS, out=tmp_path / "halves"), [10]) == whole
    with pytest.raises(LayerError, match=r"step 11 failed: the model has lost the layer 'layer1', which step 1 has"):
        recorded(TrainingWatch(images(), layers="stem", out=tmp_path / "halves"), [11])
    with pytest.raises(StorageError, match="batch_size"):
        recorded(TrainingWatch(images(), layers=LAYERS, batch_size=5, out=tmp_path / "halves"), [12])
    assert len(rsm_probe.RsmStore.open(tmp_path / "halves").models) >= 3


def test_the_reference_may_be_a_step_of_another_run(tmp_path):
    recorded(TrainingWatch(images(), layers=LAYERS, out=tmp_path, name="a"), [0, 5])
    store = rsm_probe.RsmStore.open(tmp_path)
    with pytest.raises(ConfigError, match=r"one model, found a@0, a@5; .*select\(models='a@5'\)"):
        TrainingWatch(images(), layers=LAYERS, reference=store)
    chosen = store.select(models="a@5")
    metrics = recorded(TrainingWatch(images(), layers=LAYERS, reference=chosen), [7])
    assert metrics == pytest.approx(
        recorded(TrainingWatch(images(), layers=LAYERS, reference=watched_net(5)), [7]), abs=1e-12
    )
    with pytest.raises(ImageError, match="the images or their mini-batches differ from those of the reference"):
        recorded(TrainingWatch(images(), layers=LAYERS, batch_size=5, reference=chosen), [7])
    with pytest.raises(ComparisonError, match=r"the reference has no RSM of layer 'stem' by greedy/linear"):
        recorded(TrainingWatch(images(), layers=LAYERS, matchings="greedy", reference=chosen), [7])


def test_a_store_that_fails_later_leaves_training_alone(tmp_path):
    watch = TrainingWatch(images(), layers=LAYERS, out=tmp_path / "a")
    watch.record(watched_net(), 0)
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "a").write_text("in the way")
    with pytest.warns(UserWarning, match="step 1 failed: .*StorageError"):
        assert watch.record(watched_net(1), 1) == {}
    (tmp_path / "a").unlink()
    (tmp_path / "b").rename(tmp_path / "a")
    assert "rsm/cka_last/optimal/stem" in watch.record(watched_net(2), 2)
    assert rsm_probe.RsmStore.open(tmp_path / "a").models == ["model@0", "model@2"]
