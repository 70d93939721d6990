"""Layer specifications: names, globs, regular expressions, "blocks" and "all"."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from rsm_probe import Probe
from rsm_probe.errors import LayerError
from rsm_probe.probe.layers import block_names, resolve

RESNET18_BLOCKS = [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
RESNET50_BLOCKS = [f"layer{s}.{b}" for s, depth in zip(range(1, 5), (3, 4, 6, 3), strict=True) for b in range(depth)]


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    # Names need no weights, so nothing is allocated.
    with torch.device("meta"):
        return torchvision.models.resnet18().eval()


def names_of(model: nn.Module, layers: str | list[str]) -> list[str]:
    return [selection.label for selection in resolve(model, layers)]


def hooks_in(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("layer1.0", ["layer1.0"]),
        ("layer1.0.bn1", ["layer1.0.bn1"]),
        ("layer*", ["layer1", "layer2", "layer3", "layer4"]),
        ("layer?", ["layer1", "layer2", "layer3", "layer4"]),
        ("layer[12]", ["layer1", "layer2"]),
        ("layer[!12]", ["layer3", "layer4"]),
        ("layer1.*", ["layer1.0", "layer1.1"]),
        ("layer*.1", ["layer1.1", "layer2.1", "layer3.1", "layer4.1"]),
        ("layer1.*.bn?", ["layer1.0.bn1", "layer1.0.bn2", "layer1.1.bn1", "layer1.1.bn2"]),
        ("**.downsample", ["layer2.0.downsample", "layer3.0.downsample", "layer4.0.downsample"]),
        ("layer4.**.conv2", ["layer4.0.conv2", "layer4.1.conv2"]),
        ("regex:^layer[12]$", ["layer1", "layer2"]),
        ("regex:downsample$", ["layer2.0.downsample", "layer3.0.downsample", "layer4.0.downsample"]),
        (["fc", "layer1", "conv1"], ["conv1", "layer1", "fc"]),
        (["layer*", "layer1", "regex:^layer2$"], ["layer1", "layer2", "layer3", "layer4"]),
    ],
)
def test_specification_selects_exactly_these_layers(resnet18, layers, expected):
    assert names_of(resnet18, layers) == expected


def test_regex_is_searched_in_the_whole_name_and_reaches_nested_layers(resnet18):
    expected = [name for name, _ in resnet18.named_modules() if name.startswith(("layer1", "layer2"))]
    assert names_of(resnet18, "regex:^layer[12]") == expected
    assert len(expected) > 20


def test_double_star_crosses_dots_and_single_star_does_not(resnet18):
    below = [name for name, _ in resnet18.named_modules() if name.startswith("layer1.")]
    assert names_of(resnet18, "layer1.**") == below
    assert names_of(resnet18, "layer1.*") == [name for name in below if name.count(".") == 1]


@pytest.mark.parametrize("pattern", ["*conv2", "*.conv*", "*conv2[key]"])
def test_a_star_that_meets_dots_is_told_what_crosses_them(resnet18, pattern):
    with pytest.raises(LayerError, match=r"\(\* does not match dots, \*\* does: '") as raised:
        resolve(resnet18, pattern)
    assert resolve(resnet18, str(raised.value).split("does: '")[1].split("'")[0])


def test_a_mistyped_layer_before_a_facet_is_named(resnet18):
    with pytest.raises(LayerError, match=r"no layer matches 'layer1.0.covn1\[key\]'; nearest: 'layer1.0.conv1'"):
        resolve(resnet18, "layer1.0.covn1[key]")


@pytest.mark.parametrize("pattern", ["layer1?0", "layer1[!x]0"])
def test_single_character_wildcards_do_not_cross_dots(resnet18, pattern):
    with pytest.raises(LayerError, match="no layer matches"):
        resolve(resnet18, pattern)


@pytest.mark.parametrize("pattern", ["layer[2-1]", "layer[\\]", "layer1[^x]0", "layer[", "layer[]"])
def test_broken_or_empty_character_class_matches_nothing(resnet18, pattern):
    with pytest.raises(LayerError, match="layer"):
        resolve(resnet18, pattern)


def test_a_caret_is_a_character_like_any_other_in_a_class(resnet18):
    assert names_of(resnet18, "layer[^1]") == ["layer1"]


def test_dots_in_a_glob_are_literal():
    model = nn.ModuleDict({"a": nn.ModuleDict({"b1": nn.Identity()}), "axb1": nn.Identity()})
    assert names_of(model, "a.b*") == ["a.b1"]


def test_all_is_every_module_that_can_be_called(resnet18):
    expected = [name for name, _ in resnet18.named_modules() if name]
    assert names_of(resnet18, "all") == expected


def test_all_and_patterns_leave_out_containers_without_a_forward():
    model = nn.Module()
    model.parts = nn.ModuleList([nn.Linear(2, 2)])
    model.table = nn.ModuleDict({"x": nn.Linear(2, 2)})
    model.stack = nn.Sequential(nn.Linear(2, 2))
    expected = ["parts.0", "table.x", "stack", "stack.0"]
    assert names_of(model, "all") == expected
    assert names_of(model, "**") == expected


def test_call_and_part_are_split_from_the_name(resnet18):
    first, second = resolve(resnet18, ["layer1.0.relu#1", "fc[logits]"])
    assert (first.module_name, first.call, first.key) == ("layer1.0.relu", 1, None)
    assert (second.module_name, second.call, second.key) == ("fc", None, "logits")


def test_named_layers_are_strict_and_matched_ones_are_not(resnet18):
    assert [s.strict for s in resolve(resnet18, ["conv1", "layer*"])] == [True, False, False, False, False]
    assert not any(s.strict for spec in ("blocks", "all", "regex:conv") for s in resolve(resnet18, spec))


@pytest.mark.parametrize("layers", [["layer1", "layer*"], ["layer*", "layer1"], ["blocks", "layer1.0", "layer1"]])
def test_a_layer_that_is_named_stays_strict_beside_a_pattern_that_matches_it(resnet18, layers):
    strict = {s.label: s.strict for s in resolve(resnet18, layers)}
    assert strict["layer1"]
    assert not strict.get("layer2", False)
    assert strict.get("layer1.0", True)


def test_a_shared_module_can_be_named_by_each_of_its_names():
    model = nn.Module()
    model.first = nn.Linear(2, 2)
    model.alias = model.first
    assert names_of(model, "alias") == ["alias"]
    assert names_of(model, ["first", "alias"]) == ["first", "alias"]


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("layer1.O", "'layer1.0'"), ("layr3", "'layer3'"), ("layer4.1.con2", "'layer4.1.conv2'"), ("FC", "no layer 'FC'")],
)
def test_unknown_name_is_answered_with_the_nearest_names_before_any_hook_is_set(resnet18, wrong, near):
    with pytest.raises(LayerError, match=near) as caught:
        Probe(resnet18, ["layer1.0", wrong])
    assert repr(wrong) in str(caught.value)
    assert "ResNet" in str(caught.value)
    assert hooks_in(resnet18) == 0


@pytest.mark.parametrize("pattern", ["encoder*", "regex:^blocks", "layer1.*.attn"])
def test_pattern_without_a_match_names_the_top_level(resnet18, pattern):
    with pytest.raises(LayerError, match=r"no layer matches .*conv1, bn1, relu, maxpool, layer1"):
        Probe(resnet18, pattern)
    assert hooks_in(resnet18) == 0


def test_one_wrong_entry_of_a_list_is_enough_to_refuse(resnet18):
    with pytest.raises(LayerError, match="'layer9'"):
        resolve(resnet18, ["layer1", "layer9"])


def test_broken_regular_expression_is_named(resnet18):
    with pytest.raises(LayerError, match=r"'regex:layer\(' is not a valid regular expression"):
        resolve(resnet18, "regex:layer(")


def test_no_layers_at_all_are_refused(resnet18):
    with pytest.raises(LayerError, match="no layers given"):
        resolve(resnet18, [])


def test_an_error_about_layers_can_be_caught_as_lookup_error(resnet18):
    with pytest.raises(LookupError):
        resolve(resnet18, "nothing")


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (torchvision.models.resnet18, RESNET18_BLOCKS),
        (torchvision.models.resnet50, RESNET50_BLOCKS),
        (torchvision.models.vit_b_16, [f"encoder.layers.encoder_layer_{k}" for k in range(12)]),
        (lambda: timm.create_model("resnet18"), RESNET18_BLOCKS),
        (lambda: timm.create_model("vit_tiny_patch16_224"), [f"blocks.{k}" for k in range(12)]),
        (
            lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 2), num_heads=(1, 2), embed_dim=8),
            ["layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1"],
        ),
    ],
    ids=["tv-resnet18", "tv-resnet50", "tv-vit_b_16", "timm-resnet18", "timm-vit_tiny", "timm-swin"],
)
def test_blocks_are_the_stacked_blocks_in_order(build, expected):
    with torch.device("meta"):
        model = build()
    assert block_names(model) == expected


def test_blocks_of_transformers_models():
    from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

    vit = ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32)
    )
    names = block_names(vit)
    assert len(names) == 3
    assert [type(vit.get_submodule(name)).__name__ for name in names] == ["ViTLayer"] * 3
    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 3], layer_type="basic"))
    assert block_names(resnet) == [f"encoder.stages.{s}.layers.{b}" for s, n in ((0, 2), (1, 3)) for b in range(n)]


@pytest.mark.parametrize(
    ("build", "count"), [(torchvision.models.resnet18, 8), (torchvision.models.resnet50, 16)], ids=["18", "50"]
)
def test_blocks_of_a_resnet_are_captured_in_forward_order(build, count):
    model = build().eval()
    fired: list[str] = []
    expected = RESNET18_BLOCKS if count == 8 else RESNET50_BLOCKS
    handles = [
        model.get_submodule(n).register_forward_hook(lambda m, a, o, n=n: fired.append(n)) for n in reversed(expected)
    ]
    with torch.no_grad(), Probe(model) as probe:
        model(torch.randn(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    assert list(probe.representations) == fired == expected
    assert len(fired) == count


def test_blocks_do_not_depend_on_names():
    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.q = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Unit(), nn.Sequential(Unit(), Unit()), nn.Linear(4, 2))
    assert block_names(model) == ["1", "2.0", "2.1"]


def test_a_wrapped_model_has_the_same_blocks_under_its_prefix():
    wrapper = nn.Module()
    with torch.device("meta"):
        wrapper.backbone = torchvision.models.resnet18()
    assert block_names(wrapper) == [f"backbone.{name}" for name in RESNET18_BLOCKS]


def test_small_units_between_blocks_are_no_blocks():
    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.q = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv2d(64, 2, 1), nn.Conv2d(2, 64, 1)

    # A gate occurs as often as a unit and holds two convolutions, but hardly any parameters.
    assert block_names(nn.Sequential(Unit(), Gate(), Unit(), Gate())) == ["0", "2"]
    # Where there is nothing but gates, they are what the network stacks.
    assert block_names(nn.Sequential(Gate(), Gate())) == ["0", "1"]


def test_squeeze_excitation_units_inside_blocks_are_no_blocks():
    with torch.device("meta"):
        model = torchvision.models.efficientnet_b0()
    names = block_names(model)
    assert len(names) == 16
    assert {type(model.get_submodule(name)).__name__ for name in names} == {"MBConv"}


def test_model_without_blocks_says_to_name_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    with pytest.raises(LayerError, match=r"no default sweep.*name its layers.*0, 1, 2"):
        Probe(model, "blocks")
