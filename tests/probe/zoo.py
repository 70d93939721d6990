# ruff: noqa: E501
"""Real models, one layer each: what a probe must make of it, and an independent way to the same values.

The table is data for `test_zoo.py` and for the page `docs/reference/tested-models.md`. Models are small or shallow and
have random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Row:
    """One layer of one model.

    Attributes:
        library: "timm", "torchvision" or "transformers".
        family: what the page calls it.
        model: its name in the library.
        layer: the name that a probe takes.
        locations: S.
        channels: C.
        grid: as a probe must find it.
        prefix: number of tokens before the locations.
        build: makes the model.
        inputs: keyword or positional arguments of a forward pass over two images.
        expected: model and inputs -> (prefix and locations, C) of each image in the order of the image, without a probe.
        route: what `expected` relies on.
        remark: for the page.
    """

    library: str
    family: str
    model: str
    layer: str
    locations: int
    channels: int
    grid: tuple[int, ...] | None
    prefix: int
    build: Callable[[], nn.Module]
    inputs: dict[str, Any] | tuple[Any, ...]
    expected: Callable[[nn.Module, Any], Tensor]
    route: str
    remark: str = ""

    def __str__(self) -> str:
        return f"{self.library}-{self.model}-{self.layer}"


def call(model: nn.Module, inputs: Any, **options: Any) -> Any:
    return model(**inputs, **options) if isinstance(inputs, dict) else model(*inputs, **options)


def pictures(size: int, *before: int) -> Tensor:
    return torch.randn(2, *before, 3, size, size, generator=torch.Generator().manual_seed(1))


def in_order(values: Tensor, order: str) -> Tensor:
    """(N, tokens, C) of axes that are named by letters: N, C, and the others in the order of the image."""
    axes = [order.index("N"), *(k for k, axis in enumerate(order) if axis not in "NC"), order.index("C")]
    return values.permute(axes).flatten(1, -2) if values.ndim > 2 else values.unsqueeze(1)


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, **options)

    return build


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **options)

    return build


# timm: `forward_intermediates` gives maps without prefix tokens, in the order of the image.

_TIMM: list[tuple[str, str, dict[str, Any], int, str, int, tuple[int, int, int], int]] = [
    ("ViT", "vit_tiny_patch16_224", {"img_size": 96, "depth": 4}, 96, "blocks.2", 2, (192, 6, 6), 1),
    (
        "DeiT, distilled",
        "deit_tiny_distilled_patch16_224",
        {"img_size": 96, "depth": 4},
        96,
        "blocks.2",
        2,
        (192, 6, 6),
        2,
    ),
    (
        "DINOv2, registers",
        "vit_small_patch14_reg4_dinov2",
        {"img_size": 84, "depth": 3},
        84,
        "blocks.1",
        1,
        (384, 6, 6),
        5,
    ),
    ("DINOv3", "vit_small_patch16_dinov3", {"img_size": 64, "depth": 2}, 64, "blocks.1", 1, (384, 4, 4), 5),
    ("SigLIP", "vit_base_patch16_siglip_224", {"img_size": 64, "depth": 2}, 64, "blocks.1", 1, (768, 4, 4), 0),
    ("EVA-02", "eva02_tiny_patch14_224", {"img_size": 84, "depth": 3}, 84, "blocks.1", 1, (192, 6, 6), 1),
    ("BEiT", "beit_base_patch16_224", {"img_size": 64, "depth": 2}, 64, "blocks.1", 1, (768, 4, 4), 1),
    ("SAM", "samvit_base_patch16", {"img_size": 64, "depth": 3}, 64, "blocks.1", 1, (768, 4, 4), 0),
    ("CaiT", "cait_xxs24_224", {"img_size": 96, "depth": 3}, 96, "blocks.1", 1, (192, 6, 6), 0),
    ("XCiT", "xcit_nano_12_p16_224", {"depth": 3}, 96, "blocks.1", 1, (128, 6, 6), 0),
    ("ConViT", "convit_tiny", {"img_size": 96, "depth": 4}, 96, "blocks.2", 2, (192, 6, 6), 0),
    ("Swin", "swin_tiny_patch4_window7_224", {"depths": (2, 2, 2, 2)}, 224, "layers.2.blocks.1", 2, (384, 14, 14), 0),
    ("MLP-Mixer", "mixer_s16_224", {"img_size": 96}, 96, "blocks.4", 4, (512, 6, 6), 0),
    ("gMLP", "gmlp_ti16_224", {"img_size": 96}, 96, "blocks.15", 15, (128, 6, 6), 0),
    ("ResMLP", "resmlp_12_224", {"img_size": 96}, 96, "blocks.6", 6, (384, 6, 6), 0),
    ("Hiera", "hiera_tiny_224", {}, 224, "blocks.9", 2, (384, 14, 14), 0),
    ("PiT", "pit_ti_224", {}, 224, "transformers.1.blocks.5", 1, (128, 14, 14), 1),
    ("TNT", "tnt_s_legacy_patch16_224", {"img_size": 96, "depth": 3}, 96, "blocks.1", 1, (384, 6, 6), 1),
    ("CoaT", "coat_lite_tiny", {"img_size": 96}, 96, "serial_blocks3.1", 2, (256, 6, 6), 1),
    ("CrossViT", "crossvit_tiny_240", {}, 240, "blocks.0.blocks.1.3", 3, (192, 14, 14), 1),
    ("VOLO", "volo_d1_224", {}, 224, "network.3.7", 2, (384, 14, 14), 0),
    ("PVTv2", "pvt_v2_b0", {}, 96, "stages.2.norm", 2, (160, 6, 6), 0),
    ("Twins", "twins_svt_small", {}, 224, "blocks.2.9", 2, (256, 14, 14), 0),
    ("MViTv2", "mvitv2_tiny", {}, 224, "stages.2.blocks.4", 2, (384, 14, 14), 0),
    ("NesT", "nest_tiny", {}, 224, "levels.1.transformer_encoder.1", 1, (192, 28, 28), 0),
    ("GC ViT", "gcvit_xxtiny", {}, 224, "stages.2.blocks.5", 2, (256, 14, 14), 0),
    ("Sequencer2D", "sequencer2d_s", {}, 224, "stages.2.blocks.7", 2, (384, 16, 16), 0),
    ("TinyViT", "tiny_vit_5m_224", {}, 224, "stages.2.blocks.5", 2, (160, 14, 14), 0),
    ("NaFlexViT", "naflexvit_base_patch16_gap", {}, 224, "blocks.6", 6, (768, 14, 14), 4),
    ("ResNet", "resnet18", {}, 96, "layer2.0", 2, (128, 12, 12), 0),
    ("ConvNeXtV2", "convnextv2_atto", {}, 96, "stages.2.blocks.5", 2, (160, 6, 6), 0),
    ("InceptionNeXt", "inception_next_atto", {}, 96, "stages.1.blocks.1", 1, (80, 12, 12), 0),
    ("EfficientNet", "efficientnet_b0", {}, 96, "blocks.2.1", 2, (40, 12, 12), 0),
    ("MobileNetV3", "mobilenetv3_small_100", {}, 96, "blocks.1.1", 2, (24, 12, 12), 0),
    ("GhostNet", "ghostnet_100", {}, 96, "blocks.3.0", 2, (40, 12, 12), 0),
    ("RegNetY", "regnety_002", {}, 96, "s2.b1", 2, (56, 12, 12), 0),
    ("DenseNet", "densenet121", {}, 96, "features.denseblock2", 2, (512, 12, 12), 0),
    ("MaxViT", "maxvit_tiny_tf_224", {}, 224, "stages.1.blocks.1.attn_grid", 2, (128, 28, 28), 0),
    ("CoAtNet", "coatnet_pico_rw_224", {}, 224, "stages.1.blocks.2", 2, (128, 28, 28), 0),
    ("PoolFormer", "poolformer_s12", {}, 96, "stages.2.blocks.5", 2, (320, 6, 6), 0),
    ("CAFormer", "caformer_s18", {}, 96, "stages.2.blocks.8", 2, (320, 6, 6), 0),
    ("FocalNet", "focalnet_tiny_srf", {}, 96, "layers.2.blocks.5", 2, (384, 6, 6), 0),
    ("DaViT", "davit_tiny", {}, 96, "stages.2.blocks.2.1", 2, (384, 6, 6), 0),
    ("HRNet", "hrnet_w18_small", {}, 96, "incre_modules.1.0", 2, (256, 12, 12), 0),
    ("EfficientFormer", "efficientformer_l1", {}, 224, "stages.2.blocks.5", 2, (224, 14, 14), 0),
    ("MobileViT", "mobilevit_xxs", {}, 96, "stages.2.1", 2, (48, 12, 12), 0),
    ("MobileViTV2", "mobilevitv2_050", {}, 96, "stages.2.1", 2, (128, 12, 12), 0),
    ("Inception", "inception_v3", {}, 150, "Mixed_5d", 2, (288, 16, 16), 0),
    ("StarNet", "starnet_s1", {}, 96, "stages.2.8", 2, (96, 6, 6), 0),
    ("MambaOut", "mambaout_femto", {}, 96, "stages.2.blocks.8", 2, (192, 6, 6), 0),
]


def _timm_row(
    family: str,
    name: str,
    options: dict[str, Any],
    size: int,
    layer: str,
    index: int,
    shape: tuple[int, int, int],
    prefix: int,
) -> Row:
    def expected(model: nn.Module, inputs: Any) -> Tensor:
        # With the prefix, where the model gives it: (N, C, H, W), or that and (N, P, C).
        options = {"indices": [index], "intermediates_only": True, "norm": False}
        if not prefix:
            return in_order(model.forward_intermediates(*inputs, **options)[0], "NCHW")
        try:
            maps, before = model.forward_intermediates(*inputs, **options, return_prefix_tokens=True)[0]
        except (TypeError, ValueError):
            return in_order(model.forward_intermediates(*inputs, **options)[0], "NCHW")
        return torch.cat([before, in_order(maps, "NCHW")], 1)

    channels, *grid = shape
    remark = {
        "CaiT": "declares a prefix token that its blocks do not hold",
        "XCiT": "the same",
        "ConViT": "the last two blocks hold a prefix token",
        "Hiera": "units of the mask are put back in the order of the image",
    }.get(family, "")
    return Row("timm", family, name, layer, grid[0] * grid[1], channels, (grid[0], grid[1]), prefix, _timm(name, **options), (pictures(size),), expected, "forward_intermediates", remark)  # fmt: skip


# torchvision: its feature extraction, of layers that no later operation overwrites.

_TORCHVISION: list[tuple[str, str, dict[str, Any], int, str, str, str, int, int, tuple[int, ...] | None, int]] = [
    ("ResNet", "resnet50", {}, 64, "layer2.0", "layer2.0.relu_2", "NCHW", 64, 512, (8, 8), 0),
    ("ResNet", "resnet18", {}, 64, "avgpool", "avgpool", "NCHW", 1, 512, (1, 1), 0),
    ("ViT", "vit_b_16", {"image_size": 64}, 64, "encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_1.add_1", "NTC", 16, 768, (4, 4), 1),
    ("Swin", "swin_t", {}, 64, "features.3.1", "features.3.1.add_1", "NHWC", 64, 192, (8, 8), 0),
    ("Swin", "swin_t", {}, 96, "features.1.1.attn", "features.1.1.attn", "NHWC", 576, 96, (24, 24), 0),
    ("SwinV2", "swin_v2_t", {}, 64, "features.3.1", "features.3.1.add_1", "NHWC", 64, 192, (8, 8), 0),
    ("ConvNeXt", "convnext_tiny", {}, 64, "features.3.1", "features.3.1.add", "NCHW", 64, 192, (8, 8), 0),
    ("EfficientNet", "efficientnet_b0", {}, 64, "features.3.0", "features.3.0.block.3", "NCHW", 64, 40, (8, 8), 0),
    ("MobileNetV3", "mobilenet_v3_small", {}, 64, "features.1", "features.1.block.2", "NCHW", 256, 16, (16, 16), 0),
    ("RegNetY", "regnet_y_400mf", {}, 64, "trunk_output.block2.block2-0", "trunk_output.block2.block2-0.activation", "NCHW", 64, 104, (8, 8), 0),
    ("SqueezeNet", "squeezenet1_0", {}, 64, "features.4", "features.4.cat", "NCHW", 196, 128, (14, 14), 0),
    ("ShuffleNetV2", "shufflenet_v2_x0_5", {}, 64, "stage2.1", "stage2.1.view_1", "NCHW", 64, 48, (8, 8), 0),
    ("GoogLeNet", "googlenet", {"aux_logits": False, "init_weights": True}, 64, "inception4a", "inception4a.cat", "NCHW", 16, 512, (4, 4), 0),
    ("VGG", "vgg11", {"num_classes": 10}, 64, "features.10", "features.10", "NCHW", 64, 256, (8, 8), 0),
    ("R3D", "r3d_18", {}, 32, "layer2.0", "layer2.0.relu", "NCTHW", 128, 128, (2, 8, 8), 0),
    ("Video Swin", "swin3d_t", {}, 64, "features.0.0", "features.0.0.add_1", "NTHWC", 512, 96, (2, 16, 16), 0),
]  # fmt: skip


def _torchvision_row(
    family: str, name: str, options: dict[str, Any], size: int, layer: str, node: str, order: str, locations: int, channels: int, grid: tuple[int, ...] | None, prefix: int
) -> Row:  # fmt: skip
    def expected(model: nn.Module, inputs: Any) -> Tensor:
        from torchvision.models.feature_extraction import create_feature_extractor

        return in_order(create_feature_extractor(model, {node: "out"})(*inputs)["out"], order)

    videos = order in ("NCTHW", "NTHWC")
    images = torch.randn(2, 3, 4, size, size, generator=torch.Generator().manual_seed(1)) if videos else pictures(size)
    return Row("torchvision", family, name, layer, locations, channels, grid, prefix, _torchvision(name, **options), (images,), expected, "feature extraction")  # fmt: skip


# transformers: hidden states, which hold the prefix tokens, and maps where the model gives maps.

_SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
_TOWERS = {
    "vision_config": {**_SMALL, "image_size": 64, "patch_size": 16},
    "text_config": {**_SMALL, "vocab_size": 100, "max_position_embeddings": 16},
}
_STAGES = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 24, 32]}
_PYRAMID = {**_STAGES, "num_attention_heads": [1, 2, 3, 4]}


@dataclass(frozen=True)
class _HF:
    family: str
    model: str
    config: dict[str, Any]
    layer: str
    state: int
    locations: int
    channels: int
    grid: tuple[int, ...] | None
    prefix: int = 0
    order: str = "NTC"
    inputs: dict[str, Any] = field(default_factory=lambda: {"pixel_values": pictures(64)})
    states: str = "hidden_states"
    remark: str = ""


_TEXT = {"input_ids": torch.arange(16).view(2, 8), "pixel_values": pictures(64)}
_TRANSFORMERS = [
    _HF("ViT", "ViTModel", {**_SMALL, "image_size": 64}, "layers.1", 2, 16, 32, (4, 4), 1),
    _HF("DeiT", "DeiTModel", {**_SMALL, "image_size": 64}, "layers.1", 2, 16, 32, (4, 4), 2),
    _HF("BEiT", "BeitModel", {**_SMALL, "image_size": 64}, "layers.1", 2, 16, 32, (4, 4), 1),
    _HF("DINOv2", "Dinov2Model", {**_SMALL, "image_size": 70, "patch_size": 14}, "encoder.layer.1", 2, 49, 32, (7, 7), 1, inputs={"pixel_values": pictures(98)}, remark="at another image size than the model's"),
    _HF("DINOv2, registers", "Dinov2WithRegistersModel", {**_SMALL, "image_size": 70, "patch_size": 14}, "encoder.layer.1", 2, 25, 32, (5, 5), 5, inputs={"pixel_values": pictures(70)}),
    _HF("DINOv3", "DINOv3ViTModel", {**_SMALL, "image_size": 64, "num_register_tokens": 4}, "model.layer.1", 2, 16, 32, (4, 4), 5),
    _HF("I-JEPA", "IJepaModel", {**_SMALL, "image_size": 64, "patch_size": 16}, "layers.1", 2, 16, 32, (4, 4)),
    _HF("CLIP", "CLIPVisionModel", {**_SMALL, "image_size": 64, "patch_size": 16}, "encoder.layers.1", 2, 16, 32, (4, 4), 1),
    _HF("CLIP", "CLIPModel", _TOWERS, "vision_model.encoder.layers.1", 2, 16, 32, (4, 4), 1, inputs=_TEXT, states="vision_model_output.hidden_states", remark="its text tower is left out"),
    _HF("CLIPSeg", "CLIPSegForImageSegmentation", {**_TOWERS, "extract_layers": [0, 1, 2], "reduce_dim": 16, "decoder_num_attention_heads": 4, "decoder_intermediate_size": 32}, "decoder.layers.1", 2, 16, 16, (4, 4), 1, inputs=_TEXT, states="decoder_output.hidden_states"),
    _HF("SigLIP", "SiglipVisionModel", {**_SMALL, "image_size": 64, "patch_size": 16}, "encoder.layers.1", 2, 16, 32, (4, 4)),
    _HF("SigLIP2", "Siglip2VisionModel", {**_SMALL, "num_patches": 16, "patch_size": 16}, "encoder.layers.1", 2, 16, 32, (2, 8), inputs={"pixel_values": torch.randn(2, 16, 768), "pixel_attention_mask": torch.ones(2, 16), "spatial_shapes": torch.tensor([[2, 8], [2, 8]])}, remark="patches come with their grid"),
    _HF("Swin", "SwinModel", {"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}, "encoder.layers.1.blocks.1", 2, 64, 32, (8, 8)),
    _HF("SegFormer", "SegformerModel", _PYRAMID, "stages.2", 2, 16, 24, (4, 4), 0, "NCHW"),
    _HF("PVT", "PvtModel", {**_PYRAMID, "image_size": 64}, "encoder.block.2.1", 3, 16, 24, (4, 4), 0),
    _HF("PVTv2", "PvtV2Model", {**_PYRAMID, "image_size": 64}, "encoder.layers.2", 2, 16, 24, (4, 4), 0, "NCHW"),
    _HF("ConvNeXtV2", "ConvNextV2Model", _STAGES, "encoder.stages.2.layers.1", 3, 16, 24, (4, 4), 0, "NCHW"),
    _HF("ResNet", "ResNetModel", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"}, "encoder.stages.1.layers.1", 2, 64, 16, (8, 8), 0, "NCHW"),
    _HF("BiT", "BitModel", {"embedding_size": 8, "hidden_sizes": [32, 64], "depths": [2, 2], "num_groups": 4, "global_padding": "same"}, "encoder.stages.0.layers.1", 1, 225, 32, (15, 15), 0, "NCHW"),
    _HF("Hiera", "HieraModel", {"embed_dim": 16, "image_size": [64, 64], "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]}, "encoder.stages.1.layers.0", 2, 64, 32, (8, 8), 0, "NHWC", states="reshaped_hidden_states", remark="units of the mask are put back in the order of the image"),
    _HF("VideoMAE", "VideoMAEModel", {**_SMALL, "image_size": 32, "patch_size": 16, "num_frames": 4}, "encoder.layer.1", 2, 8, 32, (2, 2, 2), inputs={"pixel_values": pictures(32, 4)}),
    _HF("ViViT", "VivitModel", {**_SMALL, "image_size": 32, "num_frames": 4, "tubelet_size": [2, 16, 16]}, "layers.1", 2, 8, 32, (2, 2, 2), 1, inputs={"pixel_values": pictures(32, 4)}),
    _HF("MobileViT", "MobileViTModel", {"initializer_range": 0.3}, "encoder.layer.2", 2, 64, 96, (8, 8), 0, "NCHW"),
    _HF("DPT", "DPTModel", {**_SMALL, "image_size": 64, "patch_size": 16}, "encoder.layer.1", 2, 16, 32, (4, 4), 1),
    _HF("ViTDet", "VitDetModel", {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 64, "patch_size": 16, "window_size": 2, "window_block_indices": [0]}, "encoder.layer.1", 2, 16, 32, (4, 4), 0, "NCHW"),
]  # fmt: skip


def hf_model(name: str, config: dict[str, Any]) -> nn.Module:
    import transformers

    cls = getattr(transformers, name)
    return cls(cls.config_class(**config))


def _transformers_row(row: _HF) -> Row:
    def expected(model: nn.Module, inputs: Any) -> Tensor:
        found = call(model, inputs, output_hidden_states=True)
        for part in row.states.split("."):
            found = getattr(found, part)
        return in_order(found[row.state], row.order)

    return Row("transformers", row.family, row.model, row.layer, row.locations, row.channels, row.grid, row.prefix, lambda: hf_model(row.model, row.config), row.inputs, expected, row.states.rpartition(".")[2], row.remark)  # fmt: skip


# By hand, where a layer is overwritten later, mixes locations, or sees windows.


def _before_the_relu(model: Any, inputs: Any) -> Tensor:
    x = model.maxpool(torch.relu(model.bn1(model.conv1(*inputs))))
    block = model.layer1[0]
    return in_order(block.bn1(block.conv1(x)), "NCHW")


def _mixed_tokens(model: Any, inputs: Any) -> Tensor:
    block = model.blocks[0]
    return in_order(block.mlp_tokens(block.norm1(model.stem(*inputs)).transpose(1, 2)), "NCT")


def _shifted_windows(model: Any, inputs: Any) -> Tensor:
    first, second = model.layers[0].blocks
    return in_order(second._attn(second.norm1(first(model.patch_embed(*inputs)))), "NHWC")


_BY_HAND = [
    Row("torchvision", "ResNet", "resnet18", "layer1.0.bn1", 256, 64, (16, 16), 0, _torchvision("resnet18"), (pictures(64),), _before_the_relu, "a forward pass by hand", "overwritten by the ReLU"),
    Row("torchvision", "DenseNet", "densenet121", "features", 4, 1024, (2, 2), 0, _torchvision("densenet121"), (pictures(64),), lambda model, inputs: in_order(model.features(*inputs), "NCHW"), "a forward pass by hand", "overwritten by the ReLU"),
    Row("timm", "MLP-Mixer", "mixer_s16_224", "blocks.0.mlp_tokens", 16, 512, (4, 4), 0, _timm("mixer_s16_224", img_size=64), (pictures(64),), _mixed_tokens, "a forward pass by hand", "channels first"),
    Row("timm", "Swin", "swin_tiny_patch4_window7_224", "layers.0.blocks.1.attn", 3136, 96, (56, 56), 0, _timm("swin_tiny_patch4_window7_224", depths=(2,), num_heads=(3,)), (pictures(224),), _shifted_windows, "a forward pass by hand", "shifted windows are put back in the order of the image"),
]  # fmt: skip


ROWS = [
    *(_timm_row(*row) for row in _TIMM),
    *(_torchvision_row(*row) for row in _TORCHVISION),
    *(_transformers_row(row) for row in _TRANSFORMERS),
    *_BY_HAND,
]


@dataclass(frozen=True)
class Refused:
    """A layer that no probe reads without being told how.

    Attributes:
        library: as in `Row`.
        model: as in `Row`.
        layer: as in `Row`.
        build: as in `Row`.
        inputs: as in `Row`.
        error: part of the message.
        why: for the page.
        way_out: for the page.
    """

    library: str
    model: str
    layer: str
    build: Callable[[], nn.Module]
    inputs: dict[str, Any] | tuple[Any, ...]
    error: str
    why: str
    way_out: str


def _detr() -> nn.Module:
    import transformers

    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    return hf_model(
        "DetrModel",
        {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": backbone,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "num_queries": 16,
        },
    )


REFUSED = [
    Refused("transformers", "ViTMAEModel", "layers.1", lambda: hf_model("ViTMAEModel", {**_SMALL, "image_size": 64}), {"pixel_values": pictures(64)}, "stand for different locations in each image", "three quarters of the tokens are dropped at random, different ones in every image", "`mask_ratio=0`: then the shuffled tokens are put back in the order of the image"),
    Refused("transformers", "DetrModel", "decoder.layers.0", _detr, {"pixel_values": pictures(64)}, "no image location", "queries stand for objects, not for locations", "`layouts={'decoder.layers.0': 'NTC'}` takes them as they are, without a grid"),
    Refused("transformers", "CLIPModel", "text_model.encoder.layers.1", lambda: hf_model("CLIPModel", _TOWERS), _TEXT, "does not depend on the images", "the text tower sees no image", "probe `vision_model`"),
    Refused("timm", "mixer_s16_224", "blocks.0.mlp_tokens.fc1", _timm("mixer_s16_224", img_size=64), (pictures(64),), "combines all locations", "each value joins all locations, and their number has changed", "probe `mlp_tokens`, which is read like its input"),
    Refused("timm", "samvit_base_patch16", "blocks.0.attn.q_norm", _timm("samvit_base_patch16", img_size=64, depth=1), (pictures(64),), "several vectors share a location", "heads are folded into the batch: each location has one vector per head", "probe `attn`"),
    Refused("timm", "convit_tiny", "blocks.0.attn.pos_proj", _timm("convit_tiny", img_size=64, depth=1), (pictures(64),), "does not depend on the images", "a table of positions is the same for all images", "probe `attn`"),
    Refused("torchvision", "vit_b_16", "encoder.layers.encoder_layer_0.self_attention.out_proj", _torchvision("vit_b_16", image_size=64), (pictures(64),), "never ran", "its weights are used without calling it", "probe `self_attention`"),
]  # fmt: skip
