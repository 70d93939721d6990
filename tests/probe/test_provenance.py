"""What forward passes show: order, left-out and missing locations, and what is refused because nothing settles it."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn
from zoo import hf_model, pictures

from rsm_probe import Probe
from rsm_probe.errors import LayerError, RepresentationError
from rsm_probe.probe.tracing.origins import _reshaped

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
    with pytest.warns(UserWarning, match=r"left out or selected.*encoder.layer.1"):
        probe = captured(model, "encoder.layer.1", pictures(64))
    kept = probe.representations["encoder.layer.1"]
    assert (kept.tokens.shape[1], kept.prefix.shape[1], kept.grid) == (16, 1, (4, 4))
    assert "10 vectors per image" in probe.notes["encoder.layer.1"]
    with torch.no_grad():
        expected = model(pictures(64), output_hidden_states=True).hidden_states[2][:, :17]
    torch.testing.assert_close(torch.cat([kept.prefix, kept.tokens], 1), expected, rtol=0, atol=1e-6)


def test_tokens_that_are_dropped_at_random_are_refused_and_can_be_taken_as_they_are():
    model = hf_model("ViTMAEModel", {**SMALL, "image_size": 64}).eval()
    with pytest.raises(RepresentationError, match=r"4 tokens stand for different locations in each image.*layouts="):
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
    model.num_prefix_tokens = 1  # as newer releases of timm declare it
    with pytest.warns(UserWarning, match=r"a number of prefix tokens that differs from the 1 the model declares"):
        probe = captured(model, ["blocks.0", "blocks.1"], pictures(64))
    assert probe.representations["blocks.0"].prefix.shape[1] == 0


def test_prefix_that_is_declared_rightly_is_not_warned_of(recwarn):
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval()
    captured(model, "blocks", pictures(64))
    assert not recwarn.list


def test_sequences_of_several_scales_are_refused():
    model = Patches(lambda x: torch.cat([sequence(x), sequence(nn.functional.avg_pool2d(x, 2))], 1))
    with pytest.raises(RepresentationError, match="several vectors share a location"):
        captured(model, "after", positions())


def test_images_that_keep_different_numbers_of_locations_are_refused():
    model = Patches(lambda x: torch.cat([sequence(x)[0, :5], sequence(x)[1, :7]])[None])
    with pytest.raises(RepresentationError, match="a different number of locations in each image"):
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
    with pytest.raises(LayerError, match="layouts: no probed layer matches 'layer9'"):
        Probe(small_resnet, "layer1.0", layouts={"layer9": "NCHW"})


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(1, 3, 32, 32))])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_parts_are_refused(small_resnet, make):
    with pytest.raises(LayerError, match=r"scripted or traced and runs no hooks; probe the model it was made from"):
        Probe(make(small_resnet), "layer1")


# What is lost is not guessed

ORDER = torch.randperm(16, generator=torch.Generator().manual_seed(3))


def shuffled(x):
    return sequence(x)[:, ORDER]


def in_image_order(change, model=None):
    found, kept = where(captured(Patches(change), "after", positions()), "after")
    return kept, all(
        found[n].tolist() == [[n, 4 * row, 4 * column] for row in range(4) for column in range(4)] for n in range(2)
    )


def written_in_parts(x):
    tokens = shuffled(x)
    out = torch.zeros_like(tokens)
    out[:, :8], out[:, 8:] = tokens[:, 8:], tokens[:, :8]
    return out


def changed_in_part(x):
    tokens = shuffled(x).clone()
    tokens[:, :4] += 0.0
    tokens[..., :1] *= 1
    return tokens


def token_behind(x):
    tokens = sequence(x)
    out = torch.zeros(2, 17, 3)
    out[:, :16] = tokens
    return out


def token_before(x):
    return torch.cat([x.new_zeros(2, 1, 3), shuffled(x)], 1)


@pytest.mark.parametrize("change", [written_in_parts, changed_in_part, token_before, token_behind])
def test_tensors_that_are_written_in_parts_keep_their_order(change):
    kept, right = in_image_order(change)
    assert right
    assert kept.grid == (4, 4)
    assert kept.prefix.shape[1] == int(change is token_before)


def merged(x):
    tokens = sequence(x)
    index = torch.zeros(2, 6, 3, dtype=torch.long)
    return tokens[:, :10].scatter_reduce(1, index, tokens[:, 10:], "mean")


@pytest.mark.parametrize(
    "change",
    [
        merged,
        lambda x: torch.zeros(2, 16, 3).index_add_(1, ORDER, sequence(x)),
        lambda x: torch.zeros(2, 16, 3).scatter_add_(1, ORDER.view(1, -1, 1).expand(2, 16, 3), sequence(x)),
        lambda x: sequence(x).sort(1)[0],
        lambda x: sequence(x).topk(16, dim=1)[0],
        lambda x: torch.fft.irfft(torch.fft.rfft(shuffled(x), dim=1), n=16, dim=1),
        lambda x: x.mean(3, keepdim=True) + x.mean(2, keepdim=True),
    ],
    ids=["merged", "index_add", "scatter_add", "sorted", "topk", "fft", "sums of two axes"],
)
def test_locations_that_are_lost_are_not_guessed_from_their_number(change):
    with pytest.raises(RepresentationError, match=r"were lost in the operation|layouts="):
        captured(Patches(change), "after", positions())


def test_convolutions_of_what_was_lost_do_not_find_it_again():
    class Again(Patches):
        def __init__(self):
            super().__init__(lambda x: x.sort(2)[0])
            self.again = nn.Conv2d(3, 5, 1)

        def forward(self, x):
            return self.again(self.change(self.patch(x)))

    with pytest.raises(RepresentationError, match="lost in the operation 'sort'"):
        captured(Again(), "again", positions())


def test_layers_that_mix_locations_keep_the_axes_of_their_input():
    class Fourier(nn.Module):
        def forward(self, x):
            return torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[-2:])

    model = nn.Sequential(nn.Conv2d(3, 5, 4, stride=4), Fourier())
    assert captured(model, "1", positions()).representations["1"].grid == (4, 4)


class Recurrent(Patches):
    """Shuffled patches, read one after another; step k of the sequence is location ORDER[k] of the image."""

    def __init__(self, kind):
        super().__init__(None)
        self.steps = kind(3, 6, batch_first=True)

    def forward(self, x):
        return self.after(self.steps(shuffled(self.patch(x)))[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_keep_the_order_of_their_steps(kind):
    with torch.no_grad():
        model = Recurrent(kind)
        with Probe(model, "after") as probe:
            out = model(positions())
    kept = probe.representations["after"]
    assert kept.grid == (4, 4)
    assert torch.equal(kept.tokens[:, ORDER], out)


def test_sums_of_different_locations_are_refused():
    with pytest.raises(RepresentationError, match="lost in the operation 'add'"), torch.no_grad():
        captured(Recurrent(nn.RNN), ["after"], positions())


def test_a_view_in_place_is_followed():
    class Turned(Patches):
        def forward(self, x):
            tokens = shuffled(self.patch(x)).unsqueeze(1)
            return self.after(tokens.transpose_(1, 2).squeeze_(2))

    model = Turned(None)
    with torch.no_grad(), Probe(model, "after") as probe:
        out = model(positions())
    assert torch.equal(probe.representations["after"].tokens[:, ORDER], out)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", "zeros"])
def test_padded_convolutions_lay_out_a_grid(mode):
    model = nn.Sequential(nn.Conv2d(3, 4, 7, padding=3, padding_mode=mode), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1))
    kept = captured(model, ["0", "2"], positions()).representations
    assert [r.grid for r in kept.values()] == [(16, 16), (8, 8)]


@pytest.mark.parametrize("upsample", [nn.PixelShuffle(2), nn.Upsample(scale_factor=2), nn.ConvTranspose2d(4, 3, 2, 2)])
def test_enlarged_maps_lay_out_a_grid(upsample):
    model = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), upsample, nn.Identity())
    assert captured(model, "2", positions()).representations["2"].grid == (8, 8)


def test_images_may_hold_their_colours_last():
    class Last(Patches):
        def forward(self, x):
            return super().forward(x.permute(0, 3, 1, 2))

    model, x = Last(sequence), positions().permute(0, 2, 3, 1).contiguous()
    found, kept = where(captured(model, "after", x), "after")
    assert kept.grid == (4, 4)
    assert found[1, 5].tolist() == [1, 4, 4]


@pytest.mark.parametrize("form", ["list", "nested", "bytes", "mask first"])
def test_images_are_found_among_the_inputs(form):
    class Taking(Patches):
        def forward(self, x, image=None):
            if form == "list":
                x = torch.stack([image / 2 for image in x]) * 2
            elif form == "nested":
                x = x["a"]["pixels"]
            elif form == "bytes":
                x = x.float()
            else:
                x = image
            return super().forward(x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2))

    x = positions()
    inputs = {
        "list": ([*x],),
        "nested": ({"a": {"pixels": x}},),
        "bytes": (x.byte(),),
        "mask first": (torch.ones(2, 1, 16, 16), x),
    }[form]
    # Column by column, which nothing but the images themselves can tell.
    probe = captured(Taking(lambda x: x.permute(0, 3, 2, 1).flatten(1, 2)), "after", *inputs)
    found, kept = where(probe, "after")
    assert kept.grid == (4, 4)
    assert found[1, 1].tolist() == [1, 0, 4]


def test_inputs_without_images_say_so():
    class Opening(Patches):
        def forward(self, holder):
            return self.after(sequence(self.patch(holder.images)))

    with pytest.raises(RepresentationError, match="looks like images"):
        captured(Opening(None), "after", Holder(positions()))


class Holder:
    """Images where no probe looks for them."""

    def __init__(self, images):
        self.images = images


@pytest.mark.filterwarnings("ignore")
def test_grids_that_come_as_numbers_decide_every_pass():
    model = hf_model("Siglip2VisionModel", {**SMALL, "num_patches": 16, "patch_size": 16}).eval()
    patches = torch.randn(2, 16, 768)
    with torch.no_grad(), Probe(model, "encoder.layers.1") as probe:
        for grid in ((2, 8), (4, 4), (8, 2), (2, 8), (3, 4)):
            sizes = torch.tensor([grid, grid])
            model(pixel_values=patches, pixel_attention_mask=torch.ones(2, 16), spatial_shapes=sizes)
            kept = probe.representations["encoder.layers.1"]
            assert kept.grid == grid
            assert kept.tokens.shape[1] == grid[0] * grid[1]


def test_flags_decide_how_a_pass_is_read():
    class Flipping(Patches):
        def forward(self, x, flip=False):
            return self.after(sequence(self.patch(x)).flip(1) if flip else sequence(self.patch(x)))

    with torch.no_grad(), Probe(model := Flipping(None), "after") as probe:
        for flip in (False, True, False):
            model(positions(), flip=flip)
            assert where(probe, "after")[0][1, 1].tolist() == [1, 0, 4]


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_gives_its_output_and_not_its_weights(batch_first):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 8, 4, stride=4)
            self.attend = nn.MultiheadAttention(8, 2, batch_first=batch_first)

        def forward(self, x):
            tokens = sequence(self.patch(x))
            tokens = tokens if batch_first else tokens.transpose(0, 1)
            return self.attend(tokens, tokens, tokens)[0]

    model = Attending().eval()
    with torch.no_grad(), Probe(model, "attend") as probe:
        for _ in range(2):
            expected = model(positions())
            kept = probe.representations["attend"]
            assert (kept.tokens.shape, kept.grid) == ((2, 16, 8), (4, 4))
            assert torch.equal(kept.tokens, expected if batch_first else expected.transpose(0, 1))


def test_attention_inside_windows_belongs_to_its_queries():
    class Windowed(Patches):
        def forward(self, x):
            inside = windows(self.patch(x)).transpose(1, 2)  # (windows, C, locations)
            weights = torch.softmax(inside.transpose(1, 2) @ inside * 1e3, -1)
            return self.after(inside @ weights.transpose(1, 2))

    # Each location attends to itself alone, apart from ties, so that its vector stays.
    kept = captured(Windowed(None), "after", positions()).representations["after"]
    assert kept.grid == (4, 4)
    assert kept.tokens.shape == (2, 16, 3)


@pytest.mark.filterwarnings("ignore")
def test_transformers_that_leave_padding_out_are_not_guessed():
    class Padded(Patches):
        def __init__(self):
            super().__init__(None)
            self.patch = nn.Conv2d(3, 8, 4, stride=4)
            layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
            self.encode = nn.TransformerEncoder(layer, 1).eval()

        def forward(self, x):
            mask = (torch.arange(16) >= 12).expand(2, -1)
            return self.after(self.encode(sequence(self.patch(x)), src_key_padding_mask=mask))

    model = Padded().eval()
    with torch.no_grad():
        expected = model(positions())
        with Probe(model, "patch") as probe:
            assert torch.equal(model(positions()), expected)
        assert probe.representations["patch"].grid == (4, 4)
        with pytest.raises(RepresentationError, match="lost in the operation"):
            captured(model, "after", positions())


def test_pass_that_was_interrupted_is_followed_again():
    class Interrupted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.stop = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 8, 1), True

        def forward(self, x):
            x = self.a(x)
            if self.stop:
                raise KeyboardInterrupt
            return self.b(x)

    with torch.no_grad(), Probe(model := Interrupted(), "b") as probe:
        with pytest.raises(KeyboardInterrupt):
            model(positions())
        model.stop = False
        model(positions())
        assert probe.representations["b"].grid == (4, 4)


def test_layer_that_runs_in_some_passes_only_is_read_once_it_runs():
    class Sometimes(Patches):
        run = False

        def forward(self, x):
            return self.after(self.patch(x)) if self.run else self.patch(x)

    with torch.no_grad(), Probe(model := Sometimes(None), ["patch", "afte*"]) as probe:
        with pytest.warns(UserWarning, match="could not be captured"):
            model(positions())
        model.run = True
        model(positions())
        assert "call the model again" in probe.skipped["after"]
        model(positions())
        assert probe.representations["after"].grid == (4, 4)


def test_operations_are_refused_in_training_mode(small_resnet):
    with (
        pytest.raises(LayerError, match=r"'fx:...' layers run the model twice"),
        Probe(small_resnet.train(), "fx:layer1.0.add"),
    ):
        small_resnet(pictures(32))


def test_passes_in_other_threads_are_left_alone(small_resnet):
    x = pictures(32)
    with torch.no_grad():
        expected = captured(small_resnet, "layer2.0", x).representations["layer2.0"].tokens

        def work(_):
            with torch.no_grad(), Probe(small_resnet, "layer2.0") as probe:
                for _ in range(5):
                    small_resnet(x)
                return probe.representations["layer2.0"].tokens

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(work, range(8)))
    assert all(torch.equal(tokens, expected) for tokens in found)


def test_a_thread_that_runs_the_model_while_hooks_are_put_on_is_left_alone(small_resnet):
    # PyTorch adds a hook first and notes that it wants keyword arguments after that: a call in between lacks them.
    modules = list(small_resnet.modules())
    with Probe(small_resnet, "layer2.0") as probe, ThreadPoolExecutor(1) as pool:
        wishes = [(module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs) for module in modules]
        kept = [(dict(before), dict(after)) for before, after in wishes]
        assert any(before for before, _ in kept)
        assert any(after for _, after in kept)
        for before, after in wishes:
            before.clear()
            after.clear()
        assert pool.submit(small_resnet, pictures(32)).result().shape[0] == len(pictures(32))
        for (before, after), (known_before, known_after) in zip(wishes, kept, strict=True):
            before.update(known_before)
            after.update(known_after)
        assert not probe.representations
        small_resnet(pictures(32))
        assert list(probe.representations) == ["layer2.0"]


@pytest.mark.parametrize(
    ("origin", "shape"),
    [
        (torch.arange(6.0).view(1, 2, 1, 3, 1).expand(4, 2, 5, 3, 7), (4, 2, 5, 21)),
        (torch.arange(6.0).view(1, 2, 3, 1, 1).expand(12, 2, 3, 4, 4), (3, 4, 6, 16)),
        (torch.arange(4.0).view(4, 1).expand(4, 6), (2, 12)),
        (torch.arange(24.0).view(4, 6), (3, 8)),
        (torch.ones(1, 1).expand(4, 6), (1, 24, 1)),
        (torch.arange(3.0).view(3, 1, 1), (3,)),
        (torch.arange(3.0), (3, 1, 1)),
    ],
)
def test_codes_in_another_shape_are_those_of_a_plain_reshape(origin, shape):
    reshaped = _reshaped(origin, shape)
    assert torch.equal(reshaped, origin.reshape(shape))
    constant = [axis for axis in range(len(shape)) if torch.equal(reshaped, reshaped.narrow(axis, 0, 1).expand(shape))]
    assert all(shape[axis] == 1 or reshaped.stride(axis) == 0 for axis in constant)


IN_PLACE = [
    nn.ReLU6, nn.Hardtanh, nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.Hardsigmoid, nn.Hardswish, nn.SiLU, nn.LeakyReLU,
    nn.RReLU, partial(nn.Threshold, 0.1, 0.0),
]  # fmt: skip


@pytest.mark.parametrize("activation", IN_PLACE, ids=lambda made: getattr(made, "__name__", "Threshold"))
def test_activations_in_place_keep_locations(activation):
    # As many channels as images and rows: shapes alone do not tell the axes.
    model = nn.Sequential(nn.Conv2d(4, 4, 1), activation(inplace=True), nn.Conv2d(4, 4, 1)).eval()
    x = torch.randn(4, 4, 4, 4)
    with torch.no_grad(), Probe(model, ["1", "2"]) as probe:
        model(x)
        assert probe.representations["2"].grid == (4, 4)
        tokens = probe.representations["1"].tokens
    expected = activation().eval()(model[0](x))
    torch.testing.assert_close(tokens, expected.flatten(2).mT)
