"""Facets of attention layers: queries, keys and values by name, against hooks on the projections that make them."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import linear
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from rsm_probe import Probe, capture, sweep
from rsm_probe.errors import LayerError, RepresentationError
from rsm_probe.probe.describe import describe_layers

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


@pytest.mark.parametrize(("heads", "grad"), [(4, False), (3, False), (4, True)], ids=["fused", "odd", "gradients"])
def test_multihead_attention_of_torch(heads, grad):
    """PyTorch projects and attends in one operation where the number of heads is even and no gradient is needed."""
    torch.manual_seed(0)
    options = {"num_layers": 2, "num_heads": heads, "hidden_dim": CHANNELS, "mlp_dim": 64, "num_classes": 5}
    model, x = VisionTransformer(image_size=64, patch_size=16, **options).eval(), images()
    name = "encoder.layers.encoder_layer_1"
    attention = model.get_submodule(f"{name}.self_attention")
    nn.init.normal_(attention.in_proj_bias)
    # With gradients, the layers before it compute in other operations too.
    with torch.set_grad_enabled(grad), Probe(model, f"{name}.ln_1") as probe:
        model(x)
    layer = probe.representations[f"{name}.ln_1"]
    entering = torch.cat((layer.prefix, layer.tokens), 1)
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    expected = [linear(entering, weight, bias).detach() for weight, bias in zip(weights, biases, strict=True)]
    names = [f"{name}.self_attention[{kind}]" for kind in KINDS]
    if grad:
        with Probe(model, names) as probe:
            model(x)
        check(probe.representations.values(), expected, prefix=1)
        return
    with torch.profiler.profile() as profile, torch.no_grad():
        model(x)
    assert (heads == 4) == any(event.key == "aten::_native_multi_head_attention" for event in profile.key_averages())
    check(facets_of(model, f"{name}.self_attention", x), expected, prefix=1)
    with torch.no_grad(), Probe(model, f"{name}.self_attention[key.1]") as probe:
        model(x)
    width = CHANNELS // heads
    assert torch.equal(next(iter(probe.representations.values())).tokens, expected[1][:, 1:, width : 2 * width])


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


def test_every_head_as_a_layer_of_its_own():
    model, x = Tower(Attention(ORDERS["h 3 d"])).eval(), images()
    expected = ORDERS["h 3 d"](outputs_of(model, ["attn.qkv"], x)["attn.qkv"])
    with torch.no_grad(), Probe(model, ["attn[key.*]", "attn[key.1]", "att*[value.*]"]) as probe:
        model(x)
        model(x)
    names = [f"attn[{kind}.{head}]" for kind in ("key", "value") for head in range(HEADS)]
    assert sorted(probe.representations) == names
    for kind in (1, 2):
        for head in range(HEADS):
            tokens = probe.representations[f"attn[{KINDS[kind]}.{head}]"].tokens
            assert torch.equal(tokens, expected[kind][:, :, head])


def test_grouped_queries_have_fewer_heads_of_keys():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.kv = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, 16)

        def forward(self, x):
            query = self.q(x).unflatten(-1, (6, 8)).transpose(1, 2)
            key, value = (part[:, None].expand(-1, 6, -1, -1) for part in self.kv(x).chunk(2, -1))
            return nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    model, x = Tower(Grouped()).eval(), images()
    raw = outputs_of(model, ["attn.q", "attn.kv"], x)
    check(facets_of(model, "attn", x), [raw["attn.q"], *raw["attn.kv"].chunk(2, -1)])
    with torch.no_grad(), Probe(model, ["attn[query.*]", "attn[key.*]"]) as probe:
        model(x)
    assert sorted(probe.representations) == ["attn[key.0]", *(f"attn[query.{head}]" for head in range(6))]


def test_the_projection_is_read_before_operations_in_place_and_biases_count_as_a_part_of_it():
    class InPlace(Attention):
        def forward(self, x):
            projected = linear(x.transpose(0, 1), self.qkv.weight).transpose(0, 1)
            projected = projected + self.qkv.bias
            query, key, value = (part.transpose(1, 2) for part in self.split(projected))
            query.mul_(0.25)
            key += 1
            weights = query @ key.transpose(-2, -1)
            weights -= weights.amax(-1, keepdim=True)
            return self.proj((weights.softmax(-1) @ value).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model, x = Tower(InPlace(ORDERS["3 h d"])).eval(), images()
    entering = outputs_of(model, ["attn"], x)["attn/in"]
    expected = linear(entering.transpose(0, 1), model.attn.qkv.weight).transpose(0, 1) + model.attn.qkv.bias
    check(facets_of(model, "attn", x), expected.detach().chunk(3, -1))


def test_rotary_embeddings_and_norms_join_channels_within_their_head_only():
    class Rotary(Attention):
        def forward(self, x):
            query, key, value = (part.transpose(1, 2) for part in self.split(self.qkv(x)))
            angles = torch.arange(x.shape[1])[:, None] * torch.linspace(0.1, 1, WIDTH // 2)

            def halves(part):
                cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
                first, second = part.chunk(2, -1)
                return part * cos + torch.cat((-second, first), -1) * sin

            def pairs(part):
                pairs = torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous())
                return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

            query = nn.functional.normalize(halves(query), dim=-1)
            attended = nn.functional.scaled_dot_product_attention(query, pairs(key), value)
            return self.proj(attended.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model, x = Tower(Rotary(ORDERS["h 3 d"])).eval(), images()
    expected = [part.flatten(2) for part in ORDERS["h 3 d"](outputs_of(model, ["attn.qkv"], x)["attn.qkv"])]
    check(facets_of(model, "attn", x), expected)


@pytest.mark.parametrize("mixed", ["sum", "gates", "agents", "channels"])
def test_what_no_attention_operation_shows_is_refused_and_the_projection_can_be_probed(mixed):
    class Mixed(Attention):
        def forward(self, x):
            query, key, value = (part.transpose(1, 2) for part in self.split(self.qkv(x)))
            if mixed == "sum":
                attended = nn.functional.scaled_dot_product_attention(query + key, key, value)
            elif mixed == "gates":
                attended = nn.functional.scaled_dot_product_attention(query * key, value, value)
            elif mixed == "agents":  # pooled queries attend, and are attended to
                agents = query.unflatten(2, (4, -1)).mean(2)
                collected = (agents @ key.transpose(-2, -1)).softmax(-1) @ value
                attended = (query @ agents.transpose(-2, -1)).softmax(-1) @ collected
            else:
                attended = value @ (query.transpose(-2, -1) @ key).softmax(-1)
            return self.proj(attended.transpose(1, 2).flatten(2))

    model = Tower(Mixed(ORDERS["3 h d"])).eval()
    message = r"layer 'attn\[query\]' .*probe a projection whole: 'attn.qkv'"
    with pytest.raises(RepresentationError, match=message), torch.no_grad(), Probe(model, "attn[query]"):
        model(images())
    with torch.no_grad(), Probe(model, "attn.qkv") as probe:
        model(images())
    assert probe.representations["attn.qkv"].tokens.shape == (3, 16, 3 * CHANNELS)


def test_attention_to_a_text_is_read_by_layouts():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.q, self.kv = nn.Conv2d(3, CHANNELS, 16, 16), nn.Linear(48, 48), nn.Linear(7, 96)

        def forward(self, x, text):
            query = self.q(self.patches(x).flatten(2).transpose(1, 2))
            key, value = self.kv(text).chunk(2, -1)
            return (query @ key.transpose(1, 2)).softmax(-1) @ value

    model, x, text = Cross().eval(), images(), torch.randn(3, 5, 7)
    advice = r"layouts=\{'\[key\]': 'NTC'\}"
    with pytest.raises(RepresentationError, match=advice), torch.no_grad(), Probe(model, "[key]"):
        model(x, text)
    with torch.no_grad(), Probe(model, ["[query]", "[key]"], layouts={"[key]": "NTC"}) as probe:
        model(x, text)
    assert torch.equal(probe.representations["[key]"].tokens, model.kv(text)[..., :48].detach())
    assert probe.representations["[query]"].grid == (4, 4)


def test_tokens_of_a_text_beside_those_of_the_image_have_projections_of_their_own():
    class Joint(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.qkv = nn.Conv2d(3, CHANNELS, 16, 16), nn.Linear(CHANNELS, 3 * CHANNELS)
            self.of_text = nn.Linear(7, 3 * CHANNELS)

        def forward(self, x, text):
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            joint = torch.cat((self.of_text(text), self.qkv(tokens)), 1)
            query, key, value = (part.transpose(1, 2) for part in ORDERS["v k q"](joint))
            return nn.functional.scaled_dot_product_attention(query, key, value)[:, :, 5:]

    torch.manual_seed(0)
    model, x, text = Joint().eval(), images(), torch.randn(3, 5, 7)
    with torch.no_grad(), Probe(model, ["[query]", "[key]", "qkv"]) as probe:
        model(x, text)
    _, key, query = probe.representations["qkv"].tokens.chunk(3, -1)
    assert torch.equal(probe.representations["[query]"].tokens, query)
    assert torch.equal(probe.representations["[key]"].tokens, key)


def test_calls_of_a_shared_layer_are_numbered():
    class Twice(Tower):
        def forward(self, x):
            return self.attn(super().forward(x))

    model, x = Twice(Attention(ORDERS["h 3 d"])).eval(), images()
    calls = []
    hook = model.attn.qkv.register_forward_hook(lambda module, args, output: calls.append(output.clone()))
    with hook, torch.no_grad(), Probe(model, ["attn[key]#1", "attn[query]#0"]) as probe:
        model(x)
    second, first = probe.representations["attn[key]#1"], probe.representations["attn[query]#0"]
    assert torch.equal(second.tokens, ORDERS["h 3 d"](calls[1])[1].flatten(2))
    assert torch.equal(first.tokens, ORDERS["h 3 d"](calls[0])[0].flatten(2))
    advice = r"choose a call: 'attn\[key\]#0'"
    with pytest.raises(LayerError, match=advice), torch.no_grad(), Probe(model, "attn[key]"):
        model(x)


def test_facets_run_through_sweeps_and_captures(tmp_path):
    model, x = timm.create_model("vit_tiny_patch16_224", img_size=64, **ViT).eval(), images(12)
    layers, options = ["blocks.*.attn[key]", "blocks.1.attn[value.2]"], {"batch_size": 6}
    result = sweep(
        {"vit": model}, x, layers, tokens=["locations", "class"], matchings=("identity",), workers=1,
        keep="blocks.*.attn[key]", layouts={"blocks.*.attn[key]": "NTC"}, **options,
    )  # fmt: skip
    names = ["blocks.0.attn[key]", "blocks.1.attn[key]", "blocks.1.attn[value.2]"]
    assert set(result.cka.layer_a.values) == {f"{name}{kind}" for name in names for kind in ("", "@class")}
    captured = capture(model, x, layers, tmp_path / "vit.zarr", **options)
    raw = outputs_of(model, ["blocks.1.attn.qkv"], x)["blocks.1.attn.qkv"].chunk(3, -1)
    assert list(captured) == names
    torch.testing.assert_close(captured["blocks.1.attn[key]"].tokens(), raw[1][:, 1:])
    torch.testing.assert_close(captured["blocks.1.attn[value.2]"].prefix(), raw[2][:, :1, 2 * WIDTH :])


def test_attention_layers_are_listed():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, **ViT).eval()
    infos, _ = describe_layers(model, images())
    assert [info.name for info in infos if info.has_facets] == ["blocks.0.attn", "blocks.1.attn"]


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
