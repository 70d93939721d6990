"""Outputs of real and constructed models as concept vectors: layout, grid and prefix tokens."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from rsm_probe import Probe
from rsm_probe.errors import RepresentationError
from rsm_probe.probe.representation import infer_layout, pick_tensor, to_representation


def probed(model, layers, *inputs, **options):
    """Representations and, by other hooks, copies of the raw outputs of the same pass."""
    raw, names = {}, [layers] if isinstance(layers, str) else list(layers)
    handles = [
        model.get_submodule(n).register_forward_hook(
            lambda m, a, o, n=n: raw.update({n: o.clone() if isinstance(o, torch.Tensor) else o})
        )
        for n in names
    ]
    with torch.no_grad(), Probe(model, names, **options) as probe:
        model(*inputs)
    for handle in handles:
        handle.remove()
    return probe.representations, raw


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


# Vision transformers: class and register tokens lie apart from the patches


def test_torchvision_vit_class_token_is_apart():
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=224, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5
    ).eval()
    names = [f"encoder.layers.encoder_layer_{k}" for k in range(2)]
    kept, raw = probed(model, names, torch.randn(2, 3, 224, 224))
    for name in names:
        assert kept[name].tokens.shape == (2, 196, 32)
        assert kept[name].prefix.shape == (2, 1, 32)
        assert kept[name].grid == (14, 14)
        close(kept[name].tokens, raw[name][:, 1:])
        close(kept[name].prefix, raw[name][:, :1])


@pytest.mark.parametrize(
    ("name", "options", "prefix", "grid"),
    [
        ("vit_tiny_patch16_224", {"img_size": 224}, 1, (14, 14)),
        ("deit_tiny_distilled_patch16_224", {"img_size": 224}, 2, (14, 14)),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56}, 5, (4, 4)),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 28}, 5, (2, 2)),
        ("vit_base_patch16_siglip_224", {"img_size": 64}, 0, (4, 4)),
        ("vit_tiny_patch16_224", {"img_size": (32, 96)}, 1, (2, 6)),
    ],
)
def test_timm_vit_prefix_tokens_are_apart(name, options, prefix, grid):
    torch.manual_seed(0)
    model = timm.create_model(name, depth=2, embed_dim=32, num_heads=2, num_classes=0, **options).eval()
    size = options["img_size"]
    x = torch.randn(2, 3, *((size, size) if isinstance(size, int) else size))
    with torch.no_grad():
        expected = model.forward_intermediates(
            x, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True, norm=False
        )
    kept, _ = probed(model, ["blocks.0", "blocks.1"], x)
    for block, answer in zip(("blocks.0", "blocks.1"), expected, strict=True):
        # timm leaves out the prefix where there is none.
        patches, first = answer if prefix else (answer, answer[:, :0])
        assert kept[block].grid == grid
        assert kept[block].prefix.shape == (2, prefix, 32)
        close(kept[block].tokens, patches)
        close(kept[block].prefix, first)


def test_transformers_vit_agrees_with_hidden_states():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    model = ViTModel(
        ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=224)
    ).eval()
    with torch.no_grad(), Probe(model) as probe:
        states = model(pixel_values=torch.randn(2, 3, 224, 224), output_hidden_states=True).hidden_states
    assert len(probe.representations) == 3
    # The first hidden state is what enters the first block.
    for kept, state in zip(probe.representations.values(), states[1:], strict=True):
        assert kept.grid == (14, 14)
        assert kept.prefix.shape == (2, 1, 32)
        close(kept.tokens, state[:, 1:])
        close(kept.prefix, state[:, :1])


def test_image_size_of_the_pass_decides_not_that_of_the_model():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=32, num_heads=2, dynamic_img_size=True).eval()
    for size, grid in (((64, 64), (4, 4)), ((48, 80), (3, 5)), ((32, 128), (2, 8))):
        kept, raw = probed(model, "blocks.0", torch.randn(2, 3, *size))
        assert kept["blocks.0"].grid == grid
        close(kept["blocks.0"].tokens, raw["blocks.0"][:, 1:])


@pytest.mark.parametrize("batch", [1, 2, 17])
def test_batch_size_does_not_change_how_tokens_are_read(batch):
    # 17 images and 17 tokens: either axis might be the batch.
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=32, num_heads=2, img_size=64).eval()
    x = torch.randn(17, 3, 64, 64)
    kept, raw = probed(model, "blocks.0", x[:batch])
    assert kept["blocks.0"].tokens.shape == (batch, 16, 32)
    close(kept["blocks.0"].tokens, raw["blocks.0"][:, 1:])


# Window transformers: channels last


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_timm_swin_maps_are_read_with_channels_last(size):
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=size, window_size=4, embed_dim=12, depths=(1, 2), num_heads=(2, 2)
    ).eval()
    names = ["layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1"]
    x = torch.randn(2, 3, *size)
    kept, raw = probed(model, [*names, "layers.1"], x)
    for name in names:
        n, h, w, c = raw[name].shape
        assert kept[name].grid == (h, w)
        assert kept[name].tokens.shape == (n, h * w, c)
        close(kept[name].tokens, raw[name].flatten(1, 2))
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True, norm=False)
    # timm's own answer comes with channels first.
    close(kept["layers.1"].tokens, maps[1].permute(0, 2, 3, 1).flatten(1, 2))


def test_torchvision_swin_maps_are_read_with_channels_last():
    torch.manual_seed(0)
    model = SwinTransformer(
        patch_size=[4, 4], embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=[4, 4], num_classes=3
    ).eval()
    names = ["features.1.0", "features.3.0"]
    kept, raw = probed(model, names, torch.randn(2, 3, 32, 64))
    assert [kept[name].grid for name in names] == [(8, 16), (4, 8)]
    for name in names:
        close(kept[name].tokens, raw[name].flatten(1, 2))


def test_channels_last_map_with_as_many_channels_as_rows_and_columns_is_read_right():
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8, depths=(1,), num_heads=(2,)
    ).eval()
    kept, raw = probed(model, "layers.0.blocks.0", torch.randn(2, 3, 32, 32))
    assert raw["layers.0.blocks.0"].shape == (2, 8, 8, 8)
    close(kept["layers.0.blocks.0"].tokens, raw["layers.0.blocks.0"].flatten(1, 2))


@pytest.mark.parametrize("layer", ["norm1", "mlp.fc2", "mlp"])
def test_layers_that_work_on_the_last_axis_have_their_channels_there(layer):
    # A normalisation or linear map over the last axis says where the channels are, even where the shape does not.
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8, depths=(1,), num_heads=(2,)
    ).eval()
    name = f"layers.0.blocks.0.{layer}"
    output = torch.arange(512.0).reshape(1, 8, 8, 8)
    layout = infer_layout(output, 1, [(8, 8)], model.get_submodule(name))
    close(to_representation(output, layout, [(8, 8)]).tokens, output.flatten(1, 2))


def test_transformers_swin_gives_tokens_in_a_tuple():
    from transformers import SwinConfig, SwinModel

    torch.manual_seed(0)
    model = SwinModel(
        SwinConfig(image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4)
    ).eval()
    kept, raw = probed(model, ["encoder.layers.0.blocks.0", "encoder.layers.1.blocks.0"], torch.randn(2, 3, 32, 32))
    assert [r.grid for r in kept.values()] == [(8, 8), (4, 4)]
    for name, representation in kept.items():
        output = raw[name][0] if isinstance(raw[name], tuple) else raw[name]
        assert representation.prefix.shape[1] == 0
        close(representation.tokens, output)


# Convolutional networks


@pytest.mark.parametrize(
    ("build", "layers", "size"),
    [
        (lambda: torchvision.models.resnet18(), ["layer1", "layer3.1"], 64),
        # As many channels as rows and columns: (64, 64, 64).
        (lambda: torchvision.models.resnet18(), ["layer1.0", "layer1.0.relu#1"], 256),
        (lambda: torchvision.models.mobilenet_v3_small(), ["features.1", "features.4"], 64),
        # Its blocks permute to channels last and back, which leaves their strides behind.
        (lambda: torchvision.models.convnext.ConvNeXt(_convnext_stages()), ["features.1.0", "features.3.0"], 64),
    ],
    ids=["resnet18", "resnet18-tie", "mobilenet", "convnext"],
)
def test_maps_of_convolutional_networks_have_their_channels_first(build, layers, size):
    torch.manual_seed(0)
    model = build().eval()
    raw = {}
    handles = [
        model.get_submodule(name.split("#")[0]).register_forward_hook(
            lambda m, a, o, n=name: raw.update({n: o.clone()})
        )
        for name in layers
    ]
    with torch.no_grad(), Probe(model, layers) as probe:
        model(torch.randn(1, 3, size, size))
    for handle in handles:
        handle.remove()
    for name in layers:
        kept = probe.representations[name]
        assert kept.grid == tuple(raw[name].shape[2:])
        assert kept.prefix.shape == (1, 0, raw[name].shape[1])
        close(kept.tokens, raw[name].flatten(2).transpose(1, 2))


def _convnext_stages():
    from torchvision.models.convnext import CNBlockConfig

    return [CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 1)]


@pytest.mark.parametrize(("layer", "grid"), [("avgpool", (1, 1)), ("fc", None), ("", None)])
def test_pooled_outputs_are_one_location(layer, grid):
    model = torchvision.models.resnet18(num_classes=7).eval()
    kept, raw = probed(model, layer, torch.randn(2, 3, 32, 32))
    assert kept[layer].grid == grid
    assert kept[layer].prefix.shape[1] == 0
    close(kept[layer].tokens, raw[layer].flatten(1).unsqueeze(1))


def test_pooling_over_one_axis_is_one_location():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.AdaptiveAvgPool1d(1))
    kept, raw = probed(model, "2", torch.randn(2, 3, 4, 4))
    assert raw["2"].shape == (2, 4, 1)
    assert kept["2"].grid is None
    close(kept["2"].tokens, raw["2"].transpose(1, 2))


# Token sequences with the batch in the middle


class TokensFirst(nn.Module):
    """A transformer layer of torch in its default order, (tokens, batch, channels)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16)

    def forward(self, x):
        return self.layer(self.conv(x).flatten(2).permute(2, 0, 1))


@pytest.mark.parametrize("batch", [1, 3])
def test_sequences_with_the_batch_in_the_middle_are_turned(batch):
    kept, raw = probed(TokensFirst().eval(), "layer", torch.randn(batch, 3, 8, 16))
    assert raw["layer"].shape == (8, batch, 8)
    assert kept["layer"].grid == (2, 4)
    close(kept["layer"].tokens, raw["layer"].transpose(0, 1))


def test_repeated_copies_of_one_location_are_no_grid():
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Identity()

        def forward(self, x):
            return self.head(self.conv(x).flatten(2).transpose(1, 2)[:, :1].repeat(1, 100, 1))

    with pytest.raises(RepresentationError, match=r"'head'.*\(2, 100, 8\).*layouts="):
        probed(Queries(), "head", torch.randn(2, 3, 16, 16))


# The parts, without a model


LEAF = nn.Identity()


@pytest.mark.parametrize(
    ("shape", "batch", "grids", "module", "layout"),
    [
        ((2, 8), 2, [], LEAF, "NC"),
        ((2, 8, 1), 2, [], LEAF, "NCT"),
        ((2, 17, 8), 2, [(4, 4)], LEAF, "NTC"),
        ((17, 2, 8), 2, [(4, 4)], LEAF, "TNC"),
        ((2, 2, 8), 2, [(1, 2)], LEAF, "NTC"),
        ((2, 8, 4, 6), 2, [(4, 6)], LEAF, "NCHW"),
        ((2, 4, 6, 8), 2, [(4, 6)], LEAF, "NHWC"),
        # Half of a grid, rounded up, as patch merging leaves it.
        ((2, 8, 4, 3), 2, [(7, 5)], LEAF, "NCHW"),
        ((2, 2, 2, 8), 2, [(7, 5)], LEAF, "NHWC"),
        ((2, 8, 1, 1), 2, [(4, 4)], LEAF, "NCHW"),
        # Both readings fit: what the layer is made of decides.
        ((2, 4, 4, 4), 2, [(4, 4)], nn.Sequential(nn.Conv2d(4, 4, 1)), "NCHW"),
        ((2, 4, 4, 4), 2, [(4, 4)], nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), "NCHW"),
        ((2, 4, 4, 4), 2, [(4, 4)], nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), "NHWC"),
        ((2, 4, 4, 4), 2, [(4, 4)], nn.ReLU(), "NCHW"),
        # Neither fits, but a convolution gives channels first whatever was seen before.
        ((2, 8, 3, 9), 2, [(4, 4)], nn.Conv2d(8, 8, 1), "NCHW"),
    ],
)
def test_layout_follows_from_shapes_and_grids(shape, batch, grids, module, layout):
    assert infer_layout(torch.zeros(shape), batch, grids, module) == layout


@pytest.mark.parametrize(
    ("shape", "batch", "message"),
    [
        ((), 2, r"shape \(\).*at least \(N, C\)"),
        ((2,), 2, r"shape \(2,\)"),
        ((8, 49, 12), 2, r"shape \(8, 49, 12\), but the batch has 2 images.*split"),
        ((6, 8), 2, r"shape \(6, 8\), but the batch has 2 images"),
        ((8, 4, 4, 12), 2, r"shape \(8, 4, 4, 12\), but the batch has 2 images"),
        ((2, 1, 7, 256), 2, r"shape \(2, 1, 7, 256\).*layouts="),
        ((2, 3, 4, 4, 4), 2, r"shape \(2, 3, 4, 4, 4\).*more than two spatial axes"),
    ],
)
def test_shapes_that_settle_nothing_are_refused(shape, batch, message):
    with pytest.raises(RepresentationError, match=message):
        infer_layout(torch.zeros(shape), batch, [(4, 4)], LEAF)


@pytest.mark.parametrize(
    ("layout", "order", "grid"),
    [
        ("NCHW", (0, 3, 1, 2), (2, 3)),
        ("NHWC", (0, 1, 2, 3), (2, 3)),
    ],
)
def test_map_becomes_tokens_row_by_row(layout, order, grid):
    # Each value says which image, row, column and channel it belongs to.
    values = torch.arange(2 * 2 * 3 * 4.0).reshape(2, 2, 3, 4)
    kept = to_representation(values.permute(order), layout, [])
    assert kept.grid == grid
    assert torch.equal(kept.tokens, values.reshape(2, 6, 4))
    assert kept.prefix.shape == (2, 0, 4)


@pytest.mark.parametrize(("layout", "order"), [("NTC", (0, 1, 2)), ("TNC", (1, 0, 2)), ("NCT", (0, 2, 1))])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_sequence_becomes_prefix_and_tokens(layout, order, prefix):
    values = torch.randn(2, prefix + 6, 4)
    kept = to_representation(values.permute(order), layout, [(2, 3)])
    assert kept.grid == (2, 3)
    assert torch.equal(kept.prefix, values[:, :prefix])
    assert torch.equal(kept.tokens, values[:, prefix:])


@pytest.mark.parametrize(
    ("length", "grids", "grid"),
    [
        (17, [(8, 8), (4, 4)], (4, 4)),
        (5, [(4, 4)], (2, 2)),
        (16, [(4, 4), (2, 8)], (2, 8)),  # of two that fit, the later
        (17, [(4, 4), (3, 3)], (4, 4)),  # one prefix token, not eight beside the later grid
        (10, [(3, 3)], (3, 3)),  # one prefix token, not six beside a halved grid
    ],
)
def test_grid_is_the_one_with_the_fewest_prefix_tokens(length, grids, grid):
    kept = to_representation(torch.randn(2, length, 4), "NTC", grids)
    assert kept.grid == grid
    assert kept.prefix.shape[1] == length - grid[0] * grid[1]


@pytest.mark.parametrize("length", [15, 25, 100])
def test_more_than_eight_extra_tokens_are_a_wrong_grid(length):
    with pytest.raises(RepresentationError, match=rf"{length} tokens.*seen: 8x8, 4x4"):
        to_representation(torch.randn(2, length, 4), "NTC", [(8, 8), (4, 4)])


def test_sequence_without_any_grid_says_so():
    with pytest.raises(RepresentationError, match=r"16 tokens.*seen: none"):
        to_representation(torch.randn(2, 16, 4), "NTC", [])


def test_first_floating_map_of_the_batch_is_picked():
    wanted = torch.zeros(2, 5, 4)
    output = (None, torch.zeros(2, 4), torch.zeros(7, 5, 4), {"x": [torch.zeros(2, 5, 4).long(), wanted]}, wanted + 1)
    assert pick_tensor(output, None, 2) is wanted


def test_without_a_map_the_first_floating_tensor_is_picked():
    vectors = torch.zeros(2, 4)
    assert pick_tensor((torch.zeros(2).long(), vectors, torch.zeros(2)), None, 2) is vectors
