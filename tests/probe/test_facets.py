"""Facets of attention layers: queries, keys and values by name, against hooks on the projections that make them."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import linear
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from rsm_probe import Probe
from rsm_probe.errors import LayerError, RepresentationError

KINDS = ("query", "key", "value")
CHANNELS, HEADS, WIDTH = 48, 3, 16
ViT = {"depth": 2, "embed_dim": CHANNELS, "num_heads": HEADS, "num_classes": 0}


def images(n=3, side=64):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(n))


def outputs_of(model, names, x):
    """Copies of the outputs of modules, and of their inputs as `name/in`, by plain hooks."""
    raw = {}

    def record(name):
        return lambda module, args, output: raw.update({name: output.clone(), f"{name}/in": args[0].clone()})

    handles = [model.get_submodule(name).register_forward_hook(record(name)) for name in names]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return raw


def facets_of(model, layer, x, **options):
    """The three facets, after checking that a traced pass and a later one agree and leave the model's output alone."""
    names = [f"{layer}[{kind}]" for kind in KINDS]
    with torch.no_grad(), Probe(model, names, **options) as probe:
        outputs = [model(x)]
        traced = probe.representations
        outputs.append(model(x))
        later = probe.representations
    with torch.no_grad():
        outputs.append(model(x))
    assert all(torch.equal(output, outputs[-1]) for output in outputs[:-1])
    for name in names:
        assert torch.equal(traced[name].tokens, later[name].tokens)
        assert torch.equal(traced[name].prefix, later[name].prefix)
    return [later[name] for name in names]


def check(facets, expected, prefix=0):
    """Compares with sequences (N, L, C) whose first tokens are a prefix."""
    for facet, sequence in zip(facets, expected, strict=True):
        assert torch.equal(facet.tokens, sequence[:, prefix:])
        assert torch.equal(facet.prefix, sequence[:, :prefix])


class Attention(nn.Module):
    """Attention with a fused projection, whose channels `split` arranges as queries, keys and values per head."""

    def __init__(self, split, heads=HEADS):
        super().__init__()
        self.split, self.heads = split, heads
        self.qkv, self.proj = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x):
        query, key, value = (part.transpose(1, 2) for part in self.split(self.qkv(x)))
        weights = (query @ key.transpose(-2, -1) / WIDTH**0.5).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


class Tower(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.patches, self.attn = nn.Conv2d(3, CHANNELS, 16, 16), attention

    def forward(self, x):
        return self.attn(self.patches(x).flatten(2).transpose(1, 2))


# How models arrange 3 * C channels: (N, L, 3C) -> queries, keys and values (N, L, heads, C / heads).
ORDERS = {
    "3 h d": lambda y: y.unflatten(-1, (3, HEADS, WIDTH)).unbind(2),
    "h 3 d": lambda y: y.unflatten(-1, (HEADS, 3, WIDTH)).unbind(3),
    "d 3 h": lambda y: y.unflatten(-1, (WIDTH, 3, HEADS)).transpose(2, 4).unbind(3),
    "d h 3": lambda y: y.unflatten(-1, (WIDTH, HEADS, 3)).transpose(2, 3).unbind(4),
    "v k q": lambda y: y.unflatten(-1, (3, HEADS, WIDTH)).unbind(2)[::-1],
    "k q v": lambda y: [y.unflatten(-1, (3, HEADS, WIDTH)).unbind(2)[k] for k in (1, 0, 2)],
    "reversed heads": lambda y: y.unflatten(-1, (3, HEADS, WIDTH)).flip(3).unbind(2),
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_attention_operation_shows_the_order_of_fused_channels(order):
    torch.manual_seed(0)
    model, x = Tower(Attention(ORDERS[order])).eval(), images()
    raw = outputs_of(model, ["attn.qkv"], x)["attn.qkv"]
    expected = [part.flatten(2) for part in ORDERS[order](raw)]
    check(facets_of(model, "attn", x), expected)
    assert not torch.equal(expected[0], expected[1])
    heads = [f"attn[{kind}.{head}]" for kind in KINDS for head in range(HEADS)]
    with torch.no_grad(), Probe(model, heads) as probe:
        model(x)
    for kind, sequence in zip(KINDS, expected, strict=True):
        for head in range(HEADS):
            tokens = probe.representations[f"attn[{kind}.{head}]"].tokens
            assert torch.equal(tokens, sequence[..., head * WIDTH : (head + 1) * WIDTH])


def test_queries_are_told_from_keys_by_the_axis_of_the_softmax():
    class Left(Attention):
        def forward(self, x):
            first, second, value = (part.transpose(1, 2) for part in self.split(self.qkv(x)))
            weights = (first @ second.transpose(-2, -1)).softmax(-2)  # over the rows, which are keys
            return self.proj((weights.transpose(-2, -1) @ value).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model, x = Tower(Left(ORDERS["3 h d"])).eval(), images()
    first, second, value = outputs_of(model, ["attn.qkv"], x)["attn.qkv"].chunk(3, -1)
    check(facets_of(model, "attn", x), [second, first, value])


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"fused": False}], ids=str)
def test_timm_vit(options):
    torch.manual_seed(0)
    fused = options.pop("fused", True)
    model, x = timm.create_model("vit_tiny_patch16_224", img_size=64, **ViT, **options).eval(), images()
    for block in model.blocks:
        block.attn.fused_attn = fused
    raw = outputs_of(model, ["blocks.1.attn.qkv"], x)["blocks.1.attn.qkv"]
    check(facets_of(model, "blocks.1.attn", x), raw.chunk(3, -1), prefix=1)
    check(facets_of(model, "blocks.1", x), raw.chunk(3, -1), prefix=1)  # the attention within a block


@pytest.mark.parametrize(("name", "side"), [("eva02_tiny_patch14_224", 56), ("beit_base_patch16_224", 64)])
def test_biases_outside_of_the_projection_and_rotary_embeddings(name, side):
    torch.manual_seed(0)
    model, x = timm.create_model(name, img_size=side, **ViT).eval(), images(side=side)
    attention = model.blocks[1].attn
    nn.init.normal_(attention.q_bias)
    nn.init.normal_(attention.v_bias)
    entering = outputs_of(model, ["blocks.1.norm1"], x)["blocks.1.norm1"]
    bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    check(facets_of(model, "blocks.1.attn", x), linear(entering, attention.qkv.weight, bias).chunk(3, -1), prefix=1)


def in_image_order(windows, sides, shift):
    """Windows (N * rows * columns, 49, C) as sequences (N, sides * sides * 49, C)."""
    maps = windows.view(-1, sides, sides, 7, 7, windows.shape[-1]).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return maps.roll((shift, shift), (1, 2)).flatten(1, 2)


@pytest.mark.parametrize("block", [0, 1])
def test_windows_are_put_back(block):
    torch.manual_seed(0)
    options = {"depths": (2,), "embed_dim": 24, "num_heads": (3,), "img_size": 56, "num_classes": 0}
    model, x = timm.create_model("swin_tiny_patch4_window7_224", **options).eval(), images(side=56)
    name = f"layers.0.blocks.{block}.attn"
    raw = in_image_order(outputs_of(model, [f"{name}.qkv"], x)[f"{name}.qkv"], 2, 3 * block)
    facets = facets_of(model, name, x)
    check(facets, raw.chunk(3, -1))
    assert facets[0].grid == (14, 14)


def test_torchvision_swin_projects_by_a_function():
    torch.manual_seed(0)
    options = {"embed_dim": 24, "depths": [2], "num_heads": [3], "window_size": [7, 7], "num_classes": 5}
    model, x = SwinTransformer(patch_size=[4, 4], **options).eval(), images(side=56)
    attention = model.get_submodule("features.1.1.attn")
    entering = outputs_of(model, ["features.1.1.attn"], x)["features.1.1.attn/in"].flatten(1, 2)
    expected = linear(entering, attention.qkv.weight, attention.qkv.bias)
    check(facets_of(model, "features.1.1.attn", x), expected.chunk(3, -1))


@pytest.mark.parametrize("grad", [False, True], ids=["fast path", "slow path"])
def test_multihead_attention_of_torch(grad):
    torch.manual_seed(0)
    options = {"num_layers": 2, "num_heads": HEADS, "hidden_dim": CHANNELS, "mlp_dim": 64, "num_classes": 5}
    model, x = VisionTransformer(image_size=64, patch_size=16, **options).eval(), images()
    name = "encoder.layers.encoder_layer_1"
    attention = model.get_submodule(f"{name}.self_attention")
    nn.init.normal_(attention.in_proj_bias)
    entering = outputs_of(model, [f"{name}.ln_1"], x)[f"{name}.ln_1"]
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    expected = [linear(entering, weight, bias).detach() for weight, bias in zip(weights, biases, strict=True)]
    if grad:
        with Probe(model, [f"{name}.self_attention[{kind}]" for kind in KINDS]) as probe:
            model(x)
        check(probe.representations.values(), expected, prefix=1)
    else:
        check(facets_of(model, f"{name}.self_attention", x), expected, prefix=1)


def test_patterns_name_facets_and_character_classes_as_before():
    model, x = timm.create_model("vit_tiny_patch16_224", img_size=64, **ViT).eval(), images()

    def layers(spec):
        with torch.no_grad(), Probe(model, spec) as probe:
            model(x)
        return list(probe.representations)

    assert layers("blocks.*.attn[key]") == ["blocks.0.attn[key]", "blocks.1.attn[key]"]
    assert layers("blocks.[0-1].attn[key.2]") == ["blocks.0.attn[key.2]", "blocks.1.attn[key.2]"]
    assert layers("blocks.[01]") == ["blocks.0", "blocks.1"]
    assert layers("blocks.*[value]") == ["blocks.0[value]", "blocks.1[value]"]


def test_a_part_of_the_output_with_the_name_of_a_facet_is_that_part():
    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            return {"policy": self.conv(x) + 1, "value": self.conv(x)}

    model = nn.Sequential(Critic())
    x = images(side=8)
    with torch.no_grad(), Probe(model, "0[value]") as probe:
        output = model(x)
    assert torch.equal(probe.representations["0[value]"].tokens, output["value"].flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("blocks.0.mlp[key]", "no attention ran in it"),
        ("blocks[key]", "2 attention layers ran in it; name one of them: 'blocks.0.attn', 'blocks.1.attn'"),
        ("blocks.0.attn[key.3]", "has 3 heads of .key., counted from 0, and no head 3"),
        ("blocks.0.attn[keys]", r"no part 'keys'; parts are: none; did you mean \[key\]\?"),
        ("blocks.0.attn[q]", r"did you mean \[query\]\?"),
    ],
)
def test_wrong_facets_are_refused(layer, message):
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, **ViT).eval()
    with pytest.raises(RepresentationError, match=message), torch.no_grad(), Probe(model, layer):
        model(images())
    with pytest.raises(LayerError, match="no layer matches"):
        Probe(model, "layers.*[key]")
