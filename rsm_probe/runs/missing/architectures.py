"""Sizes of models that are not on this machine: their architecture is built without values, and nothing is fetched."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rsm_probe.config import ConfigFolder, read_yaml
from rsm_probe.errors import RsmProbeError
from rsm_probe.probe.layers import resolve
from rsm_probe.runs.missing.data import recipe_file
from rsm_probe.runs.missing.weights import hub_file
from rsm_probe.runs.model_config import ModelConfig
from rsm_probe.sources.models.formats.packaged import PACKAGED
from rsm_probe.sources.models.hub_architectures import HUB_ARCHITECTURES, hub_config, hub_processor
from rsm_probe.sources.training.networks import build_network
from rsm_probe.sources.training.recipe import TrainingConfig

_EDGE = 224


@dataclass(frozen=True)
class LayerShape:
    """The tokens of a layer for one image."""

    name: str
    locations: int
    channels: int


@dataclass(frozen=True)
class ModelSizes:
    """A model without its weights.

    Attributes:
        layers: the layers that are probed; locations may include a class token.
        operations: floating-point operations of a forward pass of one image.
        parameter_bytes: bytes of its weights in float32.
    """

    layers: tuple[LayerShape, ...]
    operations: float
    parameter_bytes: float


# A module whose tensors hold no values, and the edges (H, W) of its images.
_Built = tuple[nn.Module, tuple[int, int]]


def architecture_of(model: ModelConfig, layers: Any, recipes: Path | None = None) -> ModelSizes | None:
    """The architecture of a model; None where it is not known without its files, or does not run without values.

    Args:
        model: the model.
        layers: layers of models without layers of their own.
        recipes: the folder of configurations, which may hold the recipe of a network that is not trained yet.
    """
    # Libraries raise whatever they like of a model that they cannot build or run without values.
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = _built(model, recipes)
            return None if built is None else _measured(*built, model, layers)
    except (RsmProbeError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, OSError, ImportError):
        return None


@cache
def parameter_bytes(source: str) -> float | None:
    """Bytes of the weights of a source in float32; None where they are not known without its files."""
    known = architecture_of(ModelConfig(source=source), [])
    return None if known is None else known.parameter_bytes


def _built(model: ModelConfig, recipes: Path | None) -> _Built | None:
    recipe = model.recipe
    if recipe is None and recipes is not None and (file := recipe_file(model.source or "", recipes)) is not None:
        recipe = TrainingConfig.parse(read_yaml(file), str(file), ConfigFolder.of(file))
    if recipe is not None:
        return build_network(recipe.network, recipe.questions), (recipe.size, recipe.size)
    library, _, title = (model.source or "").partition(":")
    build = _LIBRARIES.get(library)
    if build is None:
        return None
    module, size = build(title)
    if model.preprocess is not None:
        size = (model.size, model.size) if isinstance(model.size, int) else model.size or (_EDGE, _EDGE)
    return module, size


def _measured(module: nn.Module, size: tuple[int, int], model: ModelConfig, layers: Any) -> ModelSizes:
    weights = 4.0 * sum(parameter.numel() for parameter in module.parameters())
    own = model.layers_or(layers) if layers != [] else []
    if not own:
        return ModelSizes((), 0.0, weights)
    part = module.eval().get_submodule(model.part) if model.part else module.eval()
    shapes: dict[str, LayerShape] = {}
    hooks = []
    for selection in resolve(part, own):
        watched = part.get_submodule(selection.module_name)
        hooks.append(watched.register_forward_hook(_noting(shapes, selection.label)))
    try:
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            getattr(part, model.method or "forward")(torch.zeros(1, 3, *size))
    finally:
        for hook in hooks:
            hook.remove()
    return ModelSizes(tuple(shapes.values()), float(counted.get_total_flops()), weights)


def _noting(shapes: dict[str, LayerShape], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def note(module: nn.Module, args: Any, output: Any) -> None:
        if (tensor := _first_tensor(output)) is not None and tensor.ndim in (3, 4):
            _, *sides = tensor.shape
            # Maps are (C, H, W), or (H, W, C) where only that makes them square; sequences are (S, C).
            channels_last = len(sides) == 2 or (sides[0] == sides[1] and sides[1] != sides[2])
            channels = sides[-1] if channels_last else sides[0]
            shapes[name] = LayerShape(name, math.prod(sides) // channels, channels)

    return note


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)


def _torchvision(title: str) -> _Built:
    import torchvision

    weights = torchvision.models.get_model_weights(title).DEFAULT
    crop = getattr(weights.transforms(), "crop_size", [_EDGE])
    return torchvision.models.get_model(title, weights=None), (int(crop[0]), int(crop[-1]))


def _timm(title: str) -> _Built:
    import timm

    known = timm.get_pretrained_cfg(title)
    height, width = (_EDGE, _EDGE) if known is None else known.input_size[-2:]
    return timm.create_model(title, pretrained=False), (height, width)


def _transformers(auto_class: str, title: str) -> _Built:
    import transformers

    folder = Path(title).is_dir()
    if folder or hub_file(title, "config.json") is not None:
        config = transformers.AutoConfig.from_pretrained(title, local_files_only=True)
        processor = transformers.AutoImageProcessor.from_pretrained(title, local_files_only=True)
    elif title in HUB_ARCHITECTURES:
        config, processor = hub_config(title), hub_processor(title)
    else:
        raise LookupError(title)
    with torch.device("cpu"):
        pixels = processor(images=Image.new("RGB", (_EDGE, _EDGE)), return_tensors="pt")["pixel_values"]
    return getattr(transformers, auto_class).from_config(config), tuple(pixels.shape[-2:])


_LIBRARIES: dict[str, Callable[[str], _Built]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": lambda title: _transformers("AutoModel", title),
    "hf-classifier": lambda title: _transformers("AutoModelForImageClassification", title),
    "pretrained": lambda title: _timm(PACKAGED[title].architecture),
}
