"""The list of a model's layers."""

import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn

from rsm_probe import Probe
from rsm_probe.errors import LayerError
from rsm_probe.probe.describe import describe_layers
from rsm_probe.probe.layers import block_names


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=7).eval()


def hooks_in(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_layers_of_a_resnet_are_described(resnet18):
    infos, skipped = describe_layers(resnet18, torch.zeros(1, 3, 64, 96))
    found = {info.name: info for info in infos}
    assert skipped == {}
    stage = found["layer2"]
    assert (stage.kind, stage.shape, stage.locations, stage.channels) == ("Sequential", (128, 8, 12), 96, 128)
    assert (stage.grid, stage.prefix, stage.is_block) == ((8, 12), 0, False)
    block = found["layer3.0"]
    assert (block.kind, block.shape, block.grid, block.is_block) == ("BasicBlock", (256, 4, 6), (4, 6), True)
    head = found["fc"]
    assert (head.kind, head.shape, head.locations, head.channels, head.grid) == ("Linear", (7,), 1, 7, None)


def test_layers_come_in_forward_order_with_every_call_of_repeated_ones(resnet18):
    infos, _ = describe_layers(resnet18, torch.zeros(1, 3, 32, 32))
    names = [info.name for info in infos]
    assert names[:4] == ["conv1", "bn1", "relu", "maxpool"]
    assert names[-2:] == ["avgpool", "fc"]
    block = [name for name in names if name.startswith("layer1.0")]
    assert block == [
        "layer1.0.conv1",
        "layer1.0.bn1",
        "layer1.0.relu#0",
        "layer1.0.conv2",
        "layer1.0.bn2",
        "layer1.0.relu#1",
        "layer1.0",
    ]


def test_every_name_listed_can_be_probed(resnet18):
    x = torch.randn(2, 3, 32, 32)
    infos, _ = describe_layers(resnet18, x)
    with torch.no_grad(), Probe(resnet18, [info.name for info in infos]) as probe:
        resnet18(x)
    assert list(probe.representations) == [info.name for info in infos]
    for info in infos:
        assert probe.representations[info.name].tokens.shape[1:] == (info.locations, info.channels)
        assert probe.representations[info.name].grid == info.grid


def test_blocks_listed_are_those_of_the_default_sweep(resnet18):
    infos, _ = describe_layers(resnet18, torch.zeros(1, 3, 32, 32))
    assert [info.name for info in infos if info.is_block] == block_names(resnet18)


def test_prefix_tokens_and_tuple_outputs_are_described():
    model = timm.create_model(
        "vit_small_patch14_reg4_dinov2", depth=1, embed_dim=32, num_heads=2, img_size=56, num_classes=0
    ).eval()
    infos, _ = describe_layers(model, torch.zeros(1, 3, 56, 56))
    block = next(info for info in infos if info.name == "blocks.0")
    assert (block.shape, block.locations, block.prefix, block.grid) == ((21, 32), 16, 5, (4, 4))

    class Pair(nn.Module):
        def forward(self, x):
            return x, None

    infos, _ = describe_layers(nn.Sequential(nn.Conv2d(3, 4, 1), Pair()), torch.zeros(1, 3, 5, 6))
    assert (infos[1].name, infos[1].shape, infos[1].locations, infos[1].channels) == ("1", None, 30, 4)


def test_layers_that_cannot_be_captured_are_listed_with_the_reason_and_without_a_warning():
    class Some(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.idle, self.number = nn.Conv2d(3, 4, 1), nn.Linear(4, 4), Mean()

        def forward(self, x):
            return self.number(self.conv(x))

    class Mean(nn.Module):
        def forward(self, x):
            return x.mean()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        infos, skipped = describe_layers(Some(), torch.zeros(2, 3, 4, 4))
    assert [info.name for info in infos] == ["conv"]
    assert set(skipped) == {"idle", "number"}
    assert "never ran" in skipped["idle"]
    assert "at least (N, C)" in skipped["number"]


def test_model_without_blocks_is_described_too():
    infos, _ = describe_layers(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), torch.zeros(2, 3, 4, 4))
    assert [(info.name, info.is_block) for info in infos] == [("0", False), ("1", False)]


def test_describing_leaves_the_model_as_it_was(resnet18):
    flags = {name: module.training for name, module in resnet18.named_modules()}
    handle = resnet18.layer1.register_forward_hook(lambda *_: None)
    describe_layers(resnet18, torch.zeros(1, 3, 32, 32))
    assert hooks_in(resnet18) == 1
    handle.remove()
    assert {name: module.training for name, module in resnet18.named_modules()} == flags


def test_hooks_are_gone_when_the_example_does_not_fit(resnet18):
    with pytest.raises(LayerError, match=r"does not run on an image of shape \(2, 32, 32\).*--part"):
        describe_layers(resnet18, torch.zeros(1, 2, 32, 32))
    assert hooks_in(resnet18) == 0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scripted_part_is_refused_without_hooks_left_behind():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), torch.jit.script(nn.Sequential(nn.ReLU())))
    with pytest.raises(LayerError, match="scripted"):
        describe_layers(model, torch.zeros(1, 3, 4, 4))
    assert len(model[0]._forward_hooks) == 0
