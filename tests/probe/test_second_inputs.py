"""Inputs beside the images: what depends on them says on which, and is read exactly where a layout is given."""

import re
from collections.abc import Mapping

import pytest
import torch
import transformers
from torch import nn

from rsm_probe import Probe
from rsm_probe.errors import RepresentationError


class Model(nn.Module):
    """A model of one function, whose layers are given by name."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs, **named):
        return self.function(self, *inputs, **named)


def tower(channels=3):
    return nn.Sequential(nn.Conv2d(channels, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, 2, 1))


def probed(model, layers, *args, layouts=None, inputs=None, **named):
    with torch.no_grad(), Probe(model.eval(), layers, layouts=layouts, inputs=inputs) as probe:
        model(*args, **named)
    return probe


def maps_as_tokens(maps):
    return maps.detach().flatten(2).mT


FIRST, SECOND = torch.randn(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SHARED = Model(lambda model, x, y: model.trunk(x) - model.trunk(y), trunk=tower()).eval()


def two(pick=lambda *inputs: inputs, channels=3):
    """Two towers, whose inputs come as `pick` finds them among the arguments."""

    def forward(model, *inputs, **named):
        x, y = pick(*inputs, **named)
        return model.a(x), model.b(y)

    return Model(forward, a=tower(), b=tower(channels)).eval()


def test_a_shared_trunk_says_which_call_saw_which_input():
    kept = probed(SHARED, ["trunk.0#0", "trunk.0#1"], FIRST, SECOND).representations
    assert [read.input for read in kept.values()] == ["args[0]", "args[1]"]
    for read, images in zip(kept.values(), (FIRST, SECOND), strict=True):
        assert torch.equal(read.tokens, maps_as_tokens(SHARED.trunk[0](images)))
    assert probed(SHARED.trunk, "0", FIRST).representations["0"].input == ""


def test_layers_that_mix_two_inputs_at_equal_locations_name_both():
    def forward(model, x, y):
        added = model.added(model.a(x) + model.b(y))
        stacked = model.stacked(torch.cat([x, y], 1))
        joined = model.joined(torch.cat([z.flatten(2).mT for z in (model.a(x), model.b(y))], 1))
        return added, stacked, joined, model.pooled((model.a(x) + model.b(y)).mean((2, 3)))

    parts = dict(
        added=nn.Conv2d(5, 3, 1), stacked=nn.Conv2d(6, 3, 2, 2), joined=nn.Linear(5, 3), pooled=nn.Linear(5, 2)
    )
    model = Model(forward, a=tower(), b=tower(), **parts).eval()
    with pytest.warns(UserWarning, match="left out"):
        probe = probed(model, ["a.2#0", "b.2#0", *parts], FIRST, SECOND)
    kept = probe.representations
    assert {name: read.input for name, read in kept.items()} == {
        "a.2#0": "args[0]", "b.2#0": "args[1]", "added": "args[0], args[1]", "stacked": "args[0], args[1]",
        "joined": "args[0]", "pooled": "args[0], args[1]",
    }  # fmt: skip
    torch.testing.assert_close(kept["added"].tokens, maps_as_tokens(model.added(model.a(FIRST) + model.b(SECOND))))
    torch.testing.assert_close(kept["joined"].tokens, model.joined(maps_as_tokens(model.a(FIRST))).detach())
    assert "16 vectors per image belong to the input args[1]" in probe.notes["joined"]
    assert (kept["stacked"].grid, kept["pooled"].tokens.shape) == ((8, 8), (2, 1, 2))


def test_pathways_and_images_of_several_numbers_are_followed():
    slow, fast = torch.randn(2, 3, 2, 16, 16), torch.randn(2, 3, 8, 16, 16)
    model = Model(
        lambda model, pathways: (model.slow(pathways[0]), model.fast(pathways[1])),
        slow=nn.Conv3d(3, 4, (1, 3, 3), (1, 2, 2), (0, 1, 1)), fast=nn.Conv3d(3, 2, 3, (1, 2, 2), 1),
    ).eval()  # fmt: skip
    kept = probed(model, ["slow", "fast"], [slow, fast]).representations
    assert [(read.input, read.grid) for read in kept.values()] == [("args[0][0]", (2, 8, 8)), ("args[0][1]", (8, 8, 8))]
    assert torch.equal(kept["fast"].tokens, maps_as_tokens(model.fast(fast)))
    several = torch.randn(2, 3, 3, 16, 16)  # (N, K, C, H, W): ambiguous, hence a user would say so
    prompt = Model(lambda model, images: model.trunk(images.flatten(0, 1)).unflatten(0, (2, 4)), trunk=tower()).eval()
    read = probed(prompt, "trunk.2", torch.randn(2, 4, 3, 16, 16)).representations["trunk.2"]
    assert (read.grid, tuple(read.tokens.shape)) == ((4, 4, 4), (2, 64, 5))
    assert several.ndim == 5


class Named(nn.Module):
    """Takes a picture, a mask and the places of a few points."""

    def __init__(self):
        super().__init__()
        self.trunk, self.of_mask = tower(), tower(1)

    def forward(self, picture, mask=None, points=None):
        features = self.trunk(picture)
        return features if mask is None else features + self.of_mask(mask.float())


def test_inputs_are_named_by_name_or_position():
    model, mask = Named().eval(), torch.rand(2, 1, 16, 16) > 0.5
    points = torch.rand(2, 1, 5, 2)
    layers = ["trunk.0", "of_mask.0"]
    with pytest.raises(RepresentationError, match=r"belongs to the input args\[1\].*inputs= names"):
        probed(model, layers, FIRST, mask, points)
    for inputs in (["picture", "mask"], [0, 1], ["args[0]", "mask"], ("picture", 1)):
        kept = probed(model, layers, FIRST, mask, points, inputs=inputs).representations
        assert [read.input for read in kept.values()] == ["args[0]", "args[1]"]
        assert torch.equal(kept["of_mask.0"].tokens, maps_as_tokens(model.of_mask[0](mask.float())))
    kept = probed(model, layers, picture=FIRST, mask=mask, inputs=["picture", "mask"]).representations
    assert [read.input for read in kept.values()] == ["picture", "mask"]
    only = probed(model, "of_mask.0", FIRST, mask, inputs="mask").representations["of_mask.0"]
    assert (only.input, only.grid) == ("", (8, 8))
    kept = probed(model, "trunk.0", FIRST, inputs=["picture", "mask"]).representations["trunk.0"]
    assert kept.input == ""  # this pass has one input
    assert probed(SHARED, "trunk.0#0", FIRST, SECOND, inputs=0).representations["trunk.0#0"].input == ""


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("pictures", r"no argument 'pictures'; arguments with tensors are: args\[0\], args\[1\]"),
        (["points"], r"'points' of shape \(2, 7\) shows no images"),
        (1.5, "must be"),
        ([None], "must be text"),
        (5, "no argument '5'"),
    ],
)
def test_inputs_that_are_not_there_are_refused(inputs, message):
    with pytest.raises(RepresentationError, match=message):
        probed(Named().eval(), "trunk.0", FIRST, torch.rand(2, 1, 16, 16), points=torch.rand(2, 7), inputs=inputs)


@pytest.mark.parametrize(
    ("layers", "layouts"),
    [
        (["trunk.0#0", "trunk.0#1"], {"trunk.0#1": "NCHW"}),
        ("trunk.*", {"trunk.0#1": "NCHW", "trunk.1#1": "NCHW", "trunk.2#1": "NCHW"}),
        ("trunk.*", {"trunk.*#1": "NCHW"}),
    ],
    ids=["named", "pattern", "glob of calls"],
)
def test_a_layout_reads_the_call_that_saw_another_input(layers, layouts):
    kept = probed(SHARED, layers, FIRST, SECOND, layouts=layouts).representations
    for call, images in enumerate((FIRST, SECOND)):
        assert kept[f"trunk.0#{call}"].grid == (8, 8)
        assert torch.equal(kept[f"trunk.0#{call}"].tokens, maps_as_tokens(SHARED.trunk[0](images)))
        if "trunk.2#1" in kept:
            assert torch.equal(kept[f"trunk.2#{call}"].tokens, maps_as_tokens(SHARED.trunk(images)))


def test_a_pattern_keeps_the_calls_of_all_inputs(recwarn):
    probe = probed(SHARED, "trunk.*", FIRST, SECOND)
    assert set(probe.representations) == {f"trunk.{layer}#{call}" for layer in range(3) for call in range(2)}
    assert all(read.input == f"args[{name[-1]}]" for name, read in probe.representations.items())
    assert not probe.skipped
    assert not recwarn.list


# The second input, its form, and how the message names it
FORMS = {
    "positional": (two(), (FIRST, SECOND), {}, "args[1] of shape (2, 3, 16, 16)"),
    "named": (two(lambda image, view: (image, view)), (), {"image": FIRST, "view": SECOND}, "'view' of"),
    "mapping": (two(lambda z: (z["a"], z["b"]["c"])), ({"a": FIRST, "b": {"c": SECOND}},), {}, "args[0]['b']['c'] of"),
    "list": (two(lambda z: z), ([FIRST, SECOND],), {}, "args[0][1] of"),
    "of another size": (two(), (FIRST, torch.randn(2, 3, 24, 12)), {}, "args[1] of shape (2, 3, 24, 12)"),
    "of another number": (two(), (FIRST, torch.randn(5, 3, 16, 16)), {}, "args[1] of shape (5, 3, 16, 16)"),
    "depth": (two(channels=1), (FIRST, torch.randn(2, 1, 16, 16)), {}, "args[1] of shape (2, 1, 16, 16)"),
    "depth without channels": (two(lambda x, y: (x, y[:, None]), 1), (FIRST, torch.randn(2, 16, 16)), {}, "args[1] of"),
    "mask": (two(lambda x, y: (x, y.float()), 1), (FIRST, torch.ones(2, 1, 16, 16).bool()), {}, "args[1] of"),
    "flow": (two(channels=2), (FIRST, torch.randn(2, 2, 16, 16)), {}, "args[1] of shape (2, 2, 16, 16)"),
    "images in lists": (
        two(lambda x, y: (torch.stack(x), torch.stack(y))), ([*FIRST], [*SECOND]), {},
        "args[1][0] of shape (3, 16, 16), the input args[1][1] of shape (3, 16, 16)",
    ),
    "a view of the same memory": (two(), tuple(torch.randn(2, 2, 3, 16, 16)), {}, "args[1] of shape"),
    "written into a buffer": (
        two(lambda x, y: (x, torch.zeros(2, 3, 16, 16).index_copy_(0, torch.arange(2), y))), (FIRST, SECOND), {},
        "args[1] of shape",
    ),
    "written in parts": (two(lambda x, y: (x, written(y))), (FIRST, SECOND), {}, "args[1] of shape"),
}  # fmt: skip


def written(images):
    whole = torch.zeros(2, 3, 16, 16)
    for k, image in enumerate(images):
        whole[k, :, :, :8].copy_(image[..., :8])
        whole[k, :, :, 8:] = image[..., 8:]
    return whole


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layouts", [None, {"b.0": "NCHW"}], ids=["", "layouts"])
def test_layers_of_another_input_are_read_and_say_which(form, layouts):
    model, inputs, named, name = FORMS[form]
    if form == "mask" and layouts is None:
        with pytest.raises(RepresentationError, match="belongs to the input " + re.escape(name)) as raised:
            probed(model, "b.0", *inputs, **named)
        assert "layouts={'b.0': 'NCHW'}" in str(raised.value)
        return
    outputs = []
    handle = model.b[0].register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    kept = probed(model, ["a.0", "b.0"], *inputs, layouts=layouts, **named).representations
    handle.remove()
    assert torch.equal(kept["b.0"].tokens, maps_as_tokens(outputs[0]))
    assert kept["b.0"].grid == tuple(outputs[0].shape[2:])
    assert kept["a.0"].grid == (8, 8)
    assert form == "mask" or kept["b.0"].input == INPUTS.get(form, "args[1]")
    if form != "mask":
        assert set(probed(model, "regex:[ab][.]", *inputs, **named).representations) == {
            f"{side}.{k}" for side in "ab" for k in range(3)
        }


INPUTS = {"named": "view", "mapping": "args[0]['b']['c']", "list": "args[0][1]"}


def test_channels_last_towers_of_two_inputs():
    def forward(model, x, y):
        return [model.norm(tower(z).permute(0, 2, 3, 1)) for tower, z in ((model.a, x), (model.b, y))]

    model = Model(forward, a=tower(), b=tower(), norm=nn.LayerNorm(5)).eval()
    kept = probed(model, "norm#1", FIRST, SECOND).representations["norm#1"]
    assert (kept.input, kept.grid) == ("args[1]", (4, 4))
    torch.testing.assert_close(kept.tokens, model.norm(maps_as_tokens(model.b(SECOND))))


def test_vectors_that_condition_a_model_are_named_without_a_warning(recwarn):
    condition = torch.randn(2, 7)
    model = Model(
        lambda model, x, label: model.a(x) + model.c(label)[:, :, None, None],
        a=tower(), c=nn.Sequential(nn.Linear(7, 5), nn.ReLU()),
    ).eval()  # fmt: skip
    message = r"does not depend on the images, but on the input 'label' of shape \(2, 7\); layouts={'c.0': 'NC'}"
    with pytest.raises(RepresentationError, match=message):
        probed(model, "c.0", FIRST, label=condition)
    kept = probed(model, "c.0", FIRST, label=condition, layouts={"c.0": "NC"}).representations["c.0"]
    assert torch.equal(kept.tokens[:, 0], model.c[0](condition).detach())
    probe = probed(model, "all", FIRST, label=condition)
    assert set(probe.skipped) == {"c", "c.0", "c.1"}
    assert not recwarn.list


class Attending(nn.Module):
    """Each image attends to the other."""

    def __init__(self):
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.first, self.second = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))

    def forward(self, x, y):
        x, y = self.patch(x).flatten(2).mT, self.patch(y).flatten(2).mT
        return self.first(x, y, y)[0], self.norm(y + self.second(y, x, x)[0])


def test_attention_across_inputs_belongs_to_its_queries():
    model = Attending().eval()
    kept = probed(model, ["first", "second", "norm"], FIRST, SECOND).representations
    assert [(read.input, read.grid) for read in kept.values()] == [
        ("args[0]", (4, 4)), ("args[1]", (4, 4)), ("args[1]", (4, 4)),
    ]  # fmt: skip
    kept = probed(model, "norm", FIRST, SECOND, layouts={"norm": "NTC"}).representations["norm"]
    torch.testing.assert_close(kept.tokens, model(FIRST, SECOND)[1].detach())
    assert kept.grid is None


@pytest.mark.parametrize("join", [torch.cat, lambda pair: torch.stack(pair, 1).flatten(0, 1)], ids=["cat", "stack"])
def test_inputs_that_share_one_batch_leave_the_second_out_with_a_note(join):
    model = Model(lambda model, x, y: model.trunk(join([x, y])), trunk=tower()).eval()
    with pytest.warns(UserWarning, match="left out"):
        probe = probed(model, "trunk.2", FIRST, SECOND)
    assert probe.notes["trunk.2"].startswith("16 vectors per image belong to the input args[1] of shape (2, 3, 16, 16)")
    kept = probe.representations["trunk.2"]
    assert kept.grid == (4, 4)
    torch.testing.assert_close(kept.tokens, maps_as_tokens(model.trunk(FIRST)))


@pytest.mark.filterwarnings("ignore")
def test_words_before_the_image_are_no_prefix():
    config = transformers.ViltConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=64, patch_size=16,
        vocab_size=50,
    )  # fmt: skip
    words, layer = torch.arange(16).view(2, 8), "encoder.layer.0"
    probe = probed(transformers.ViltModel(config), layer, input_ids=words, pixel_values=torch.randn(2, 3, 64, 64))
    kept = probe.representations[layer]
    assert (kept.tokens.shape[1], kept.prefix.shape[1], kept.grid) == (16, 1, (4, 4))
    assert probe.notes[layer].startswith("8 vectors per image belong to the input 'input_ids' of shape (2, 8)")


class Untruthful(Mapping):
    """A mapping without a truth value, as TensorDict is."""

    def __init__(self, **items):
        self.items_ = items

    def __getitem__(self, key):
        return self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return 2  # of a batch, whatever it holds

    def __bool__(self):
        raise RuntimeError("has no truth value")


def test_a_mapping_without_a_truth_value_is_an_input_like_any_other():
    model = Model(lambda net, batch: Untruthful(features=net.stem(batch["pixels"])), stem=nn.Conv2d(3, 4, 1)).eval()
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), Probe(model, "stem") as probe:
        output = model(Untruthful(pixels=pixels))["features"]
    assert torch.equal(probe.representations["stem"].tokens, output.flatten(2).mT)
