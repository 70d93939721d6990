"""Decoders and detectors: maps that are joined, enlarged, cut and padded are followed, and keep their grid."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
import transformers
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from rsm_probe import Probe
from rsm_probe.errors import RepresentationError


class Model(nn.Module):
    """A model of one function, whose layers are given by name; `last` returns what it is given."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function, self.last = function, nn.Identity()
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs):
        return self.last(self.function(self, *inputs))


def probed(model, *inputs, layer="last"):
    """The representation of a layer, and what the layer returned."""
    found = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: found.append(output.clone()))
    with torch.no_grad(), Probe(model.eval(), layer) as probe:
        model(*inputs)
    handle.remove()
    return probe.representations[layer], found[0]


def require_map(kept, output):
    """Every location stands where the output holds it, row by row."""
    assert kept.grid == tuple(output.shape[2:])
    assert kept.prefix.shape[1] == 0
    assert torch.equal(kept.tokens, output.flatten(2).mT)


def resize(**options):
    return Model(lambda model, x: F.interpolate(x, **options))


ENLARGING = {
    "transposed": lambda c: nn.ConvTranspose2d(c, 5, 2, 2),
    "transposed, overlapping": lambda c: nn.ConvTranspose2d(c, 5, 3, 2, 1, 1),
    "pixel shuffle": lambda c: nn.PixelShuffle(2),
    "nearest": lambda c: nn.Upsample(scale_factor=2),
    "bilinear": lambda c: resize(scale_factor=2, mode="bilinear"),
    "bicubic": lambda c: resize(scale_factor=2, mode="bicubic"),
    "area": lambda c: resize(scale_factor=2, mode="area"),
    "nearest-exact": lambda c: resize(scale_factor=2, mode="nearest-exact"),
    "corners": lambda c: resize(size=(15, 17), mode="bilinear", align_corners=True),
    "no whole factor": lambda c: resize(scale_factor=1.7, mode="bilinear"),
    "by hand": lambda c: Model(lambda model, x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)),
    "adaptive": lambda c: nn.AdaptiveAvgPool2d(11),
}


@pytest.mark.parametrize("channels", [(4,), (4, 4), (2, 4, 8, 2)], ids=str)
@pytest.mark.parametrize("enlarging", ENLARGING)
def test_maps_that_are_joined_and_enlarged_keep_their_grid(enlarging, channels):
    def forward(model, x):
        return model.up(torch.cat([conv(x) for conv in model.convs], 1))

    convs = nn.ModuleList(nn.Conv2d(3, c, 3, 4, 1) for c in channels)
    model = Model(forward, convs=convs, up=ENLARGING[enlarging](sum(channels)))
    require_map(*probed(model, torch.randn(2, 3, 32, 24)))


def fitted(how):
    """A U-Net of one stage whose decoder's map is not of the size of the encoder's."""

    def forward(model, x):
        skip = model.encode(x)
        up = model.up(model.inner(F.max_pool2d(skip, 2)))
        if how.startswith("padded"):
            up = F.pad(up, (0, skip.shape[3] - up.shape[3], 1, skip.shape[2] - up.shape[2] - 1))
        elif how.startswith("cut"):
            top, left = (skip.shape[2] - up.shape[2]) // 2, (skip.shape[3] - up.shape[3]) // 2
            skip = skip[:, :, top : top + up.shape[2], left : left + up.shape[3]]
        joined = skip + up if how.endswith("added") else torch.cat([up, skip], 1)
        return model.again(model.joined(joined))

    channels = 4 if how.endswith("added") else 8
    return Model(
        forward,
        encode=nn.Conv2d(3, 4, 3),
        inner=nn.Conv2d(4, 4, 3, padding=0 if how.startswith("cut") else 1),
        up=nn.ConvTranspose2d(4, 4, 2, 2),
        joined=nn.Identity(),
        again=nn.ConvTranspose2d(channels, 5, 2, 2),
    )


@pytest.mark.parametrize("layer", ["joined", "last"])
@pytest.mark.parametrize("how", ["padded", "cut", "padded, added", "cut, added"])
def test_maps_that_are_cut_or_padded_to_fit_lie_on_top_of_each_other(how, layer):
    require_map(*probed(fitted(how), torch.randn(2, 3, 33, 29), layer=layer))


def test_volumes_are_joined_and_enlarged():
    def forward(model, x):
        skip = model.encode(x)
        return model.again(torch.cat([model.up(F.max_pool3d(skip, 2)), skip], 1))

    model = Model(
        forward, encode=nn.Conv3d(3, 4, 3, padding=1), up=nn.ConvTranspose3d(4, 4, 2, 2), again=nn.Upsample(None, 2)
    )
    kept, output = probed(model, torch.randn(2, 3, 4, 8, 6))
    assert kept.grid == (8, 16, 12)
    assert torch.equal(kept.tokens, output.flatten(2).mT)


def test_pooled_context_is_spread_and_joined():
    def forward(model, x):
        x = model.encode(x)
        pooled = F.interpolate(x.mean((2, 3), keepdim=True), x.shape[2:], mode="bilinear")
        return model.up(torch.cat([x, pooled], 1))

    model = Model(forward, encode=nn.Conv2d(3, 4, 4, 4), up=nn.ConvTranspose2d(8, 5, 2, 2))
    require_map(*probed(model, torch.randn(2, 3, 32, 24)))


def test_what_was_pooled_goes_back_to_where_it_was():
    def forward(model, x):
        pooled, where = F.max_pool2d(model.encode(x), 2, return_indices=True)
        return model.decode(F.max_unpool2d(pooled, where, 2))

    model = Model(forward, encode=nn.Conv2d(3, 4, 3, padding=1), decode=nn.Conv2d(4, 5, 3, padding=1))
    require_map(*probed(model, torch.randn(2, 3, 16, 12)))


def test_patches_that_expand_become_locations():
    def forward(model, x):
        n, _, h, w = (x := model.encode(x)).shape
        x = model.expand(x.permute(0, 2, 3, 1)).view(n, h, w, 2, 2, 4).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(n, 2 * h, 2 * w, 4).permute(0, 3, 1, 2)

    model = Model(forward, encode=nn.Conv2d(3, 4, 4, 4), expand=nn.Linear(4, 16))
    require_map(*probed(model, torch.randn(2, 3, 32, 24)))


def test_frames_that_are_folded_into_the_batch_are_enlarged_one_by_one():
    def forward(model, x):
        maps = model.encode(x.flatten(0, 1))
        return model.up(torch.cat([maps, maps], 1))

    model = Model(forward, encode=nn.Conv2d(3, 4, 4, 4), up=nn.ConvTranspose2d(8, 5, 2, 2))
    kept, output = probed(model, torch.randn(2, 4, 3, 16, 8))
    assert kept.grid == (4, 8, 4)
    assert torch.equal(kept.tokens, output.view(2, 4, 5, 8, 4).transpose(2, 4).transpose(2, 3).reshape(2, -1, 5))


@pytest.mark.parametrize("size", [(1, 1), (1, 4)])
def test_windows_are_not_taken_for_whole_maps(size):
    """Each window of 4 x 4 locations, convolved alone, keeps its own locations."""

    def forward(model, x):
        maps = model.encode(x)
        n, c, h, w = maps.shape
        parts = maps.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 4, 4)
        parts = model.inside(parts)
        return parts.view(n, h // 4, w // 4, c, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)

    model = Model(forward, encode=nn.Conv2d(3, 4, 4, 4), inside=nn.Conv2d(4, 4, 3, padding=1))
    require_map(*probed(model, torch.randn(2, 3, 16 * size[0], 16 * size[1])))


@pytest.mark.parametrize(
    "join",
    [
        lambda x: x + x.roll(1, 3),
        lambda x: x + x.flip(2),
        lambda x: torch.cat([x, x.flip(2)], 1),
        lambda x: torch.cat([x, x.transpose(2, 3)], 1),
    ],
    ids=["rolled, added", "flipped, added", "flipped, joined", "transposed, joined"],
)
def test_maps_in_another_order_do_not_lie_on_top_of_each_other(join):
    def forward(model, x):
        return model.up(join(model.encode(x)))

    model = Model(forward, encode=nn.Conv2d(3, 4, 4, 4), up=nn.Upsample(scale_factor=2))
    with pytest.raises(RepresentationError, match=r"layouts="):
        probed(model, torch.randn(2, 3, 16, 16))


# Detectors: each image is resized, then put into one batch


def detecting(*sizes, smallest=32, largest=64):
    transform = GeneralizedRCNNTransform(smallest, largest, [0.5] * 3, [0.2] * 3)
    model = Model(lambda model, images: model.body(model.transform(images)[0].tensors), transform=transform)
    model.body = nn.Conv2d(3, 4, 4, 4)
    return model, [torch.rand(3, *size) for size in sizes]


@pytest.mark.parametrize(
    "sizes", [[(32, 48)], [(32, 48)] * 2, [(20, 30)] * 2, [(90, 60)] * 3, [(24, 36), (64, 96)]], ids=str
)
def test_images_that_a_detector_resizes_are_followed(sizes):
    kept, output = probed(*detecting(*sizes))
    require_map(kept, output)


def test_images_of_which_each_has_another_size_are_refused_by_a_detector():
    with pytest.raises(RepresentationError, match="images of different sizes"):
        probed(*detecting((32, 48), (48, 32)))


@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"])
def test_detectors_take_lists_of_images(name):
    small = {"topk_candidates": 4}
    if name.startswith("faster"):
        small = {"min_size": 64, "max_size": 96, "rpn_pre_nms_top_n_test": 4, "rpn_post_nms_top_n_test": 4}
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=3, **small)
    with torch.no_grad(), Probe(model.eval()) as probe:
        model([torch.rand(3, 40, 60) for _ in range(2)])
    maps = probe.representations
    assert len(maps) >= 10
    assert not probe.skipped
    assert all(kept.grid is not None and len(kept.tokens) == 2 for kept in maps.values())


def test_every_block_of_a_segmentation_network_is_read():
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad(), Probe(model, ["classifier.cbr", "classifier.low_classifier"]) as probe:
        model(x)
    assert {kept.grid for kept in probe.representations.values()} == {(4, 6), (8, 12)}


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.filterwarnings("ignore:. layers have vectors")
def test_queries_in_front_of_a_class_token_are_no_prefix(blocks):
    """EoMT: five queries join in front of class and register tokens, before the last blocks or before all."""
    config = transformers.EomtConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=1, image_size=64, patch_size=16,
        num_queries=5, num_blocks=blocks, num_register_tokens=4, num_upscale_blocks=1,
    )  # fmt: skip
    model = transformers.EomtForUniversalSegmentation(config).eval()
    outputs = []
    handle = model.layers[1].register_forward_hook(lambda *args: outputs.append(args[2].clone()))
    with torch.no_grad(), handle, Probe(model, ["layers.0", "layers.1"]) as probe:
        model(pixel_values=torch.randn(2, 3, 64, 64))
    for read in probe.representations.values():
        assert (read.prefix.shape[1], read.grid) == (5, (4, 4))
    assert torch.equal(probe.representations["layers.1"].tokens, outputs[0][:, -16:])
    assert torch.equal(probe.representations["layers.1"].prefix, outputs[0][:, 5:10])
    assert "5 vectors per image have no location" in probe.notes["layers.1"]
