"""The paper's models on the Hugging Face hub: architecture and preprocessing, for random weights without a network."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_RESNET = {"size": {"shortest_edge": 224}, "crop_pct": 0.875, **_IMAGENET}
_GIANT = {
    "hidden_size": 1536,
    "num_attention_heads": 24,
    "num_hidden_layers": 40,
    "use_swiglu_ffn": True,
    "image_size": 518,
}
_CLASSES = {"num_labels": 1000}
_CROP_224 = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}


@dataclass(frozen=True)
class HubArchitecture:
    """What the hub holds of a model apart from its weights.

    Attributes:
        kind: the `model_type` of transformers.
        processor: the class of transformers that preprocesses its images.
        config: the options that differ from the defaults of this type.
        processing: the options that differ from the defaults of this class.
    """

    kind: str
    processor: str
    config: dict[str, Any] = field(default_factory=dict)
    processing: dict[str, Any] = field(default_factory=dict)


HUB_ARCHITECTURES = {
    "google/bit-50": HubArchitecture("bit", "BitImageProcessor", {}, {**_CROP_224, **_HALF}),
    "openai/clip-vit-base-patch32": HubArchitecture("clip", "CLIPImageProcessor"),
    "CIDAS/clipseg-rd64-refined": HubArchitecture(
        "clipseg",
        "ViTImageProcessor",
        {"vision_config": {"patch_size": 16}, "use_complex_transposed_convolution": True},
        {"size": {"height": 352, "width": 352}, **_IMAGENET},
    ),
    "facebook/dinov2-giant": HubArchitecture(
        "dinov2",
        "BitImageProcessor",
        _GIANT,
        {**_CROP_224, **_IMAGENET},
    ),
    "facebook/sam-vit-base": HubArchitecture("sam", "SamImageProcessor"),
    "microsoft/resnet-18": HubArchitecture(
        "resnet",
        "ConvNextImageProcessor",
        {**_CLASSES, "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"},
        _RESNET,
    ),
    "microsoft/resnet-50": HubArchitecture("resnet", "ConvNextImageProcessor", _CLASSES, _RESNET),
    "microsoft/resnet-101": HubArchitecture(
        "resnet", "ConvNextImageProcessor", {**_CLASSES, "depths": [3, 4, 23, 3]}, _RESNET
    ),
    "facebook/convnextv2-base-1k-224": HubArchitecture(
        "convnextv2",
        "ConvNextImageProcessor",
        {**_CLASSES, "depths": [3, 3, 27, 3], "hidden_sizes": [128, 256, 512, 1024]},
        _RESNET,
    ),
    "google/vit-base-patch16-224": HubArchitecture("vit", "ViTImageProcessor", _CLASSES, _HALF),
    "google/vit-large-patch32-384": HubArchitecture(
        "vit",
        "ViTImageProcessor",
        {
            **_CLASSES,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 32,
        },
        {"size": {"height": 384, "width": 384}, **_HALF},
    ),
    "facebook/dinov2-giant-imagenet1k-1-layer": HubArchitecture(
        "dinov2", "BitImageProcessor", {**_CLASSES, **_GIANT}, {**_CROP_224, **_IMAGENET}
    ),
}


def hub_config(title: str, **options: Any) -> Any:
    """The configuration of one of these models; warns that it does not come from the hub."""
    import transformers

    architecture = HUB_ARCHITECTURES[title]
    warnings.warn(
        f"hf:{title}: the hub cannot be reached and the model is not in its cache, so random weights are drawn for the "
        f"architecture as rsm-probe knows it",
        stacklevel=2,
    )
    return transformers.AutoConfig.for_model(architecture.kind, **{**architecture.config, **options})


def hub_processor(title: str) -> Any:
    """The preprocessing of one of these models."""
    import transformers

    architecture = HUB_ARCHITECTURES[title]
    return getattr(transformers, architecture.processor)(**architecture.processing)
