"""Probe: what it captures, what it leaves as it was, and how it refuses."""

import copy
import warnings
from collections import Counter
from dataclasses import dataclass

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch._C import _len_torch_dispatch_stack

from rsm_probe import Probe
from rsm_probe.errors import LayerError, RepresentationError


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # Images are too small for a second thread to help, and threads that wait for a busy processor cost seconds.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    for module in model.modules():
        # Fresh statistics and offsets, so that a normalisation that is left out shows.
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.bias, 0, 0.2)
    return model


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Fickle(nn.Module):
    """Runs `used` twice with different inputs, never `idle`, and returns whatever `answer` makes of it."""

    def __init__(self, answer=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.used = nn.ReLU(inplace=True)
        self.idle = nn.Linear(4, 4)
        self.head = Answer(answer or (lambda x: x))

    def forward(self, x):
        return self.head(self.used(self.used(self.conv(x)) - 0.5))


class Answer(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


def hooks_in(model: nn.Module) -> Counter:
    """Every hook of every module, by what it is."""
    return Counter(
        (name, hook)
        for name, module in model.named_modules()
        for table in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_pre_hooks_with_kwargs,
            module._forward_hooks_always_called,
        )
        for hook in table.values()
    )


def flat(output: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, S, C), by hand."""
    return output.detach().flatten(2).permute(0, 2, 1)


def tokens(model, layer, *inputs, **options):
    with torch.no_grad(), Probe(model, layer, **options) as probe:
        model(*inputs)
    return probe.representations


# What is captured


def test_several_layers_come_from_one_pass_in_forward_order(resnet18, images):
    calls = []
    handle = resnet18.register_forward_hook(lambda *_: calls.append(1))
    kept = tokens(resnet18, ["layer4", "fc", "layer1.0", "conv1"], images)
    handle.remove()
    assert list(kept) == ["conv1", "layer1.0", "layer4", "fc"]
    assert calls == [1]
    assert {name: tuple(r.tokens.shape) for name, r in kept.items()} == {
        "conv1": (3, 256, 64),
        "layer1.0": (3, 64, 64),
        "layer4": (3, 1, 512),
        "fc": (3, 1, 1000),
    }
    assert {name: r.grid for name, r in kept.items()} == {
        "conv1": (16, 16),
        "layer1.0": (8, 8),
        "layer4": (1, 1),
        "fc": None,
    }


def test_order_is_that_of_the_forward_pass_not_of_registration():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Conv2d(4, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.last(self.first(x))

    assert list(tokens(Reversed(), ["last", "first"], torch.randn(2, 3, 4, 4))) == ["first", "last"]


def test_values_are_those_of_an_independent_forward(resnet18, images):
    # torchvision's ReLU overwrites what bn1 returned; without a copy the negative values are gone.
    with torch.no_grad():
        x = resnet18.maxpool(torch.relu(resnet18.bn1(resnet18.conv1(images))))
        block = resnet18.layer1[0]
        expected = block.bn1(block.conv1(x)).clone()
    kept = tokens(resnet18, "layer1.0.bn1", images)["layer1.0.bn1"]
    assert kept.tokens.min() < -0.5
    torch.testing.assert_close(kept.tokens, flat(expected), rtol=0, atol=1e-6)


def test_location_s_of_the_tokens_is_row_and_column_of_the_map(resnet18):
    wide = torch.randn(2, 3, 32, 64)
    raw = {}
    handle = resnet18.layer2.register_forward_hook(lambda m, a, o: raw.update(map=o.clone()))
    kept = tokens(resnet18, "layer2", wide)["layer2"]
    handle.remove()
    assert kept.grid == (4, 8)
    for row, column in ((0, 0), (0, 7), (3, 0), (2, 5)):
        assert torch.equal(kept.tokens[:, row * 8 + column], raw["map"][:, :, row, column])


def test_captured_tensors_are_detached_even_when_gradients_flow(resnet18, images):
    with Probe(resnet18, "layer1") as probe:
        output = resnet18(images)
    kept = probe.representations["layer1"].tokens
    assert output.requires_grad
    assert not kept.requires_grad
    assert kept.grad_fn is None


def test_gradients_are_those_of_the_model_without_a_probe(small_resnet):
    x = torch.randn(2, 3, 32, 32)
    small_resnet(x).square().sum().backward()
    expected = small_resnet.conv1.weight.grad.clone()
    small_resnet.zero_grad()
    with Probe(small_resnet, "all"):
        small_resnet(x).square().sum().backward()
    assert torch.equal(small_resnet.conv1.weight.grad, expected)


@pytest.mark.parametrize("layer", ["fc", ""])
def test_in_place_changes_of_the_output_do_not_reach_what_was_captured(resnet18, images, layer):
    with torch.no_grad(), Probe(resnet18, layer) as probe:
        output = resnet18(images)
        expected = output.clone()
        output.zero_()
    assert torch.equal(probe.representations[layer].tokens[:, 0], expected)


def test_changes_of_what_was_captured_do_not_reach_the_model(resnet18, images):
    with torch.no_grad(), Probe(resnet18, "fc") as probe:
        output = resnet18(images)
        expected = output.clone()
        probe.representations["fc"].tokens.zero_()
    assert torch.equal(output, expected)


def test_each_forward_pass_replaces_the_representations_and_leaves_those_kept_from_before(resnet18, images):
    with torch.no_grad(), Probe(resnet18, "layer1") as probe:
        resnet18(images)
        first = probe.representations["layer1"].tokens
        copy = first.clone()
        resnet18(images[:2] + 1)
        second = probe.representations["layer1"].tokens
    assert second.shape[0] == 2
    assert first.shape[0] == 3
    assert torch.equal(first, copy)
    assert not torch.equal(second, first[:2])


def test_passes_are_counted_as_they_are_captured(resnet18, images):
    probe = Probe(resnet18, "layer1", example=images[:1])
    assert probe.passes == 0
    with torch.no_grad():
        with probe:
            assert probe.passes == 0
            resnet18(images)
            assert probe.passes == 1
            with pytest.raises(RuntimeError):
                resnet18(images[:, :2])
            assert probe.passes == 1
            resnet18(images)
            assert probe.passes == 2
        # Never the same number for two passes.
        with probe:
            resnet18(images)
    assert probe.passes == 3


def test_a_failed_forward_leaves_no_representations_of_the_pass_before(resnet18, images):
    with torch.no_grad(), Probe(resnet18, "layer1") as probe:
        resnet18(images)
        with pytest.raises(RuntimeError):
            resnet18(images[:, :2])
        assert probe.representations == {}
        resnet18(images)
        assert list(probe.representations) == ["layer1"]


def test_representations_outlive_the_with_block_and_later_passes_do_not_change_them(resnet18, images):
    with torch.no_grad():
        with Probe(resnet18, "layer1") as probe:
            resnet18(images)
        copy = probe.representations["layer1"].tokens.clone()
        resnet18(images + 1)
    assert torch.equal(probe.representations["layer1"].tokens, copy)


def test_all_captures_every_module_that_gives_tokens(resnet18, images):
    fired = []
    handles = [m.register_forward_hook(lambda m, a, o, n=n: fired.append(n)) for n, m in resnet18.named_modules() if n]
    kept = tokens(resnet18, "all", images)
    for handle in handles:
        handle.remove()
    counts = Counter(fired)
    assert {label.split("#")[0] for label in kept} == set(fired)
    assert {label for label in kept if "#" in label} == {
        f"{n}#{k}" for n, count in counts.items() if count > 1 for k in range(count)
    }
    # Forward order, parents after their parts.
    assert [label.split("#")[0] for label in kept] == fired


def test_model_given_by_keyword_arguments_is_probed():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, *, scale, pixel_values):
            return self.conv(pixel_values) * scale

    model = Keywords()
    with torch.no_grad(), Probe(model, "conv") as probe:
        model(scale=torch.ones(1), pixel_values=torch.randn(5, 3, 4, 4))
    assert probe.representations["conv"].tokens.shape == (5, 16, 4)


def test_half_precision_is_captured_in_float32(images):
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval().bfloat16()
    raw = {}
    handle = model.layer1.register_forward_hook(lambda m, a, o: raw.update(map=o.clone()))
    kept = tokens(model, "layer1", images.bfloat16())["layer1"]
    handle.remove()
    assert raw["map"].dtype == torch.bfloat16
    assert kept.tokens.dtype == torch.float32
    assert torch.equal(kept.tokens, flat(raw["map"]).float())


def test_double_precision_stays_double(small_resnet):
    kept = tokens(small_resnet.double(), "layer1", torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert kept["layer1"].tokens.dtype == torch.float64


def test_channels_last_model_gives_the_same_tokens(resnet18, images):
    expected = tokens(resnet18, ["conv1", "layer1.0.bn1", "layer2"], images)
    changed = torchvision.models.resnet18().eval()
    changed.load_state_dict(resnet18.state_dict())
    changed = changed.to(memory_format=torch.channels_last)
    kept = tokens(changed, ["conv1", "layer1.0.bn1", "layer2"], images.to(memory_format=torch.channels_last))
    for name, representation in expected.items():
        assert kept[name].grid == representation.grid
        torch.testing.assert_close(kept[name].tokens, representation.tokens, rtol=1e-4, atol=1e-4)


# Repeated, silent and unreadable layers


def test_layer_that_runs_twice_has_to_be_chosen(resnet18, images):
    with pytest.raises(LayerError, match=r"'layer1.0.relu' ran 2 times.*'layer1.0.relu#0', 'layer1.0.relu#1'"):
        tokens(resnet18, "layer1.0.relu", images)
    assert not hooks_in(resnet18)


def test_call_picks_the_values_of_that_call(resnet18, images):
    with torch.no_grad():
        x = resnet18.maxpool(torch.relu(resnet18.bn1(resnet18.conv1(images))))
        block = resnet18.layer1[0]
        inner = torch.relu(block.bn1(block.conv1(x)))
        outer = torch.relu(block.bn2(block.conv2(inner)) + x)
    kept = tokens(resnet18, ["layer1.0.relu#1", "layer1.0.relu#0", "layer1.0.conv2"], images)
    assert list(kept) == ["layer1.0.relu#0", "layer1.0.conv2", "layer1.0.relu#1"]
    torch.testing.assert_close(kept["layer1.0.relu#0"].tokens, flat(inner), rtol=0, atol=1e-6)
    torch.testing.assert_close(kept["layer1.0.relu#1"].tokens, flat(outer), rtol=0, atol=1e-6)


def test_pattern_that_matches_a_repeated_layer_gives_every_call(resnet18, images):
    kept = tokens(resnet18, "layer1.0.rel*", images)
    assert list(kept) == ["layer1.0.relu#0", "layer1.0.relu#1"]


def test_call_that_did_not_happen_is_refused(resnet18, images):
    with pytest.raises(LayerError, match=r"'layer1.0.relu#2' was called 2 times.*numbered from #0"):
        tokens(resnet18, "layer1.0.relu#2", images)


def test_call_of_a_layer_that_runs_once_is_its_only_one(resnet18, images):
    one, other = tokens(resnet18, ["layer1", "layer1#0"], images).values()
    assert torch.equal(one.tokens, other.tokens)


def test_layer_that_never_runs_is_an_error_that_names_its_parent():
    model = torchvision.models.vision_transformer.VisionTransformer(
        image_size=32, patch_size=16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16
    ).eval()
    # Attention uses the weights of out_proj without calling it.
    silent = "encoder.layers.encoder_layer_0.self_attention.out_proj"
    with pytest.raises(LayerError, match=r"out_proj' never ran.*probe '.*encoder_layer_0.self_attention' instead"):
        tokens(model, silent, torch.randn(2, 3, 32, 32))
    assert not hooks_in(model)


def test_container_whose_parts_are_called_by_hand_names_the_parts():
    from transformers import ResNetConfig, ResNetModel

    model = ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_channels=3)
    ).eval()
    with pytest.raises(LayerError, match=r"never ran.*probe 'encoder.stages.0.layers.0', 'encoder.stages.0.layers.1'"):
        tokens(model, "encoder.stages.0.layers", torch.randn(2, 3, 32, 32))
    assert list(tokens(model, "blocks", torch.randn(2, 3, 32, 32))) == [
        f"encoder.stages.{stage}.layers.{block}" for stage in range(2) for block in range(2)
    ]


def test_what_a_pattern_matched_in_vain_is_listed_and_warned_of_once():
    model = Fickle()
    with torch.no_grad(), Probe(model, "*") as probe:
        with pytest.warns(
            UserWarning, match=r"1 layer matched by a pattern could not be captured \(idle\): .*never ran"
        ):
            model(torch.randn(2, 3, 4, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(torch.randn(2, 3, 4, 4))
    assert list(probe.representations) == ["conv", "used#0", "used#1", "head"]
    assert "never ran" in probe.skipped["idle"]


def test_pattern_of_which_nothing_could_be_captured_is_an_error():
    with pytest.raises(LayerError, match=r"none of 1 layers.*'idle'.*never ran"):
        tokens(Fickle(), "idl*", torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda x: x.mean(), r"shape \(\).*at least \(N, C\)"),
        (lambda x: x.mean((1, 2, 3)), r"shape \(2,\).*at least \(N, C\)"),
        (lambda x: x.flatten(1).argmax(1, keepdim=True), "has dtype torch.int64, which is not floating point"),
        (lambda x: None, r"its output \(NoneType\) contains no floating-point tensor"),
        (lambda x: "text", r"its output \(str\) contains no floating-point tensor"),
        (lambda x: (None, {"n": 3}), r"its output \(tuple\) contains no floating-point tensor"),
    ],
    ids=["scalar", "vector", "integers", "none", "text", "tuple"],
)
def test_output_that_is_no_representation_names_layer_class_and_reason(answer, reason):
    model = Fickle(answer)
    with pytest.raises(RepresentationError, match=rf"layer 'head' \(Answer\): .*{reason}"):
        tokens(model, "head", torch.randn(2, 3, 4, 4))
    assert not hooks_in(model)


# Outputs with parts


@dataclass
class Parts:
    first: torch.Tensor
    second: torch.Tensor


@pytest.mark.parametrize(
    ("answer", "key"),
    [
        (lambda x: (x, 2 * x), "1"),
        (lambda x: [x, 2 * x], "1"),
        (lambda x: {"a": x, "b": 2 * x}, "b"),
        (lambda x: (x, {"deep": [x, 2 * x]}), "1.deep.1"),
        (lambda x: Parts(x, 2 * x), "second"),
    ],
    ids=["tuple", "list", "dict", "nested", "dataclass"],
)
def test_key_chooses_a_part_of_the_output(answer, key):
    model, x = Fickle(answer), torch.randn(2, 3, 4, 4)
    plain = tokens(model, "used#1", x)["used#1"]
    kept = tokens(model, f"head[{key}]", x)[f"head[{key}]"]
    assert kept.grid == (4, 4)
    assert torch.equal(kept.tokens, 2 * plain.tokens)


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: (None, x, 2 * x),
        lambda x: (torch.arange(2), x, 2 * x),
        lambda x: (x.mean((2, 3)), x),
        lambda x: {"loss": x.mean(), "map": x},
        lambda x: (x[:1], [x]),
    ],
    ids=["none-first", "integers-first", "vectors-first", "dict", "other-batch-first"],
)
def test_without_a_key_the_first_map_of_the_batch_is_taken(answer):
    model, x = Fickle(answer), torch.randn(2, 3, 4, 4)
    kept = tokens(model, ["used#1", "head"], x)
    assert torch.equal(kept["head"].tokens, kept["used#1"].tokens)


@pytest.mark.parametrize(
    ("answer", "key", "parts"),
    [
        (lambda x: (x, x), "2", "0, 1"),
        (lambda x: (x, x), "first", "0, 1"),
        (lambda x: {"a": x, "b": x}, "c", "a, b"),
        (lambda x: Parts(x, x), "third", "first, second"),
    ],
)
def test_part_that_is_not_there_names_those_that_are(answer, key, parts):
    with pytest.raises(RepresentationError, match=rf"layer 'head\[{key}\]'.*no part '{key}'; parts are: {parts}"):
        tokens(Fickle(answer), f"head[{key}]", torch.randn(2, 3, 4, 4))


def test_part_and_call_are_chosen_together():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.pair = Answer(lambda x: (x, x + 1))

        def forward(self, x):
            return self.pair(self.pair(self.conv(x))[1])

    model, x = Twice(), torch.randn(2, 3, 4, 4)
    kept = tokens(model, ["conv", "pair[1]#1"], x)
    torch.testing.assert_close(kept["pair[1]#1"].tokens, kept["conv"].tokens + 2)


# layouts=


def test_layouts_decide_where_shapes_do_not():
    # A map with as many channels as rows and columns, channels last, under a module that says nothing.
    model, x = Fickle(lambda x: x.permute(0, 2, 3, 1)), torch.randn(2, 3, 4, 4)
    for pattern in ("head", "hea*"):
        kept = tokens(model, ["used#1", "head"], x, layouts={pattern: "NHWC"})
        assert torch.equal(kept["head"].tokens, kept["used#1"].tokens)
    turned = tokens(model, ["used#1", "head"], x, layouts={"head": "NCHW"})
    assert not torch.equal(turned["head"].tokens, turned["used#1"].tokens)


def test_output_that_mixes_locations_and_channels_asks_for_layouts_and_takes_them():
    model, x = Fickle(lambda x: x.reshape(2, 1, 2, 32)), torch.randn(2, 3, 4, 4)
    with pytest.raises(RepresentationError, match=r"'head'.*\(2, 1, 2, 32\).*layouts=.*'NCHW'.*'NHWC'"):
        tokens(model, "head", x)
    kept = tokens(model, "head", x, layouts={"head": "NHWC"})["head"]
    assert kept.grid == (1, 2)
    assert kept.tokens.shape == (2, 2, 32)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [("NWHC", "unknown layout 'NWHC'.*NCHW, NHWC"), ("NTC", r"shape \(2, 4, 4, 4\), which does not fit layout 'NTC'")],
)
def test_layout_that_is_unknown_or_does_not_fit_is_named(layout, reason):
    with pytest.raises(RepresentationError, match=f"layer 'conv'.*{reason}"):
        tokens(Fickle(), "conv", torch.randn(2, 3, 4, 4), layouts={"conv": layout})


@pytest.mark.parametrize("batch", [2, 4])
def test_layouts_settle_sequences_that_might_be_windows(batch):
    # Eight tokens are a multiple of the batch, as windows would be.
    class TokensFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 8)

        def forward(self, x):
            return self.head(self.conv(x).flatten(2).permute(2, 0, 1))

    model, x = TokensFirst(), torch.randn(batch, 3, 2, 4)
    raw = {}
    handle = model.head.register_forward_hook(lambda m, a, o: raw.update(output=o.clone()))
    kept = tokens(model, "head", x, layouts={"head": "TNC"})["head"]
    handle.remove()
    assert kept.grid == (2, 4)
    assert torch.equal(kept.tokens, raw["output"].transpose(0, 1))


# Folded batches


class Windows(nn.Module):
    """Attention over windows of 2 x 2 locations, as a window transformer computes it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        x = self.conv(x)
        n, c, h, w = x.shape
        windows = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
        return self.inner(windows).mean((1, 2))


# With four images the second axis has the size of the batch by chance, which makes no batch of it.
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_batch_that_is_folded_into_windows_is_put_back_in_the_order_of_the_image(batch):
    model, x = Windows(), torch.randn(batch, 3, 8, 8)
    kept = tokens(model, ["conv", "inner"], x)
    assert kept["inner"].grid == kept["conv"].grid
    with torch.no_grad():
        expected = model.inner(kept["conv"].tokens)
    torch.testing.assert_close(kept["inner"].tokens, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch", [2, 16])
def test_window_attention_of_a_real_model_is_put_back_in_the_order_of_the_image(batch):
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(1, 1), num_heads=(2, 2)
    ).eval()
    x = torch.randn(batch, 3, 32, 32)
    kept = tokens(model, "layers.0.blocks.0.attn", x)["layers.0.blocks.0.attn"]
    assert kept.grid == (8, 8)
    with torch.no_grad():
        block = model.layers[0].blocks[0]
        # The first block of a stage does not shift its windows.
        expected = block._attn(block.norm1(model.layers[0].downsample(model.patch_embed(x))))
    torch.testing.assert_close(kept.tokens, expected.flatten(1, 2), rtol=0, atol=1e-6)


# What stays as it was


@pytest.mark.parametrize("layers", ["blocks", "all", ["layer1.0.bn1", "layer1.0.relu#1", "fc"]])
def test_output_is_bit_identical_with_and_without_a_probe(resnet18, images, layers):
    with torch.no_grad():
        expected = resnet18(images)
        with Probe(resnet18, layers):
            inside = resnet18(images)
        after = resnet18(images)
    assert torch.equal(inside, expected)
    assert torch.equal(after, expected)


def test_training_flags_stay_as_they_are_with_a_probe(small_resnet):
    small_resnet.layer2.train()
    before = {name: module.training for name, module in small_resnet.named_modules()}
    with torch.no_grad(), Probe(small_resnet, "blocks", example=torch.randn(2, 3, 32, 32)):
        small_resnet(torch.randn(2, 3, 32, 32))
        assert {name: module.training for name, module in small_resnet.named_modules()} == before
    assert {name: module.training for name, module in small_resnet.named_modules()} == before
    assert set(before.values()) == {True, False}


def test_example_pass_does_not_change_a_model_in_training_mode(small_resnet):
    # Its forward pass is the probe's own, so it must not move the running statistics of the model.
    small_resnet.train()
    before = {name: buffer.clone() for name, buffer in small_resnet.named_buffers()}
    with Probe(small_resnet, "blocks", example=torch.randn(2, 3, 32, 32)):
        pass
    assert all(torch.equal(buffer, before[name]) for name, buffer in small_resnet.named_buffers())
    assert all(module.training for module in small_resnet.modules())


def test_hooks_are_gone_after_the_with_block(resnet18, images):
    with torch.no_grad(), Probe(resnet18, "all"):
        assert hooks_in(resnet18)
        resnet18(images)
    assert not hooks_in(resnet18)


def test_constructing_a_probe_sets_no_hooks(resnet18):
    Probe(resnet18, "all")
    assert not hooks_in(resnet18)


def test_hooks_are_gone_when_the_body_raises(resnet18):
    with pytest.raises(KeyError, match="mine"), Probe(resnet18, "blocks"):
        raise KeyError("mine")
    assert not hooks_in(resnet18)


def test_hooks_are_gone_when_the_forward_pass_raises(resnet18, images):
    with pytest.raises(RuntimeError, match="channels"), Probe(resnet18, "blocks"):
        resnet18(images[:, :2])
    assert not hooks_in(resnet18)


@pytest.mark.parametrize(
    ("layers", "example", "error"),
    [
        ("blocks", torch.zeros(1, 2, 32, 32), RuntimeError),
        ("blocks", (torch.zeros(1, 3, 32, 32), "surplus"), TypeError),
        ("blocks", {"pixels": torch.zeros(1, 3, 32, 32)}, TypeError),
        ("layer1.0.relu", torch.zeros(1, 3, 32, 32), LayerError),
        ("fc[logits]", torch.zeros(1, 3, 32, 32), RepresentationError),
    ],
    ids=["channels", "arguments", "keywords", "repeated-layer", "part"],
)
def test_hooks_are_gone_when_entry_fails(resnet18, layers, example, error):
    body = []
    with pytest.raises(error), Probe(resnet18, layers, example=example):
        body.append("reached")
    assert not body
    assert not hooks_in(resnet18)


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: {"x": x}], ids=["tensor", "tuple", "mapping"])
def test_example_runs_the_model_at_entry_and_is_no_batch(resnet18, images, form):
    seen = []
    handle = resnet18.register_forward_hook(lambda m, a, output: seen.append((len(output), output.requires_grad)))
    with Probe(resnet18, "layer1", example=form(images)) as probe:
        assert probe.representations == {}
        assert probe.passes == 0
    handle.remove()
    assert seen == [(3, False)]


def test_without_an_example_nothing_runs_at_entry(resnet18):
    calls = []
    handle = resnet18.register_forward_hook(lambda *_: calls.append(1))
    with Probe(resnet18, "layer1") as probe:
        assert probe.representations == {}
    handle.remove()
    assert calls == []


def test_hooks_of_others_remain_and_work(resnet18, images):
    counted = Counter()

    def count(kind):
        # A hook that answers None changes nothing, and one that counts shows that it ran.
        return lambda *_: counted.update([kind])

    def double(module, inputs, output):
        return output * 2

    handles = [
        resnet18.register_forward_pre_hook(count("before")),
        resnet18.layer1.register_forward_hook(count("layer1")),
        resnet18.register_forward_hook(count("after")),
        resnet18.fc.register_forward_hook(double),
    ]
    before = hooks_in(resnet18)
    with torch.no_grad():
        expected = resnet18(images)
        with Probe(resnet18, ["layer1", "fc"]) as probe:
            inside = resnet18(images)
            handles.append(resnet18.layer2.register_forward_hook(count("layer2")))
        added = hooks_in(resnet18) - before
        after = resnet18(images)
    for handle in handles:
        handle.remove()
    assert [name for name, _ in added] == ["layer2"]
    assert counted == {"before": 3, "layer1": 3, "after": 3, "layer2": 1}
    assert torch.equal(inside, expected)
    assert torch.equal(after, expected)
    # What a hook that came first made of the output is the layer's output.
    assert torch.equal(probe.representations["fc"].tokens[:, 0], expected)
    assert not hooks_in(resnet18)


def test_hooks_of_others_remain_when_the_body_raises(resnet18):
    handle = resnet18.layer1.register_forward_hook(lambda *_: None)
    before = hooks_in(resnet18)
    with pytest.raises(KeyError), Probe(resnet18, "all"):
        raise KeyError
    assert hooks_in(resnet18) == before
    handle.remove()


def test_hidden_states_of_transformers_still_come_after_a_probe():
    # That library collects them with hooks of its own, which clearing all hooks would break.
    from transformers import ViTConfig, ViTModel

    model = ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32)
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(x, output_hidden_states=True).hidden_states
        with Probe(model, "all"):
            inside = model(x, output_hidden_states=True).hidden_states
        after = model(x, output_hidden_states=True).hidden_states
    assert len(before) == len(inside) == len(after) == 4
    assert all(torch.equal(a, b) for states in (inside, after) for a, b in zip(before, states, strict=True))


def test_two_probes_on_one_model_do_not_disturb_each_other(resnet18, images):
    with torch.no_grad(), Probe(resnet18, "layer1") as outer:
        with Probe(resnet18, "layer2") as inner:
            resnet18(images)
        resnet18(images[:1])
    assert inner.representations["layer2"].tokens.shape[0] == 3
    assert outer.representations["layer1"].tokens.shape[0] == 1
    assert not hooks_in(resnet18)
    assert not _len_torch_dispatch_stack()


@pytest.mark.parametrize("specs", [("layer1", "fx:layer1.0.add"), ("fx:layer1.0.add", "layer1"), ("layer1", "layer1")])
def test_probes_that_end_in_the_order_in_which_they_began_follow_to_their_own_ends(resnet18, images, specs):
    alone = []
    for spec in specs:
        with torch.no_grad(), Probe(resnet18, spec) as probe:
            resnet18(images)
        alone.append(probe.representations[spec])
    with torch.no_grad(), Probe(resnet18, specs[0]) as first, Probe(resnet18, specs[1]) as second:
        resnet18(images)
        assert not _len_torch_dispatch_stack()
    for probe, spec, expected in zip((first, second), specs, alone, strict=True):
        found = probe.representations[spec]
        assert found.grid == expected.grid
        assert torch.equal(found.tokens, expected.tokens)


# Refused at entry


def test_active_probe_is_not_entered_again_and_stays_active(resnet18, images):
    probe = Probe(resnet18, "layer1")
    with torch.no_grad(), probe:
        with pytest.raises(LayerError, match="already active"):
            probe.__enter__()
        resnet18(images)
        assert list(probe.representations) == ["layer1"]
    assert not hooks_in(resnet18)


def test_probe_can_be_entered_again_after_it_was_left(resnet18, images):
    probe = Probe(resnet18, "layer1")
    for count in (3, 2):
        with torch.no_grad(), probe:
            resnet18(images[:count])
        assert probe.representations["layer1"].tokens.shape[0] == count
    assert not hooks_in(resnet18)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("convert", [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(1, 3, 4, 4))])
@pytest.mark.parametrize("wrapped", [False, True])
def test_scripted_models_are_refused_because_their_hooks_never_run(convert, wrapped):
    scripted = convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    model = nn.Sequential(nn.Identity(), scripted) if wrapped else scripted
    with pytest.raises(LayerError, match=r"scripted.*probe the model it was made from"), Probe(model, "1"):
        pass


@pytest.mark.parametrize("layer", ["0", "_orig_mod.0"])
def test_model_that_was_compiled_before_is_probed_and_stays_compiled(layer):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        expected = compiled(x)
        with Probe(compiled, layer) as probe:
            assert torch.equal(compiled(x), expected)
        assert torch.equal(probe.representations["0"].tokens, flat(model[0](x)))
        # Outside, its hooks are not seen again: what was compiled runs.
        fired = []
        model[0].register_forward_hook(lambda *_: fired.append(1))
        compiled(x)
    assert not fired


@pytest.mark.parametrize("part", [False, True])
def test_model_compiled_in_place_is_probed(part):
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        expected = flat(model[0][0](x))
        if part:
            model[0] = torch.compile(model[0], backend="eager")
        else:
            model.compile(backend="eager")
        model(x)
        with Probe(model, ["0.0", "1"]) as probe:
            model(x)
    assert list(probe.representations) == ["0.0", "1"]
    assert torch.equal(probe.representations["0.0"].tokens, expected)


@pytest.mark.parametrize("layer", ["layer1", "module.layer1"])
@pytest.mark.parametrize("called", ["wrapper", "model"])
def test_data_parallel_model_is_probed(resnet18, images, layer, called):
    here = "cuda" if torch.cuda.is_available() else "cpu"  # where there are GPUs, it wants its model on the first
    model, images = copy.deepcopy(resnet18).to(here), images.to(here)
    wrapper = nn.DataParallel(model, device_ids=[0] if here == "cuda" else None)
    with torch.no_grad(), Probe(wrapper, layer) as probe:
        (wrapper if called == "wrapper" else model)(images)
    assert torch.equal(probe.representations["layer1"].tokens, tokens(model, "layer1", images)["layer1"].tokens)


def test_batches_that_are_split_over_devices_are_refused(resnet18):
    wrapper = nn.DataParallel(copy.deepcopy(resnet18))
    wrapper.device_ids = [0, 1]
    with pytest.raises(LayerError, match=r"splits every batch over 2 devices.*`model.module`"):
        Probe(wrapper, "layer1")


def test_reduce_sees_every_layer_as_it_runs_and_copies_nothing(resnet18, images):
    order, pointers = [], {}
    outputs = {}
    handles = [
        resnet18.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
        for name in ("layer1.0", "layer4.1")
    ]

    def reduce(layer, kept):
        order.append((layer, tuple(outputs)))
        pointers[layer] = kept.tokens.data_ptr()
        return kept.tokens.sum(dim=(1, 2))

    with torch.no_grad(), Probe(resnet18, ["layer4.1", "layer1.0"], reduce=reduce) as probe:
        resnet18(images)
    for handle in handles:
        handle.remove()
    # layer4.1 had not run when layer1.0 was reduced.
    assert order == [("layer1.0", ("layer1.0",)), ("layer4.1", ("layer1.0", "layer4.1"))]
    assert list(probe.representations) == ["layer1.0", "layer4.1"]
    for name, output in outputs.items():
        assert pointers[name] == output.data_ptr()
        torch.testing.assert_close(probe.representations[name], output.sum(dim=(1, 2, 3)))


def test_errors_of_reduce_are_raised_also_for_layers_of_a_pattern(resnet18, images):
    def reduce(layer, kept):
        raise RepresentationError(f"no {layer}")

    with (
        torch.no_grad(),
        Probe(resnet18, "layer*", reduce=reduce),
        pytest.raises(RepresentationError, match="no layer1"),
    ):
        resnet18(images)


def test_reduce_may_return_nothing(resnet18, images):
    seen = []
    with (
        torch.no_grad(),
        Probe(resnet18, ["layer1.0", "layer2.0"], reduce=lambda layer, kept: seen.append(layer)) as probe,
    ):
        resnet18(images)
    assert seen == ["layer1.0", "layer2.0"]
    assert probe.representations == {"layer1.0": None, "layer2.0": None}
