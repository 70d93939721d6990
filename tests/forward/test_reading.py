"""How models are called and read: kinds of tokens, layouts, calls of one's own, beside a model or for all."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import rsm_probe
from rsm_probe import Probe, capture, load_model, sweep
from rsm_probe.errors import LayerError, ModelError, RepresentationError, StorageError
from rsm_probe.forward.token_kinds import TOKEN_KINDS
from rsm_probe.streaming import SweepResult


def vit(seed=0):
    torch.manual_seed(seed)
    return torchvision.models.VisionTransformer(32, 8, 3, 4, 16, 32).eval()


def pixels(count=12, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def plain_hook(model, layer, images, call):
    outputs = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        call(model, images)
    handle.remove()
    return outputs[-1]


LAYER = "encoder.layers.encoder_layer_1"
# From the whole sequence of class token and locations.
POOLED = {
    "locations": lambda x: x[:, 1:],
    "class": lambda x: x[:, :1],
    "mean": lambda x: x[:, 1:].mean(1, keepdim=True),
    "max": lambda x: x[:, 1:].max(1, keepdim=True).values,
    "gem": lambda x: ((x[:, 1:].clamp(min=1e-6) ** 3).mean(1, keepdim=True)) ** (1 / 3),
}


def test_every_kind_of_tokens_is_tested():
    assert set(POOLED) == {"locations", *TOKEN_KINDS}


def test_captures_hold_every_kind_of_tokens_of_a_layer_side_by_side(tmp_path):
    model, images = vit(), pixels()
    found = capture(model, images, LAYER, tmp_path / "c.zarr", tokens=list(POOLED), batch_size=12)
    sequence = plain_hook(model, LAYER, images, lambda model, x: model(x))
    assert list(found) == [LAYER, *(f"{LAYER}@{kind}" for kind in list(POOLED)[1:])]
    for kind, pooled in POOLED.items():
        name = LAYER if kind == "locations" else f"{LAYER}@{kind}"
        torch.testing.assert_close(found[name].tokens(), pooled(sequence), rtol=0, atol=1e-6)
    assert torch.equal(found[f"{LAYER}@class"].tokens(), sequence[:, :1])


def test_a_sweep_compares_pooled_vectors_beside_locations():
    model, images = vit(), pixels()
    result = sweep(model, images, LAYER, tokens=["locations", "class", "mean"], kernels=["cosine"], batch_size=12)
    names = list(dict.fromkeys(map(str, result.cka["layer_a"].values)))
    assert names == [LAYER, f"{LAYER}@class", f"{LAYER}@mean"]
    sequence = plain_hook(model, LAYER, images, lambda model, x: model(x))
    rsms = {kind: rsm_probe.rsm(POOLED[kind](sequence), matching="identity", kernel="cosine") for kind in POOLED}
    expected = rsm_probe.cka(rsms["class"], rsms["mean"])
    keys = zip(map(str, result.cka["layer_a"].values), map(str, result.cka["matching_a"].values), strict=True)
    at = {key: number for number, key in enumerate(keys)}
    row, column = at[f"{LAYER}@class", "identity"], at[f"{LAYER}@mean", "identity"]
    assert float(result.cka[row, column]) == pytest.approx(expected, abs=1e-6)


def test_a_layer_without_a_class_token_is_named():
    model = torchvision.models.resnet18(weights=None).eval()
    with pytest.raises(LayerError, match="'layer4' of model 'ResNet': it has no class token; use tokens='mean'"):
        sweep(model, pixels(), "layer4", tokens="class", batch_size=12)
    with pytest.raises(LayerError, match="unknown tokens 'clas'; nearest: 'class'"):
        sweep(model, pixels(), "layer4", tokens="clas", batch_size=12)


def test_calls_of_a_module_keep_their_numbers_in_every_kind(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x))

    found = capture(Twice().eval(), pixels(6, 8), "*", tmp_path / "c.zarr", tokens=["mean", "locations"])
    assert set(found) == {"conv#0", "conv#1", "conv#0@mean", "conv#1@mean"}


class Timed(nn.Module):
    """Takes a timestep and a prompt beside the images, by keyword."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, sample, *, timestep, prompt):
        return self.conv(sample) * timestep + len(prompt)


def with_timestep(model, batch):
    return model(batch, timestep=torch.full((len(batch),), 2.0)[:, None, None, None], prompt="a cat")


def test_a_call_of_ones_own_gives_a_plain_hooks_values(tmp_path):
    model, images = Timed().eval(), pixels()
    found = capture(model, images, "conv", tmp_path / "c.zarr", forward=with_timestep, batch_size=12)
    expected = plain_hook(model, "conv", images, with_timestep)
    assert torch.equal(found["conv"].tokens(), expected.flatten(2).mT)
    both = {"timed": load_model(model, forward=with_timestep), "plain": torchvision.models.resnet18().eval()}
    result = sweep(both, images, {"timed": "conv", "plain": "layer4"}, batch_size=12)
    assert np.isfinite(result.cka.values).all()


def test_a_call_without_a_name_works_once_and_is_not_continued(tmp_path):
    model, images = Timed().eval(), pixels()
    unnamed = lambda model, batch: with_timestep(model, batch)  # noqa: E731
    fresh = capture(model, images, "conv", tmp_path / "c.zarr", forward=unnamed)
    assert fresh["conv"].tokens().shape == (12, 32 * 32, 4)
    sweep(model, images, "conv", ["identity"], batch_size=12, forward=unnamed)

    class Stop(Exception):
        pass

    def stopping(model, batch):
        stopping.calls += 1
        if stopping.calls > 3:
            raise Stop
        return with_timestep(model, batch)

    stopping.calls = 0
    for work in (
        lambda forward: capture(model, images, "conv", tmp_path / "d.zarr", forward=forward, batch_size=4),
        lambda forward: sweep(model, images, "conv", ["identity"], batch_size=4, out=tmp_path / "s", forward=forward),
    ):
        stopping.calls = 0
        with pytest.raises(Stop):
            work(stopping)
        with pytest.raises(StorageError, match=r"'Timed'.*cannot be imported by name.*module:function"):
            work(stopping)


def test_a_call_by_name_is_continued_and_another_one_refused(tmp_path):
    model, images = Timed().eval(), pixels()
    capture(model, images, "conv", tmp_path / "c.zarr", forward=with_timestep)
    capture(model, images, "conv", tmp_path / "c.zarr", forward=with_timestep)
    with pytest.raises(StorageError, match=r"readings\.Timed\.forward was 'test_reading:with_timestep'"):
        capture(model, images, "conv", tmp_path / "c.zarr", forward=another_timestep)


def another_timestep(model, batch):
    return with_timestep(model, batch)


class Mixing(nn.Module):
    """Its last layer mixes locations, so that only a layout says how to read it."""

    def __init__(self):
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(64, 64)

    def forward(self, x):
        return self.mix(self.conv(x).flatten(1).view(len(x), 4, 64)).sort(dim=1).values


@pytest.mark.parametrize("beside", [True, False])
def test_layouts_hold_for_the_models_that_have_such_layers(tmp_path, beside):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.odd = Mixing(), nn.Identity()

        def forward(self, x):
            order = torch.randperm(256, generator=torch.Generator())
            return self.odd(self.body(x).flatten(1)[:, order].view(-1, 8, 32))

    torch.manual_seed(0)
    odd, plain, images = Last().eval(), Mixing().eval(), pixels(8, 8)
    layers, layouts = {"odd": "odd", "plain": "conv"}, {"odd": "NTC"}
    models = {"odd": load_model(odd, layouts=layouts) if beside else odd, "plain": plain}
    common = None if beside else layouts
    result = sweep(models, images, layers, ["identity"], batch_size=8, layouts=common, centering=None)
    assert set(map(str, result.cka["model_a"].values)) == {"odd", "plain"}
    with pytest.raises(LayerError, match="layouts: no probed layer matches 'nowhere'"):
        sweep(models, images, layers, ["identity"], batch_size=8, layouts={"nowhere": "NTC"})


def test_what_is_said_beside_a_model_comes_before_what_is_said_of_all():
    images = pixels()
    result = sweep(
        [load_model(vit(), name="a", tokens="class", layers=LAYER), load_model(vit(1), name="b")],
        images, "encoder.layers.encoder_layer_0", ["identity"], tokens="mean", batch_size=12,
    )  # fmt: skip
    pairs = set(zip(map(str, result.cka["model_a"].values), map(str, result.cka["layer_a"].values), strict=True))
    assert pairs == {("a", f"{LAYER}@class"), ("b", "encoder.layers.encoder_layer_0@mean")}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"forward": "model"}, "forward must be a function"), ({"method": 3}, "method must be text")],
)
def test_what_is_no_reading_is_refused(wrong, message):
    with pytest.raises(ModelError, match=message):
        load_model(vit(), **wrong)
    with pytest.raises(ModelError, match=message):
        capture(vit(), pixels(), LAYER, **wrong)


def test_a_probe_reads_the_same_locations():
    model, images = vit(), pixels()
    with torch.no_grad(), Probe(model, LAYER) as probe:
        model(images)
    assert torch.equal(
        probe.representations[LAYER].tokens, plain_hook(model, LAYER, images, lambda model, x: model(x))[:, 1:]
    )


def doubled(model, batch):
    return model(torch.cat([torch.zeros_like(batch), batch]))


@pytest.mark.parametrize("call", [doubled, lambda model, batch: model(batch[::2])])
def test_a_call_with_other_rows_than_images_is_refused(tmp_path, call):
    model, images = nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), pixels(8, 4)
    for work in (
        lambda: capture(model, images, "0", tmp_path / "c.zarr", forward=call),
        lambda: sweep(model, images, "0", ["identity"], batch_size=8, forward=call),
    ):
        with pytest.raises(
            RepresentationError, match=r"'0' of model 'Sequential' holds \d+ rows for a batch of 8 images"
        ):
            work()


def test_of_several_passes_in_one_call_the_last_counts(tmp_path):
    """As the steps of a denoising loop: every pass replaces the one before."""

    def steps(model, batch):
        for step in range(3):
            model(batch * (step + 1))

    model, images = nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), pixels(8, 4)
    found = capture(model, images, "0", tmp_path / "c.zarr", forward=steps)
    expected = plain_hook(model, "0", images * 3, lambda model, x: model(x))
    assert torch.equal(found["0"].tokens(), expected.flatten(2).mT)
    several = sweep(model, images, "0", ["identity"], batch_size=8, keep=["0"], forward=steps)
    once = sweep(model, images * 3, "0", ["identity"], batch_size=8, keep=["0"])
    np.testing.assert_array_equal(several.rsms.values, once.rsms.values)


class Stereo(nn.Module):
    def __init__(self):
        super().__init__()
        self.near, self.far = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, left, right):
        return self.near(left).mean() - self.far(right).mean()


def both_eyes(model, batch):
    return model(batch, right=batch.flip(-1))


def test_a_sweep_says_to_which_input_a_layer_belongs(tmp_path):
    model, images = Stereo().eval(), pixels(8, 8)
    result = sweep(model, images, "*", ["identity"], batch_size=8, forward=both_eyes, out=tmp_path / "s", keep=["far"])
    stored = SweepResult.open(tmp_path / "s" / "result.zarr")
    for found in (result.dataset, stored.dataset):
        inputs = dict(zip(map(str, found["layer_a"].values), map(str, found["input_a"].values), strict=True))
        assert inputs == {"near": "args[0]", "far": "right"}
    alone = rsm_probe.rsm(model.far(images.flip(-1)).detach().flatten(2).mT, matching="identity", kernel="linear")
    # A sweep takes the images in a random order.
    np.testing.assert_allclose(np.sort(result.rsms.values.ravel()), np.sort(alone.values.ravel()), rtol=1e-6)
    assert "input_a" not in sweep(vit(), images.repeat(1, 1, 4, 4), LAYER, ["identity"], batch_size=8).dataset
    options = {"tokens": ["locations", "mean"], "forward": both_eyes}
    captured = capture(model, images, ["near", "far"], tmp_path / "c", **options)
    expected = {"near": "args[0]", "far": "right", "near@mean": "args[0]", "far@mean": "right"}
    for layers in (captured, rsm_probe.Capture.open(tmp_path / "c")):
        assert {name: layer.input for name, layer in layers.items()} == expected
    assert capture(vit(), images.repeat(1, 1, 4, 4), LAYER, tmp_path / "d")[LAYER].input == ""


def test_a_model_that_takes_more_than_images_is_answered_with_forward(tmp_path):
    with pytest.raises(
        ModelError, match=r"'Timed' takes more than a batch of images: .*timestep.*forward=lambda model"
    ):
        capture(Timed().eval(), pixels(8, 8), "conv", tmp_path / "c.zarr")
