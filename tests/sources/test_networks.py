"""The networks of recipes: standard depths, narrow and wide, and free ones."""

import pytest
import timm
import torch

from rsm_probe.errors import ConfigError
from rsm_probe.sources.training.networks import ARCHITECTURES, NetworkConfig, build_network


def test_network_has_the_stages_it_was_asked_for():
    module = build_network(NetworkConfig(blocks=(1, 2, 1, 3), widths=(8, 12, 16, 20), stem_stride=1), 7).eval()
    assert [len(getattr(module, f"layer{k}")) for k in range(1, 5)] == [1, 2, 1, 3]
    shapes = {}
    for k in range(1, 5):
        getattr(module, f"layer{k}").register_forward_hook(lambda m, a, o, k=k: shapes.update({k: tuple(o.shape[1:])}))
    with torch.no_grad():
        assert module(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert shapes == {1: (8, 32, 32), 2: (12, 16, 16), 3: (16, 8, 8), 4: (20, 4, 4)}


@pytest.mark.parametrize(("name", "expansion"), [("resnet18", 1), ("resnet34", 1), ("resnet101", 4)])
def test_narrow_networks_of_every_depth(name, expansion):
    module = build_network(NetworkConfig(architecture=name, widths=(4, 4, 8, 16), stem_stride=2), 5).eval()
    shapes = []
    for k in range(1, 5):
        getattr(module, f"layer{k}").register_forward_hook(lambda m, a, o: shapes.append(tuple(o.shape[1:])))
    with torch.no_grad():
        assert module(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    widths = [width * expansion for width in (4, 4, 8, 16)]
    assert shapes == [(width, edge, edge) for width, edge in zip(widths, (16, 8, 4, 2), strict=True)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_full_width_is_the_network_of_the_library_but_for_its_stem(name):
    with torch.device("meta"):
        mine = build_network(NetworkConfig(architecture=name, widths=(64, 128, 256, 512)), 100).state_dict()
        whole = timm.create_model(name, num_classes=100).state_dict()
    assert mine.pop("conv1.weight").shape == (64, 3, 3, 3)
    del whole["conv1.weight"]
    assert {key: tensor.shape for key, tensor in mine.items()} == {key: t.shape for key, t in whole.items()}


def test_architecture_and_other_blocks_contradict_each_other():
    with pytest.raises(ConfigError, match=r"resnet34 has blocks \[3, 4, 6, 3\], not \[2, 2, 2, 2\]; leave out either"):
        NetworkConfig.parse({"architecture": "resnet34", "blocks": [2, 2, 2, 2]})
    with pytest.raises(ConfigError, match=r"architecture: .*'resnet18', 'resnet34' or 'resnet101'"):
        NetworkConfig.parse({"architecture": "resnet50"})


def test_architecture_brings_its_blocks_and_is_read_back():
    config = NetworkConfig.parse({"architecture": "resnet18"})
    assert config.blocks == (2, 2, 2, 2)
    assert NetworkConfig.parse(config.model_dump(mode="json")) == config
    assert NetworkConfig().blocks == (1, 1, 1, 1)


@pytest.mark.parametrize(
    "config",
    [
        NetworkConfig(
            widths=(8, 8, 16, 16), stem_stride=2
        ),  # stages of one width have a shortcut for their stride alone
        NetworkConfig(blocks=(1, 2, 2, 2), widths=(4, 8, 8, 16), narrow_stem=True),
        NetworkConfig(architecture="resnet101", widths=(4, 4, 8, 8)),
    ],
    ids=["narrow", "deep", "bottlenecks"],
)
def test_dilated_stages_answer_the_same_at_the_same_locations(config):
    torch.manual_seed(0)
    # In float64, since what a hundred layers amplify differs from processor to processor in float32.
    plain = build_network(config, 3).eval().double()
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.normal_()
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        expected = plain.forward_features(images)
        for stages in (1, 2):
            dense = build_network(config, 3, stages).eval().double()
            dense.load_state_dict(plain.state_dict())
            found = dense.forward_features(images)
            step = 2**stages
            assert found.shape[-1] == step * expected.shape[-1]
            torch.testing.assert_close(found[:, :, ::step, ::step], expected)


def test_a_narrow_stem_has_the_channels_of_the_first_stage():
    module = build_network(NetworkConfig(widths=(8, 16, 16, 16), narrow_stem=True), 3)
    assert module.conv1.out_channels == 8
    assert module(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(ValueError, match="narrow_stem: is for networks of basic blocks"):
        NetworkConfig(architecture="resnet101", narrow_stem=True)
