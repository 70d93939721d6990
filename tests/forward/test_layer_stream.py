"""The layer stream: what passes through models reaches one consumer after another, layer by layer."""

import numpy as np
import pytest
import torch
from torch import nn

import rsm_probe
from rsm_probe import Accumulator, Probe
from rsm_probe.errors import LayerError, ModelError
from rsm_probe.forward.layer_stream import LayerStream, readings_of
from rsm_probe.forward.logits import logits
from rsm_probe.sources import from_tensor
from rsm_probe.sources.images.batches import SetBatches, batch_of
from rsm_probe.sources.models.reading import Reading
from rsm_probe.streaming import Means


class Twice(nn.Module):
    """One module, called twice; counts the images that pass, and fails when told to."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU()
        self.seen, self.failing = [], False

    def forward(self, x):
        self.seen.append(len(x))
        x = self.b(self.relu(self.a(x)))
        if self.failing:
            raise KeyboardInterrupt
        return self.relu(x)


class Recording:
    """A consumer that writes down what it is told, and copies the tokens."""

    def __init__(self):
        self.calls, self.tokens = [], {}

    def begin(self, batch):
        self.calls.append(("begin", list(batch.ids), list(batch.labels), list(batch.numbers)))

    def take(self, model, layer, representation):
        self.calls.append(("take", model, layer))
        self.tokens[model, layer] = representation.tokens.clone()

    def end(self, names):
        self.calls.append(("end", dict(names)))


def pictures(count=20):
    tensor = torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    return from_tensor(tensor, ids=[f"i{k}" for k in range(count)], labels=[f"l{k}" for k in range(count)])


def stream_of(*models, images=None, layers="*"):
    named = {f"m{k}": rsm_probe.load_model(model, name=f"m{k}") for k, model in enumerate(models)}
    by_model = layers if isinstance(layers, dict) else None
    readings = readings_of(named, Reading(None if by_model else layers), by_model)
    images = pictures() if images is None else images
    return LayerStream(named, SetBatches(images, [np.arange(len(images))]), readings)


def test_a_consumer_hears_of_every_layer_as_it_runs_and_of_its_name_at_the_end():
    model, consumer = Twice(), Recording()
    stream, images = stream_of(model), pictures()
    with stream.evaluating():
        stream.feed(batch_of(pictures(), np.array([3, 1])), consumer)
    assert consumer.calls == [
        ("begin", ["i3", "i1"], ["l3", "l1"], [3, 1]),
        *[("take", "m0", layer) for layer in ("a", "relu", "b", "relu#1")],
        ("end", {("m0", "a"): "a", ("m0", "relu"): "relu#0", ("m0", "b"): "b", ("m0", "relu#1"): "relu#1"}),
    ]
    with torch.no_grad(), Probe(model, "*") as probe:
        model(torch.stack([images[3], images[1]]))
    for (_, taken_as), name in consumer.calls[-1][1].items():
        torch.testing.assert_close(consumer.tokens["m0", taken_as], probe.representations[name].tokens)


def test_one_pass_serves_each_consumer_and_models_are_probed_once():
    models = Twice(), Twice()
    stream, first, second = stream_of(*models), Recording(), Recording()
    with stream.evaluating():
        sample = stream.sample()
        stream.feed(batch_of(pictures(), np.arange(4)), first)
        stream.feed(batch_of(pictures(), np.arange(4, 8)), second)
    assert [model.seen for model in models] == [[11, 4, 4]] * 2
    assert list(sample.representations) == ["m0", "m1"]
    assert list(sample.representations["m0"]) == ["a", "relu#0", "b", "relu#1"]
    assert {len(kept.tokens) for layers in sample.representations.values() for kept in layers.values()} == {11}
    assert [len(recorded.tokens) for recorded in (first, second)] == [8, 8]
    assert not any(part._forward_hooks for model in models for part in model.modules())


@pytest.mark.parametrize("make", [lambda: Accumulator(("identity", "optimal")), lambda: Means("location-mean")])
def test_a_pass_that_fails_leaves_nothing_behind(make):
    model, failing, whole = Twice(), make(), make()
    stream = stream_of(model)
    with stream.evaluating():
        model.failing = True
        with pytest.raises(KeyboardInterrupt):
            stream.feed(batch_of(pictures(), np.arange(10)), failing)
        model.failing = False
        for consumer in (failing, whole):
            stream.feed(batch_of(pictures(), np.arange(10, 20)), consumer)
    assert (failing.images, failing.batches) == (10, 1)
    for name, values in whole.state().items():
        np.testing.assert_array_equal(failing.state()[name], values)


def test_the_stream_and_a_loop_of_ones_own_add_up_to_the_same():
    model, images = Twice().eval(), pictures()
    streamed, own = Accumulator(keep=["*"]), Accumulator(keep=["*"])
    stream = stream_of(model)
    with torch.no_grad(), stream.evaluating(), Probe(model, "*", reduce=own.reducer("m0")) as probe:
        for numbers in np.arange(20).reshape(2, 10):
            model(torch.stack([images[int(k)] for k in numbers]))
            own.update({"m0": probe}, ids=[images.ids[k] for k in numbers])
    with stream.evaluating():
        for numbers in np.arange(20).reshape(2, 10):
            stream.feed(batch_of(pictures(), numbers), streamed)
    np.testing.assert_array_equal(streamed.result().rsms.values, own.result().rsms.values)
    assert streamed.cka.coords.to_dataset().equals(own.cka.coords.to_dataset())


def test_layers_by_model_have_to_name_every_model_and_no_other():
    for layers, message in (
        ({"m1": "*"}, "layers= has no entry for model 'm0'; it has entries for m1"),
        ({"m0": "*", "mO": "*"}, "layers= has an entry for unknown model 'mO'; .*models are: m0"),
    ):
        with pytest.raises(ModelError, match=message):
            stream_of(Twice(), layers=layers)
    with pytest.raises(LayerError, match="no layer 'c'"):
        stream_of(Twice(), layers="c")


def test_logits_leave_every_training_flag_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 5, 9), nn.Dropout(0.5), nn.Flatten()).train()
    model[0].eval()
    values = logits(rsm_probe.sources.LoadedModel("net", model, torch.as_tensor), pictures(), np.array([2, 0]))
    assert values.shape == (2, 5)
    assert [part.training for part in model.modules()] == [True, False, True, True]
    with torch.no_grad():
        expected = model.eval()(torch.stack([pictures()[2], pictures()[0]]))
    np.testing.assert_allclose(values, expected.double().numpy())
