"""The networks that recipes train: ResNets of standard or custom depth, with a stem for small images."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator
from torch import nn

from rsm_probe.checks import brief
from rsm_probe.config import Config
from rsm_probe.sources.images.limits import in_bytes

# Building 1 000 blocks takes seconds; training 10^9 weights takes 16 GB.
_MOST_BLOCKS = 1000
_MOST_WEIGHTS = 10**9
# Blocks of the four stages. ResNet-101 consists of bottlenecks, whose outputs have four times the channels in `widths`.
ARCHITECTURES = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


class NetworkConfig(Config):
    """A ResNet in four stages with a 3 x 3 stem and no pooling before the first stage.

    Either `architecture` or `blocks` sets the depth. `widths` are the output channels of the basic blocks in each
    stage; the bottlenecks of resnet101 have four times as many.
    """

    architecture: Literal["resnet18", "resnet34", "resnet101"] | None = Field(
        default=None, description="a standard depth; full width is 64, 128, 256, 512"
    )
    blocks: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = Field(
        default=(1, 1, 1, 1), description="basic blocks in each stage; `architecture` sets its own"
    )
    widths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (16, 32, 64, 128)
    stem_stride: Literal[1, 2] = 1
    narrow_stem: bool = Field(default=False, description="give the stem the channels of the first stage instead of 64")
    zero_init_residual: bool = Field(
        default=True, description="initialise blocks as the identity; with false, networks learn scenes faster"
    )

    @model_validator(mode="before")
    @classmethod
    def _blocks_of_the_architecture(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("architecture") in ARCHITECTURES and "blocks" not in data:
            return {**data, "blocks": ARCHITECTURES[data["architecture"]]}
        return data

    @model_validator(mode="after")
    def _no_contradiction(self) -> NetworkConfig:
        if self.architecture is not None and self.blocks != ARCHITECTURES[self.architecture]:
            raise ValueError(
                f"architecture: {self.architecture} has blocks {list(ARCHITECTURES[self.architecture])}, not "
                f"{list(self.blocks)}; leave out either architecture: or blocks:"
            )
        if self.narrow_stem and self.architecture == "resnet101":
            raise ValueError("narrow_stem: is for networks of basic blocks; resnet101 consists of bottlenecks")
        if sum(self.blocks) > _MOST_BLOCKS:
            raise ValueError(f"blocks: {brief(sum(self.blocks))} blocks in total, above the limit of {_MOST_BLOCKS}")
        if self.weights > _MOST_WEIGHTS:
            raise ValueError(
                f"blocks: and widths: give about {brief(self.weights)} weights, above the limit of {_MOST_WEIGHTS}; "
                f"training them would take {in_bytes(16 * self.weights)}"
            )
        return self

    @property
    def weights(self) -> int:
        """Approximate number of weights in the convolutions."""
        deep = self.architecture == "resnet101"
        expansion, total = 4 if deep else 1, 0
        incoming = self.widths[0] if self.narrow_stem else 64
        for count, width in zip(self.blocks, self.widths, strict=True):
            out = expansion * width
            inner = 9 * width**2 + width * out if deep else 9 * width**2
            # The first block of a stage reads the outputs of the previous stage; the others read those of their own.
            read = (1 if deep else 9) * width * (incoming + (count - 1) * out)
            total += incoming * out + count * inner + read
            incoming = out
        return total


def build_network(config: NetworkConfig, outputs: int, dilated: int = 0) -> nn.Module:
    """Build the untrained network: timm's ResNet with a stem for small images.

    Args:
        config: the shape of the network.
        outputs: number of output channels.
        dilated: number of last stages, at most 2, that dilate their convolutions instead of reducing the resolution.
            Weights keep their meaning: each location of the undilated network is among the locations of the dilated
            one, with the same values.
    """
    from timm.models.resnet import BasicBlock, Bottleneck, ResNet

    module = ResNet(
        Bottleneck if config.architecture == "resnet101" else BasicBlock,
        config.blocks,
        num_classes=outputs,
        channels=config.widths,
        zero_init_last=config.zero_init_residual,
    )
    stem = config.widths[0] if config.narrow_stem else 64
    module.conv1 = nn.Conv2d(3, stem, 3, stride=config.stem_stride, padding=1, bias=False)
    nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")
    module.maxpool = nn.Identity()
    if config.narrow_stem:
        module.bn1 = nn.BatchNorm2d(stem)
        first = module.layer1[0]
        first.conv1 = nn.Conv2d(stem, stem, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(first.conv1.weight, mode="fan_out", nonlinearity="relu")
        first.downsample = None
    _dilate([module.layer1, module.layer2, module.layer3, module.layer4][4 - dilated :])
    return module


def _dilate(stages: list[nn.Module]) -> None:
    """Remove the strides of stages, and dilate the convolutions after them accordingly."""
    reach = 1
    for stage in stages:
        for name, conv in list(stage.named_modules()):
            if not isinstance(conv, nn.Conv2d):
                continue
            strided, conv.stride = conv.stride != (1, 1), (1, 1)
            if conv.kernel_size != (1, 1):
                conv.dilation = conv.padding = (reach, reach)
            # A block strides in one of its convolutions and in its shortcut; count the stride once.
            reach *= 2 if strided and "downsample" not in name else 1
