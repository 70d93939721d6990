"""Arguments that hold no images: their values make a pass new only where they steer what the model computes."""

import pytest
import torch
from torch import nn

from rsm_probe import Probe
from rsm_probe.errors import RepresentationError


class Model(nn.Module):
    """A convolution, what a function makes of it and the other argument, and another convolution."""

    def __init__(self, function, size=4):
        super().__init__()
        self.stem, self.last, self.head = nn.Conv2d(3, size, 1), nn.Conv2d(size, 5, 1), nn.Conv2d(5, 2, 1)
        self.table, self.function, self.ran = nn.Embedding(1000, size), function, 0

    def forward(self, x, other):
        x = self.last(self.function(self, self.stem(x), other))
        self.ran += 1
        return self.head(x)


def images(count=2):
    return torch.randn(count, 3, 4, 6, generator=torch.Generator().manual_seed(count))


def on_its_own(model, other):
    """The tokens of both layers from hooks."""
    outputs = []
    with torch.no_grad():
        handles = [
            layer.register_forward_hook(lambda *args: outputs.append(args[2].flatten(2).mT.clone()))
            for layer in (model.stem, model.last)
        ]
        model(images(), other)
        for handle in handles:
            handle.remove()
    return outputs


def added(model, x, t):
    return x + model.table(t)[..., None, None]


def sinusoids(model, x, t):
    steps = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1) * torch.arange(4)
    return x + steps.sin()[..., None, None]


def noised(model, x, t):
    return x * 0.99**t


HARMLESS = {
    "labels": (added, [torch.tensor([k, k + 1]) for k in range(5)], 1),
    "timestep tensor": (sinusoids, [torch.tensor(k) for k in range(5)], 1),
    "mask of bools": (
        lambda model, x, mask: torch.where(mask[:, None], x, model.table.weight[0][:, None, None]),
        [torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(k)) > 0.5 for k in range(5)], 1,
    ),
    "tokens": (
        lambda model, x, ids: x * model.table(ids).softmax(1).mean(1)[..., None, None],
        [torch.randint(1000, (2, 7), generator=torch.Generator().manual_seed(k)) for k in range(5)], 1,
    ),
    "timestep number": (sinusoids, list(range(5)), 2),
    "float": (noised, [0.1 * k for k in range(5)], 2),
    "prompts": (
        lambda model, x, texts: x + sum(model.table.weight[len(text)].sum() for text in texts),
        [["a", "b" * k] for k in range(1, 6)], 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("function", "values", "traced"), HARMLESS.values(), ids=HARMLESS)
def test_values_that_steer_nothing_let_passes_stop_early(function, values, traced):
    model = Model(function).eval()
    expected = [on_its_own(model, value) for value in values]
    model.ran = 0
    with torch.no_grad(), Probe(model, ["stem", "last"], stop_early=True) as probe:
        for number, (value, (stem, last)) in enumerate(zip(values, expected, strict=True)):
            result = model(images(), value)
            assert (result is None) == (number >= traced)
            assert torch.equal(probe.representations["stem"].tokens, stem)
            assert torch.equal(probe.representations["last"].tokens, last)
            assert probe.representations["last"].grid == (4, 6)
    assert model.ran == traced


def turned(model, x, k):
    return x.flip(-1) if k else x


def picked(model, x, k):
    both = (x, x.flip(-1))
    return both[k]


STEERING = {
    "number that turns": (turned, [0, 1, 0, 1]),
    "number that picks": (picked, [0, 1, 1, 0]),
    "tensor that turns": (turned, [torch.tensor([k]) for k in (0, 1, 0, 1)]),
    "tensor that picks": (picked, [torch.tensor(k) for k in (0, 1, 0, 1)]),
    "list of a tensor": (lambda m, x, t: turned(m, x, t.tolist()[0]), [torch.tensor([k]) for k in (0, 1, 0, 1)]),
    "array of a tensor": (lambda m, x, t: turned(m, x, t.numpy()[0]), [torch.tensor([k]) for k in (0, 1, 0, 1)]),
    "derived": (lambda m, x, t: turned(m, x, (t * 2).sum().item()), [torch.tensor([k]) for k in (0, 1, 0, 1)]),
    "shift": (lambda m, x, k: x.roll(k, -1), [1, 2, 3, 1]),
    "shift in a tensor": (lambda m, x, k: x.roll(int(k), -1), [torch.tensor(k) for k in (1, 2, 3, 1)]),
    "text": (lambda m, x, mode: turned(m, x, mode == "flip"), ["none", "flip", "none"]),
    "flag": (turned, [False, True, False]),
    "count of a mask": (
        lambda m, x, mask: turned(m, x, len(mask.nonzero()) > 1),
        [torch.tensor([True, False]), torch.tensor([True, True]), torch.tensor([False, True])],
    ),
    "order": (lambda m, x, ids: x[..., ids], [torch.tensor(p) for p in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0])]),
}  # fmt: skip


@pytest.mark.parametrize(("function", "values"), STEERING.values(), ids=STEERING)
@pytest.mark.parametrize("stop_early", [False, True])
def test_values_that_steer_are_never_read_by_the_layout_of_others(function, values, stop_early):
    """A map that the model turns or shifts is read in image order."""
    model = Model(function).eval()
    straight = nn.Sequential(model.stem, model.last)(images()).flatten(2).mT
    with torch.no_grad(), Probe(model, ["last"], stop_early=stop_early) as probe:
        for value in values:
            try:
                model(images(), value)
            except RepresentationError:  # the tokens stand for different locations in each pass
                continue
            torch.testing.assert_close(probe.representations["last"].tokens, straight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrap", [int, torch.tensor])
def test_a_threshold_that_earlier_values_did_not_reach(wrap):
    """Numbers that agree twice are trusted only while the operations agree."""
    model = Model(lambda m, x, t: turned(m, x, t > 500)).eval()
    straight = nn.Sequential(model.stem, model.last)(images()).flatten(2).mT.detach()
    with torch.no_grad(), Probe(model, ["stem", "last"]) as probe:
        for value in (1, 2, 3, 600, 4, 601, 5, 600):
            try:
                model(images(), wrap(value))
            except RepresentationError as error:
                assert wrap is int
                assert value == 600
                assert "args[1]" in str(error)  # noqa: PT017
                assert probe.representations == {}
                model(images(), wrap(value))
            torch.testing.assert_close(probe.representations["last"].tokens, straight, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:3 layers matched")
def test_a_number_that_selects_layers():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(4))

        def forward(self, x, depth):
            for block in self.blocks[:depth]:
                x = block(x)
            return x

    model = Cut().eval()
    with torch.no_grad(), Probe(model, "blocks.*", stop_early=True) as probe:
        for depth in (1, 3, 2, 4, 1):
            model(images(), depth)
            assert list(probe.representations) == [f"blocks.{k}" for k in range(depth)]


def test_another_profiler_makes_values_count(recwarn):
    """Python has one profiler; if another runs, conversions to lists go unseen."""
    import sys

    model = Model(lambda m, x, t: turned(m, x, t.tolist()[0])).eval()
    straight = nn.Sequential(model.stem, model.last)(images()).flatten(2).mT.detach()
    calls = []
    sys.setprofile(lambda *_: calls.append(1))
    profiler = sys.getprofile()
    try:
        with torch.no_grad(), Probe(model, ["last"]) as probe:
            for k in (0, 1):
                model(images(), torch.tensor([k]))
                torch.testing.assert_close(probe.representations["last"].tokens, straight, rtol=1e-5, atol=1e-6)
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)


def test_a_traced_pass_ends_its_watching_even_on_errors():
    import sys

    def fail(model, x, t):
        raise ValueError("mine")

    model = Model(fail).eval()
    with torch.no_grad(), Probe(model, ["last"]), Probe(model, ["stem"]):
        with pytest.raises(ValueError, match="mine"):
            model(images(), 1)
        assert sys.getprofile() is None
