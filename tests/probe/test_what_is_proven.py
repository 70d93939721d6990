"""What the pass proves of tokens, and what it does not: queries, layouts that were said, maps of one location."""

import pytest
import timm
import torch
from torch import nn
from zoo import hf_model, pictures

from rsm_probe import Probe
from rsm_probe.errors import RepresentationError


class Model(nn.Module):
    """A model of one function, whose layers are given by name; `last` returns what it is given."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function, self.last, self.patch = function, nn.Identity(), nn.Conv2d(3, 8, 4, 4)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.last(self.function(self, x))


def probed(model, layers, images, **options):
    with torch.no_grad(), Probe(model.eval(), layers, **options) as probe:
        model(images)
    return probe


def sequence(maps):
    return maps.flatten(2).mT


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

# Queries


class Joining(nn.Module):
    """Patches, attended; then learned tokens join them, and they are attended again."""

    def __init__(self, early, late, place):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.early, self.late = (nn.Parameter(torch.randn(count, 8)) for count in (early, late))
        self.first, self.second = (nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(2))
        self.place = place

    def forward(self, x):
        tokens, count = sequence(self.patch(x)), len(self.early)
        early, late = (part.expand(len(x), -1, -1) for part in (self.early, self.late))
        x = self.first(torch.cat([early, tokens], 1))
        if self.place == "before":
            x = torch.cat([late, x], 1)
        elif self.place == "between":
            x = torch.cat([x[:, :count], late, x[:, count:]], 1)
        else:
            x = torch.cat([x, late], 1)
        return self.second(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["before", "between", "behind"])
@pytest.mark.parametrize(
    ("early", "late", "queries"),
    [
        (0, 0, 0), (1, 0, 0), (5, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 3), (1, 1, 1), (5, 1, 1), (1, 2, 2), (1, 5, 5),
        (5, 7, 7), (0, 100, 100),
    ],
)  # fmt: skip
def test_what_joins_before_attention_is_prefix_and_what_joins_later_are_queries(early, late, queries, place):
    model = Joining(early, late, place)
    output = []
    model.second.register_forward_hook(lambda module, args, tokens: output.append(tokens.clone()))
    probe = probed(model, ["first", "second"], IMAGES)
    assert probe.representations["first"].prefix.shape[1] == early
    kept, (tokens,) = probe.representations["second"], output
    behind = late if place == "behind" else queries
    prefix = early + late - behind
    start = early + (late if place != "behind" else 0)
    assert (kept.grid, kept.prefix.shape[1]) == ((4, 4), prefix)
    assert torch.equal(kept.tokens, tokens[:, start : start + 16])
    first = queries if place == "before" else 0
    assert torch.equal(kept.prefix, tokens[:, first : first + prefix])
    noted = f"{behind} vectors per image have no location and are left out" if behind else ""
    assert probe.notes.get("second", "") == noted


@pytest.mark.parametrize("model", ["EomtForUniversalSegmentation", "EomtDinov3ForUniversalSegmentation"])
def test_queries_of_eomt_are_no_prefix(model):
    model = hf_model(
        model,
        {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
            "image_size": 64, "patch_size": 16, "num_queries": 5, "num_blocks": 1, "num_upscale_blocks": 1,
            "num_register_tokens": 4,
        },
    )  # fmt: skip
    output = []
    model.layers[1].register_forward_hook(lambda module, args, out: output.append(out))
    with pytest.warns(UserWarning, match=r"left out or selected.*layers.1"):
        probe = probed(model, ["layers.0", "layers.1"], pictures(64))
    for name in ("layers.0", "layers.1"):
        kept = probe.representations[name]
        assert (kept.tokens.shape[1], kept.prefix.shape[1], kept.grid) == (16, 5, (4, 4))
    tokens = output[0][0] if isinstance(output[0], tuple) else output[0]
    assert torch.equal(torch.cat([kept.prefix, kept.tokens], 1), tokens[:, 5:])
    assert probe.notes == {"layers.1": "5 vectors per image have no location and are left out"}


# Layouts that were said


def with_tokens(count):
    return lambda model, x: torch.cat([x.new_zeros(2, count, 8), sequence(model.patch(x))[:, :9]], 1)


@pytest.mark.parametrize("layout", ["NTC", "TNC", "NCT"])
@pytest.mark.parametrize("length", [8, 11, 16, 17, 21, 24])
def test_a_layout_of_tokens_whose_locations_were_lost_invents_no_grid(length, layout):
    """Sixteen and seventeen are what a grid of 4 x 4 would leave, with or without a class token."""

    def forward(model, x):
        tokens = torch.cat([sequence(model.patch(x)), x.new_zeros(2, 8, 8)], 1)[:, :length].sort(1)[0]
        return tokens.permute(["NTC".index(axis) for axis in layout])

    model = Model(forward)
    with pytest.raises(RepresentationError, match=r"lost in the operation 'sort'.*layouts={'last': 'NTC'}"):
        probed(model, "last", IMAGES)
    kept = probed(model, "last", IMAGES, layouts={"last": layout}).representations["last"]
    assert (kept.grid, kept.prefix.shape[1]) == (None, 0)
    assert torch.equal(kept.tokens, model(IMAGES).detach().permute([layout.index(axis) for axis in "NTC"]))


@pytest.mark.parametrize("layout", ["NTC", "TNC", "NCT"])
@pytest.mark.parametrize("prefix", [0, 1, 5, 12])
def test_a_layout_of_tokens_that_were_followed_keeps_grid_prefix_and_order(prefix, layout):
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))

    def forward(model, x):
        tokens = torch.cat([x.new_ones(2, prefix, 8), sequence(model.patch(x))[:, order]], 1)
        return tokens.permute(["NTC".index(axis) for axis in layout])

    model = Model(forward)
    kept = probed(model, "last", IMAGES, layouts={"last": layout}).representations["last"]
    assert (kept.grid, kept.prefix.shape[1]) == ((4, 4), prefix)
    assert torch.equal(kept.tokens, sequence(model.patch(IMAGES)).detach())


def test_a_layout_that_contradicts_what_was_followed_is_taken_at_its_word():
    model = Model(lambda model, x: sequence(model.patch(x)))
    kept = probed(model, "last", IMAGES, layouts={"last": "NCT"}).representations["last"]
    assert (kept.tokens.shape, kept.prefix.shape[1], kept.grid) == ((2, 8, 16), 0, None)


# Maps of one location


@pytest.mark.parametrize("layouts", [None, "said"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("pool", "layout", "grid"),
    [
        (lambda x: nn.functional.adaptive_avg_pool2d(x, 1), "NCHW", (1, 1)),
        (lambda x: nn.functional.adaptive_max_pool2d(x, 1), "NCHW", (1, 1)),
        (lambda x: nn.functional.avg_pool2d(x, 4), "NCHW", (1, 1)),
        (lambda x: x.mean((2, 3), keepdim=True), "NCHW", (1, 1)),
        (lambda x: x.amax(3, keepdim=True).amax(2, keepdim=True), "NCHW", (1, 1)),
        (lambda x: x.permute(0, 2, 3, 1).mean((1, 2), keepdim=True), "NHWC", (1, 1)),
        (lambda x: x.mean((2, 3), keepdim=True).unsqueeze(2), "NCTHW", (1, 1, 1)),
        (lambda x: x.mean((2, 3)), "NC", None),
        (lambda x: x.mean((2, 3))[..., None], "NCT", None),
        (lambda x: x.mean((2, 3))[:, None], "NTC", None),
    ],
)
def test_a_map_that_was_pooled_whole_is_a_grid_of_one_location(pool, layout, grid, batch, layouts):
    model, images = Model(lambda model, x: pool(model.patch(x))), torch.randn(batch, 3, 16, 16)
    kept = probed(model, "last", images, layouts=layouts and {"last": layout}).representations["last"]
    assert (kept.grid, kept.prefix.shape[1]) == (grid, 0)
    torch.testing.assert_close(kept.tokens, model(images).detach().reshape(batch, 1, 8))


def test_a_video_that_was_pooled_whole_is_a_grid_of_one_location():
    model = nn.Sequential(nn.Conv3d(3, 4, 2, 2), nn.AdaptiveAvgPool3d(1))
    assert probed(model, "1", torch.randn(2, 3, 4, 8, 8)).representations["1"].grid == (1, 1, 1)


def test_class_tokens_have_no_grid():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    kept = probed(model, ["fc_norm", "head"], torch.randn(2, 3, 32, 32)).representations
    assert [z.grid for z in kept.values()] == [None, None]
