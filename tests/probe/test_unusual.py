"""Inputs, passes and layers that are unusual: read rightly, or refused with what is the matter; never misread."""

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from rsm_probe import Probe
from rsm_probe.errors import LayerError, RepresentationError
from rsm_probe.probe.tracing.location_codes import channel_axis


def probed(model, *inputs, layers, **named):
    with torch.no_grad(), Probe(model.eval(), layers) as probe:
        model(*inputs, **named)
    return probe


class Calls(nn.Module):
    """A model of one function, whose layers are given by name."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs, **named):
        return self.function(self, *inputs, **named)


# Passes after the first


def test_layers_that_were_refused_are_refused_again_and_change_nothing_for_others():
    model, images = timm.create_model("mixer_s16_224", img_size=64).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad(), Probe(model, "blocks.0.**") as probe:
        with pytest.warns(UserWarning, match="could not be captured"):
            model(images)
        first, skipped = probe.representations, probe.skipped
        model(images)
    assert "blocks.0.mlp_tokens.fc1" in skipped
    assert probe.skipped == skipped
    assert probe.representations.keys() == first.keys()
    for name, found in probe.representations.items():
        torch.testing.assert_close(found.tokens, first[name].tokens)


def test_a_layer_that_runs_later_only_is_refused_once():
    model = Calls(lambda model, x: model.b(model.a(x)) if model.deep else model.a(x), a=nn.Conv2d(3, 4, 1), b=nn.ReLU())
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), Probe(model, ["a", "b"]) as probe:
        model.deep = False
        with pytest.raises(LayerError, match="'b' never ran"):
            model(images)
        model.deep = True
        with pytest.raises(RepresentationError, match="call the model again, and the new pass is traced"):
            model(images)
        model(images)
        assert list(probe.representations) == ["a", "b"]


def test_an_early_end_is_that_of_each_kind_of_pass():
    model = Calls(lambda model, x, deep: model.b(model.a(x)) if deep else model.a(x), a=nn.Conv2d(3, 4, 1), b=nn.ReLU())
    images, found = torch.randn(2, 3, 8, 8), []
    with torch.no_grad(), Probe(model, "all", stop_early=True) as probe:
        for deep in (True, False, True, False):
            model(images, deep)
            found.append(list(probe.representations))
    assert found == [["a", "b"], ["a"], ["a", "b"], ["a"]]


@pytest.mark.parametrize(
    "other",
    [
        torch.eye(3, dtype=torch.int64).to_sparse(),
        torch._empty_affine_quantized([3], scale=0.1, zero_point=0, dtype=torch.qint8),
        torch.ones(3, dtype=torch.int64, device="meta"),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ],
    ids=["sparse", "quantised", "meta", "nested"],
)
def test_what_is_passed_by_may_be_any_tensor(other):
    model = Calls(lambda model, x, other: model.a(x), a=nn.Conv2d(3, 4, 1))
    assert probed(model, torch.randn(2, 3, 8, 8), other, layers=["a"]).representations["a"].grid == (8, 8)


def test_arguments_with_other_names_are_another_kind_of_pass():
    def forward(model, x, **named):
        maps = model.stem(x)
        return model.last(maps.flip(2) if named.get("flip") else maps)

    model = Calls(forward, stem=nn.Conv2d(3, 8, 4, 4), last=nn.Identity()).eval()
    images = torch.randn(2, 3, 16, 16)
    expected = probed(model, images, layers=["last"], other=True, flip=False).representations["last"].tokens
    with torch.no_grad(), Probe(model, ["last"]) as probe:
        model(images, flip=True, other=False)
        model(images, other=True, flip=False)
    torch.testing.assert_close(probe.representations["last"].tokens, expected)


def test_patches_in_another_grid_are_another_kind_of_pass_however_many_there_are():
    def places(rows, columns):
        return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).expand(40, -1, -1)

    model = Calls(lambda model, x, where: model.last(x), last=nn.Linear(8, 8)).eval()
    with torch.no_grad(), Probe(model, ["last"]) as probe:
        model(torch.randn(40, 64, 8), places(4, 16))
        assert probe.representations["last"].grid == (4, 16)
        model(torch.randn(40, 64, 8), places(8, 8))
        assert probe.representations["last"].grid == (8, 8)


def test_tokens_that_are_other_ones_in_every_pass_are_refused_though_an_image_is_alone():
    def forward(model, x):
        tokens = model.stem(x).flatten(2).mT
        return model.last(tokens[:, torch.randperm(tokens.shape[1])[:4]])

    model = Calls(forward, stem=nn.Conv2d(3, 8, 4, 4), last=nn.Identity()).eval()
    torch.manual_seed(0)
    with torch.no_grad(), Probe(model, ["last"]) as probe:
        with pytest.warns(UserWarning, match="selected by index"):
            model(torch.randn(1, 3, 32, 32))
        assert "selected by index" in probe.notes["last"]
        with pytest.raises(RepresentationError, match=r"layer 'last'.*different locations in each forward pass"):
            model(torch.randn(1, 3, 32, 32))


def test_a_part_of_the_model_that_is_called_alone_is_no_forward_pass():
    model = timm.create_model("test_vit").eval()
    untold = pytest.warns(UserWarning, match=r"ran outside.*forward pass of VisionTransformer.*blocks\.0")
    with torch.no_grad(), untold, Probe(model) as probe:
        model.forward_features(torch.randn(2, 3, 160, 160))
    assert not probe.representations


# Inputs


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((2, 3, 32, 32), 1), ((2, 32, 32, 3), 3), ((2, 1, 28, 28), 1), ((2, 28, 28, 1), 3), ((2, 4, 64, 64), 1),
        ((2, 64, 64, 4), 3), ((2, 3, 32, 1000), 1), ((2, 100, 1000, 3), 3), ((2, 1, 128, 1000), 1),
        ((2, 256, 4, 4), 1), ((2, 256, 3, 3), 1), ((2, 512, 1, 1), 1), ((2, 4, 4, 256), 3), ((2, 3, 3, 256), 3),
        ((2, 256, 7, 4), None), ((2, 256, 8, 3), None), ((2, 4, 7, 256), None), ((2, 12, 64, 96), None),
        ((2, 64, 7, 7), 1), ((2, 7, 7, 64), 3), ((2, 3, 3, 3), 1), ((2, 3, 8, 64, 64), 1), ((2, 8, 3, 64, 64), 2),
    ],
)  # fmt: skip
def test_which_axis_of_an_input_holds_channels(shape, axis):
    assert channel_axis(shape) == axis


def test_a_part_of_a_network_is_given_feature_maps():
    part = torchvision.models.resnet18(weights=None).layer4
    found = probed(part, torch.randn(2, 256, 4, 4), layers=["1"]).representations["1"]
    assert (found.tokens.shape, found.grid) == ((2, 4, 512), (2, 2))
    found = probed(part, torch.randn(2, 256, 8, 6), layers=["1"]).representations["1"]
    assert (found.tokens.shape, found.grid) == ((2, 12, 512), (4, 3))


def test_inputs_of_many_channels_are_followed_from_the_first_convolution():
    model = timm.create_model("mambaout_femto", in_chans=12).eval()
    found = probed(model, torch.randn(2, 12, 64, 96), layers=["stages.0.blocks.0"])
    found = found.representations["stages.0.blocks.0"]
    assert (found.tokens.shape, found.grid) == ((2, 384, 48), (16, 24))
    model = timm.create_model("vit_tiny_patch16_224", in_chans=12, img_size=(64, 96)).eval()
    found = probed(model, torch.randn(2, 12, 64, 96), layers=["blocks.1"]).representations["blocks.1"]
    assert (found.tokens.shape, found.grid, found.prefix.shape[1]) == ((2, 24, 192), (4, 6), 1)


def test_clips_of_three_frames_are_followed_from_the_first_convolution():
    model = torchvision.models.video.r3d_18(weights=None)
    found = probed(model, torch.randn(2, 3, 3, 32, 32), layers=["layer1.0"]).representations["layer1.0"]
    assert (found.tokens.shape, found.grid) == ((2, 3 * 16 * 16, 64), (3, 16, 16))


def test_patches_of_several_images_in_one_sequence_are_read_by_a_given_layout():
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    config = Qwen2VLVisionConfig(depth=2, embed_dim=32, hidden_size=24, num_heads=2, patch_size=4, mlp_ratio=2)
    model, grids = Qwen2VisionTransformerPretrainedModel(config), torch.tensor([[1, 8, 8], [1, 8, 8]])
    with pytest.raises(RepresentationError, match=r"layer 'blocks\.1'.*packed into one sequence.*\(128, 96\)"):
        probed(model, torch.randn(128, 96), grid_thw=grids, layers=["blocks.1"])
    outputs = []
    model.blocks[1].register_forward_hook(lambda block, args, output: outputs.append(output))
    layouts = {"blocks.1": "NTC"}  # as the message says
    with torch.no_grad(), Probe(model, "blocks.1", layouts=layouts) as probe:
        model(torch.randn(128, 96), grid_thw=grids)
    read = probe.representations["blocks.1"]
    assert (read.grid, read.prefix.shape) == (None, (2, 0, 32))
    assert torch.equal(read.tokens, outputs[0].view(2, 64, 32))
    uneven = torch.tensor([[1, 8, 8], [1, 4, 16]])
    with torch.no_grad(), probe, pytest.raises(RepresentationError, match=r"2 images of different sizes are packed"):
        model(torch.randn(128, 96), grid_thw=uneven)


def test_images_of_different_sizes_are_named_as_a_reason():
    model = Calls(lambda model, images: model.last(model.pad(images)), last=nn.Identity())

    def pad(images):
        whole = torch.zeros(2, 3, 8, 8)
        for k, image in enumerate(images):
            whole[k, :, : image.shape[1], : image.shape[2]] = image
        return whole

    model.pad = pad
    images = [torch.randn(3, 4, 8), torch.randn(3, 8, 4)]
    with pytest.raises(RepresentationError, match="images of different sizes"):
        probed(model, images, layers=["last"])


def test_patches_with_their_places_are_followed_where_positions_are_added_by_index():
    model = timm.create_model("naflexvit_base_patch16_gap", depth=2)
    places = torch.cartesian_prod(torch.arange(4), torch.arange(9)).expand(2, -1, -1)
    patches = {"patches": torch.randn(2, 36, 768), "patch_coord": places, "patch_valid": torch.ones(2, 36).bool()}
    found = probed(model, patches, layers=["blocks.1"]).representations["blocks.1"]
    assert (found.tokens.shape, found.grid, found.prefix.shape[1]) == ((2, 36, 768), (4, 9), 4)


# Layers


def test_queries_are_refused_though_their_attention_weights_lie_on_a_grid():
    config = transformers.SiglipVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=64, patch_size=16
    )
    model = transformers.SiglipVisionModel(config)
    found = probed(model, pixel_values=torch.randn(2, 3, 64, 64), layers=["head.attention"])
    assert found.representations["head.attention"].tokens.shape == (2, 1, 32)
    queries = nn.Parameter(torch.randn(5, 32))

    def forward(model, x):
        tokens = model.stem(x).flatten(2).mT
        return model.attention(queries.expand(len(x), -1, -1), tokens, tokens)

    model = Calls(forward, stem=nn.Conv2d(3, 32, 8, 8), attention=nn.MultiheadAttention(32, 4, batch_first=True))
    with pytest.raises(RepresentationError, match=r"layer 'attention'.*combines all locations"):
        probed(model, torch.randn(2, 3, 32, 32), layers=["attention"])


def test_layers_that_mix_along_one_axis_keep_both():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))
    images = torch.randn(2, 3, 32, 32)
    probe = probed(model, images, layers=["1", "2"])
    for name, expected in (("1", model[1](model[0](images))), ("2", model[:3](images))):
        assert probe.representations[name].grid == (8, 8)
        torch.testing.assert_close(probe.representations[name].tokens, expected.detach().flatten(2).mT)
    with pytest.raises(RepresentationError, match=r"layer '3'.*lost"):
        probed(model, images, layers=["3"])


def test_patches_that_are_embedded_by_a_product_are_no_mixture():
    def forward(model, x):
        patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)
        return model.embed(patches)

    for colours, width in ((3, 48), (1, 16), (3, 20)):
        model = Calls(forward, embed=nn.Linear(colours * 16, width))
        found = probed(model, torch.randn(2, colours, 32, 32), layers=["embed"]).representations["embed"]
        assert (found.tokens.shape, found.grid) == ((2, 64, width), (8, 8))


def test_pooling_along_one_axis_and_spreading_keeps_both():
    def forward(model, x):
        return model.strips(model.stem(x))

    strips = Calls(lambda model, x: x.mean(3, keepdim=True).expand(x.shape) + 0)
    model = Calls(forward, stem=nn.Conv2d(3, 8, 4, 4), strips=strips)
    found = probed(model, torch.randn(2, 3, 24, 24), layers=["strips"]).representations["strips"]
    assert (found.tokens.shape, found.grid) == ((2, 36, 8), (6, 6))


def test_frames_that_are_convolved_one_by_one_stay_apart():
    def forward(model, x):
        frames = torch.stack([model.stem(x[:, t]) for t in range(x.shape[1])], 1)
        return model.pooled(model.last(frames).mean((3, 4)))

    model = Calls(forward, stem=nn.Conv2d(3, 8, 4, 4), last=nn.Identity(), pooled=nn.Linear(8, 6))
    clips = torch.randn(2, 4, 3, 32, 32)
    probe = probed(model, clips, layers=["last", "pooled"])
    found = probe.representations["last"]
    assert (found.tokens.shape, found.grid) == ((2, 4 * 64, 8), (4, 8, 8))
    expected = torch.stack([model.stem(clips[:, t]) for t in range(4)], 1).detach().flatten(3).mT.flatten(1, 2)
    torch.testing.assert_close(found.tokens, expected)
    assert probe.representations["pooled"].tokens.shape == (2, 4, 6)


def test_an_image_alone_has_the_prefix_that_it_has_among_others():
    config = transformers.TimesformerConfig(
        image_size=32, patch_size=16, num_frames=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    model, found = transformers.TimesformerModel(config), []
    for count in (1, 3):
        with pytest.warns(UserWarning, match="left out or selected"):
            probe = probed(model, torch.randn(count, 4, 3, 32, 32), layers="all")
        kept = probe.representations.items()
        found.append({name: (z.grid, z.tokens.shape[1:], z.prefix.shape[1]) for name, z in kept})
    assert found[0] == found[1]
    assert len(found[0]) > 10


def test_what_is_written_whole_through_another_view_keeps_its_origin():
    def forward(model, x):
        whole = torch.zeros_like(x)
        whole.view(len(x), -1).copy_(x.flatten(1))
        return model.last(whole)

    model = Calls(forward, last=nn.Conv2d(3, 8, 4, 4))
    assert probed(model, torch.randn(2, 3, 16, 16), layers=["last"]).representations["last"].grid == (4, 4)
    build = torchvision.models.get_model
    detector = build("retinanet_resnet50_fpn", weights=None, weights_backbone=None, min_size=96, max_size=128)
    found = probed(detector, [torch.rand(3, 96, 128)], layers=["backbone.body.layer2.0"])
    assert found.representations["backbone.body.layer2.0"].grid == (12, 16)


def test_a_padded_window_that_covers_a_map_is_no_whole_map():
    model = timm.create_model("hieradet_small").eval()
    found = probed(model, torch.randn(2, 3, 224, 224), layers=["blocks.14"]).representations["blocks.14"]
    assert found.grid == (7, 7)
