"""What forward passes show: order, left-out and missing locations, and what is refused because nothing settles it."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from zoo import hf_model, pictures

from rsm_probe import Probe
from rsm_probe.errors import LayerError, RepresentationError

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def captured(model, layer, *inputs, **options):
    with torch.no_grad(), Probe(model, layer, **options) as probe:
        model(*inputs)
    return probe


def positions(size: int = 16) -> torch.Tensor:
    """Two images whose pixels say where they are: image, row, column."""
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.stack([torch.stack([torch.full_like(row, n), row, column]).float() for n in range(2)])


def where(probe, layer):
    """Image, row and column of each token, in units of the grid."""
    kept = probe.representations[layer]
    return kept.tokens[..., :3].round().int(), kept


class Patches(nn.Module):
    """Patches whose vectors say where they are from, and something done to them."""

    def __init__(self, change):
        super().__init__()
        self.patch = nn.Conv2d(3, 3, 4, stride=4, bias=False)
        self.patch.weight.data.zero_()
        for k in range(3):
            self.patch.weight.data[k, k, 0, 0] = 1
        self.change, self.after = change, nn.Identity()

    def forward(self, x):
        return self.after(self.change(self.patch(x)))


def sequence(x):
    return x.flatten(2).transpose(1, 2)


def windows(x):
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)


ROTATION = torch.tensor([3, 1, 0, 2, *range(4, 16)])


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x.permute(0, 2, 3, 1).contiguous(),
        sequence,
        lambda x: sequence(x).transpose(0, 1),
        lambda x: x.flatten(2),
        windows,
        lambda x: windows(x).transpose(0, 1),
        lambda x: sequence(x)[:, ROTATION],
        lambda x: torch.stack([sequence(x)[0].flip(0), sequence(x)[1]]),
        lambda x: sequence(torch.roll(x, (1, 2), (2, 3))),
        lambda x: torch.cat([torch.zeros(2, 5, 3), sequence(x)], 1),
        lambda x: (sequence(x) @ torch.eye(3)).relu() + 0.0,
        lambda x: torch.einsum("nchw->hnwc", x),
        lambda x: torch.nn.functional.pad(x, (0, 3, 1, 0)).permute(0, 2, 3, 1)[:, 1:, :4],
    ],
    ids=[
        *("map", "channels last", "contiguous", "sequence", "sequence first", "channels first", "windows"),
        *("windows inside", "indexed", "another order in each image", "rolled", "prefix", "arithmetic", "rows first"),
        "padded and cut",
    ],
)
def test_tokens_stand_in_the_order_of_the_image_whatever_was_done(change):
    found, kept = where(captured(Patches(change), "after", positions()), "after")
    assert kept.grid == (4, 4)
    for n in range(2):
        expected = [[n, 4 * row, 4 * column] for row in range(4) for column in range(4)]
        assert found[n].tolist() == expected


def test_tokens_that_stand_behind_the_locations_are_left_out_and_noted():
    model = hf_model("YolosModel", {**SMALL, "image_size": [64, 64], "num_detection_tokens": 10}).eval()
    with pytest.warns(UserWarning, match=r"stand for no location and are left out.*encoder.layer.1"):
        probe = captured(model, "encoder.layer.1", pictures(64))
    kept = probe.representations["encoder.layer.1"]
    assert (kept.tokens.shape[1], kept.prefix.shape[1], kept.grid) == (16, 1, (4, 4))
    assert "10 vectors an image" in probe.notes["encoder.layer.1"]
    with torch.no_grad():
        expected = model(pictures(64), output_hidden_states=True).hidden_states[2][:, :17]
    torch.testing.assert_close(torch.cat([kept.prefix, kept.tokens], 1), expected, rtol=0, atol=1e-6)


def test_tokens_that_are_dropped_at_random_are_refused_and_can_be_taken_as_they_are():
    model = hf_model("ViTMAEModel", {**SMALL, "image_size": 64}).eval()
    with pytest.raises(RepresentationError, match=r"4 tokens stand for other locations in every image.*layouts="):
        captured(model, "layers.1", pictures(64))
    kept = captured(model, "layers.1", pictures(64), layouts={"layers.1": "NTC"}).representations["layers.1"]
    assert kept.grid is None
    assert kept.tokens.shape == (2, 5, 32)


def test_tokens_that_are_shuffled_anew_in_every_pass_are_put_back_in_every_pass():
    model = hf_model("ViTMAEModel", {**SMALL, "image_size": 64, "mask_ratio": 0.0}).eval()
    with torch.no_grad(), Probe(model, "layers.1") as probe:
        for seed in range(2):
            torch.manual_seed(seed)
            kept = (out := model(pictures(64)), probe.representations["layers.1"])[1]
            torch.manual_seed(seed)
            with torch.no_grad():
                states = model(pictures(64), output_hidden_states=True).hidden_states[2]
            order = out.ids_restore[..., None].expand(-1, -1, 32)
            torch.testing.assert_close(kept.tokens, states[:, 1:].gather(1, order), rtol=0, atol=1e-6)


def test_queries_stand_for_no_location():
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 8, 4, stride=4)
            self.queries = nn.Parameter(torch.randn(1, 16, 8))
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
            self.after = nn.LayerNorm(8)

        def forward(self, x):
            tokens = sequence(self.patch(x))
            return self.after(self.attend(self.queries.expand(2, -1, -1), tokens, tokens)[0])

    # Sixteen of them are no grid of 4 x 4.
    with pytest.raises(RepresentationError, match=r"\(2, 16, 8\).*layouts="):
        captured(Queries(), "after", positions())
    kept = captured(Queries(), "after", positions(), layouts={"after": "NTC"}).representations["after"]
    assert (kept.tokens.shape, kept.grid) == ((2, 16, 8), None)


def test_what_does_not_depend_on_the_images_is_refused_without_a_warning_for_patterns(recwarn):
    model = hf_model(
        "CLIPModel",
        {
            "vision_config": {**SMALL, "image_size": 64, "patch_size": 16},
            "text_config": {**SMALL, "vocab_size": 100, "max_position_embeddings": 16},
        },
    ).eval()
    words = torch.arange(16).view(2, 8)
    with torch.no_grad():
        with Probe(model) as probe:
            model(input_ids=words, pixel_values=pictures(64))
        assert list(probe.representations) == ["vision_model.encoder.layers.0", "vision_model.encoder.layers.1"]
        assert not [warning for warning in recwarn if "could not be captured" in str(warning.message)]
        with (
            pytest.raises(RepresentationError, match="does not depend on the images"),
            Probe(model, "text_model.encoder.layers.0"),
        ):
            model(input_ids=words, pixel_values=pictures(64))


def test_prefix_that_is_declared_wrongly_is_warned_of():
    model = timm.create_model("cait_xxs24_224", img_size=64, depth=2).eval()
    with pytest.warns(UserWarning, match=r"another number of prefix tokens than the 1 that the model declares"):
        probe = captured(model, ["blocks.0", "blocks.1"], pictures(64))
    assert probe.representations["blocks.0"].prefix.shape[1] == 0


def test_prefix_that_is_declared_rightly_is_not_warned_of(recwarn):
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval()
    captured(model, "blocks", pictures(64))
    assert not recwarn.list


def test_sequences_of_several_scales_are_refused():
    model = Patches(lambda x: torch.cat([sequence(x), sequence(nn.functional.avg_pool2d(x, 2))], 1))
    with pytest.raises(RepresentationError, match="several vectors stand for the same location"):
        captured(model, "after", positions())


def test_images_that_keep_different_numbers_of_locations_are_refused():
    model = Patches(lambda x: torch.cat([sequence(x)[0, :5], sequence(x)[1, :7]])[None])
    with pytest.raises(RepresentationError, match="another number of locations of each image"):
        captured(model, "after", positions())


@pytest.mark.parametrize("batch", [1, 2, 3, 16])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_reading_depends_neither_on_the_batch_nor_on_gradients(batch, mode):
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(2,), num_heads=(2,)
    ).eval()
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with mode(), Probe(model, ["layers.0.blocks.1", "layers.0.blocks.1.attn"]) as probe:
        model(x)
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
    torch.testing.assert_close(
        probe.representations["layers.0.blocks.1"].tokens, expected.flatten(2).mT, rtol=0, atol=1e-6
    )
    assert probe.representations["layers.0.blocks.1.attn"].grid == (8, 8)


def test_first_and_later_passes_read_alike_and_compute_alike():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval()
    x = pictures(64)
    with torch.no_grad(), Probe(model) as probe:
        expected, kept = model(x), probe.representations
        again, later = model(x), probe.representations
    assert torch.equal(again, expected)
    for layer, representation in kept.items():
        assert torch.equal(representation.tokens, later[layer].tokens)
        assert torch.equal(representation.prefix, later[layer].prefix)


def test_pass_over_images_of_another_size_is_read_anew(small_resnet):
    with torch.no_grad(), Probe(small_resnet, "layer2.0") as probe:
        for size, grid in ((32, (8, 8)), (64, (16, 16)), (32, (8, 8))):
            small_resnet(pictures(size))
            assert probe.representations["layer2.0"].grid == grid


def test_nothing_is_followed_after_a_pass_that_failed_or_was_left(small_resnet):
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    def fail(*_):
        raise KeyboardInterrupt

    handle = small_resnet.layer3.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), Probe(small_resnet, "layer1.0"):
        small_resnet(pictures(32))
    handle.remove()
    assert _get_current_dispatch_mode() is None
    with torch.no_grad(), Probe(small_resnet, "layer1.0") as probe:
        small_resnet(pictures(32))
    assert _get_current_dispatch_mode() is None
    assert probe.representations["layer1.0"].grid == (16, 16)


# Operations that are no modules


def test_operations_are_reached_through_the_graph():
    resnet, x = torchvision.models.resnet18().eval(), pictures(32)
    with torch.no_grad():
        with Probe(resnet, ["fx:layer1.0.add", "fx:layer1.0.bn1", "layer1.0"]) as probe:
            resnet(x)
        block = resnet.layer1[0]
        inner = resnet.maxpool(torch.relu(resnet.bn1(resnet.conv1(x))))
        first = block.bn1(block.conv1(inner))
        total = block.bn2(block.conv2(torch.relu(first))) + inner
    kept = probe.representations
    assert set(kept) == {"fx:layer1.0.add", "fx:layer1.0.bn1", "layer1.0"}
    # Both are overwritten by a ReLU later.
    torch.testing.assert_close(kept["fx:layer1.0.add"].tokens, sequence(total), rtol=0, atol=1e-6)
    torch.testing.assert_close(kept["fx:layer1.0.bn1"].tokens, sequence(first), rtol=0, atol=1e-6)
    torch.testing.assert_close(kept["layer1.0"].tokens, sequence(total.relu()), rtol=0, atol=1e-6)


def test_unknown_operations_name_the_nearest(small_resnet):
    with pytest.raises(LayerError, match=r"no operation 'layer1.0.adding'; nearest: .*'layer1.0.add'"):
        Probe(small_resnet, "fx:layer1.0.adding")


def test_models_without_a_graph_say_to_name_modules():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(LayerError, match=r"torch.fx cannot trace Branching: .*; name modules instead"):
        Probe(Branching(), "fx:neg")


# Costs


def test_stopping_early_runs_nothing_after_the_last_layer(small_resnet):
    ran = []
    handles = [
        part.register_forward_hook(lambda m, a, o, n=n: ran.append(n)) for n, part in small_resnet.named_children()
    ]
    x = pictures(32)
    with torch.no_grad():
        expected = captured(small_resnet, "layer2.0", x).representations["layer2.0"].tokens
        with Probe(small_resnet, ["layer1.0", "layer2.0"], stop_early=True) as probe:
            assert small_resnet(x) is not None
            for _ in range(2):
                ran.clear()
                assert small_resnet(x + 1) is None
                assert "layer2" not in ran
                assert "fc" not in ran
            small_resnet(x)
            assert torch.equal(probe.representations["layer2.0"].tokens, expected)
        assert small_resnet(x) is not None
    for handle in handles:
        handle.remove()
    assert "forward" not in vars(small_resnet)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_of_what_is_captured_can_be_chosen(small_resnet, dtype):
    x = pictures(32)
    expected = captured(small_resnet, "layer1.0", x).representations["layer1.0"].tokens
    kept = captured(small_resnet, "layer1.0", x, dtype=dtype).representations["layer1.0"].tokens
    assert kept.dtype == dtype
    assert torch.equal(kept, expected.to(dtype))


def test_layouts_that_answer_to_no_layer_are_refused(small_resnet):
    with pytest.raises(LayerError, match="layouts: no probed layer answers to 'layer9'"):
        Probe(small_resnet, "layer1.0", layouts={"layer9": "NCHW"})


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(1, 3, 32, 32))])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_parts_are_refused(small_resnet, make):
    with pytest.raises(LayerError, match=r"scripted or traced and runs no hooks; probe the model it was made from"):
        Probe(make(small_resnet), "layer1")
