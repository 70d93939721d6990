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


def probed(model, layers, *inputs, layouts=None, **named):
    with torch.no_grad(), Probe(model.eval(), layers, layouts=layouts) as probe:
        model(*inputs, **named)
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


def test_a_shared_trunk_says_which_call_saw_another_input():
    message = r"'trunk.0#1' .*belongs to the input args\[1\] of shape \(2, 3, 16, 16\).*layouts={'trunk.0#1': 'NCHW'}"
    with pytest.raises(RepresentationError, match=message):
        probed(SHARED, ["trunk.0#0", "trunk.0#1"], FIRST, SECOND)


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


def test_calls_that_a_pattern_drops_are_listed_and_warned_of():
    with pytest.warns(UserWarning, match=r"3 layers matched by a pattern could not be captured.*trunk.0#1"):
        probe = probed(SHARED, "trunk.*", FIRST, SECOND)
    assert list(probe.representations) == ["trunk.0#0", "trunk.1#0", "trunk.2#0"]
    assert list(probe.skipped) == ["trunk.0#1", "trunk.1#1", "trunk.2#1"]
    assert all("args[1]" in reason for reason in probe.skipped.values())


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
def test_layers_of_another_input_say_which_and_are_read_with_a_layout(form):
    model, inputs, named, name = FORMS[form]
    with pytest.raises(RepresentationError, match="belongs to the input " + re.escape(name)) as raised:
        probed(model, "b.0", *inputs, **named)
    assert "layouts={'b.0': 'NCHW'}" in str(raised.value)
    found = []
    handle = model.b[0].register_forward_hook(lambda module, args, output: found.append(output.clone()))
    kept = probed(model, ["a.0", "b.0"], *inputs, layouts={"b.0": "NCHW"}, **named).representations
    handle.remove()
    assert torch.equal(kept["b.0"].tokens, maps_as_tokens(found[0]))
    assert kept["b.0"].grid == tuple(found[0].shape[2:])
    assert kept["a.0"].grid == (8, 8)
    with pytest.warns(UserWarning, match=r"matched by a pattern could not be captured.*\(b.0, b.1, b.2\)"):
        assert set(probed(model, "regex:[ab][.]", *inputs, **named).representations) == {"a.0", "a.1", "a.2"}


def test_channels_last_towers_are_told_the_layout_that_fits():
    def forward(model, x, y):
        return [model.norm(tower(z).permute(0, 2, 3, 1)) for tower, z in ((model.a, x), (model.b, y))]

    model = Model(forward, a=tower(), b=tower(), norm=nn.LayerNorm(5)).eval()
    with pytest.raises(RepresentationError, match=r"layouts={'norm#1': 'NHWC'}"):
        probed(model, "norm#1", FIRST, SECOND)
    kept = probed(model, "norm#1", FIRST, SECOND, layouts={"norm#1": "NHWC"}).representations["norm#1"]
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
    assert probed(model, "first", FIRST, SECOND).representations["first"].grid == (4, 4)
    for layer in ("second", "norm"):
        message = rf"belongs to the input args\[1\] .*layouts={{'{layer}': 'NTC'}}"
        with pytest.raises(RepresentationError, match=message):
            probed(model, layer, FIRST, SECOND)
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
