"""Load models of torchvision, timm and transformers with their preprocessing; libraries are imported on first use."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from os.path import isdir
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from rsm_probe.errors import ModelError, did_you_mean
from rsm_probe.sources.images.pixels import to_rgb
from rsm_probe.sources.models.weights import fetched

Preprocess = Callable[[Image.Image], Tensor]


class Library(Protocol):
    """A function that loads the models of a library."""

    def __call__(self, title: str, pretrained: bool, trust_remote_code: bool) -> tuple[nn.Module, Preprocess]:
        """Load a model with pretrained or random weights; return it with its preprocessing."""


def _torchvision(title: str, pretrained: bool, trust_remote_code: bool) -> tuple[nn.Module, Preprocess]:
    import torchvision

    try:
        weights = torchvision.models.get_model_weights(title).DEFAULT
    except ValueError:
        names = torchvision.models.list_models()
        raise ModelError(f"torchvision has no model {title!r}{did_you_mean(title, names)}") from None
    options: dict[str, Any] = {"weights": weights if pretrained else None}
    # By default, detectors and segmenters fetch a pretrained backbone.
    builder = inspect.signature(torchvision.models.get_model_builder(title))
    if not pretrained and "weights_backbone" in builder.parameters:
        options["weights_backbone"] = None
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    module = fetched(
        f"torchvision:{title}", lambda: torchvision.models.get_model(title, **options), f"{weights.url} into {cache}"
    )
    transform = weights.transforms()
    return module, lambda image: transform(to_rgb(image))


def _timm(title: str, pretrained: bool, trust_remote_code: bool) -> tuple[nn.Module, Preprocess]:
    import timm

    if not timm.is_model(title):
        raise ModelError(f"timm has no model {title!r}{did_you_mean(title, timm.list_models())}")
    known = timm.get_pretrained_cfg(title)
    repository = known.hf_hub_id if known is not None else None
    instructions = _hub_instructions(repository) if repository else ""
    module = fetched(
        f"timm:{title}", lambda: timm.create_model(title, pretrained=pretrained), instructions, hub=pretrained
    )
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(module), is_training=False)
    return module, lambda image: transform(to_rgb(image))


def _transformers(
    auto_class: str, title: str, pretrained: bool, trust_remote_code: bool
) -> tuple[nn.Module, Preprocess]:
    """Load a model through one of the `Auto...` classes of transformers."""
    import transformers

    auto, local = getattr(transformers, auto_class), isdir(title)
    if not local and (title.startswith((".", "/", "~")) or title.count("/") > 1):
        raise ModelError(f"no folder at {title}; write a model of the hub as hf:organisation/name")

    def build() -> nn.Module:
        if pretrained:
            return auto.from_pretrained(title, trust_remote_code=trust_remote_code, use_safetensors=True)
        config = transformers.AutoConfig.from_pretrained(title, trust_remote_code=trust_remote_code)
        return auto.from_config(config, trust_remote_code=trust_remote_code)

    instructions = "" if local else _hub_instructions(title)
    # Even random weights need the configuration and the preprocessing.
    module = fetched(
        f"hf:{title}", build, instructions, random_weights=pretrained and local, local=local, hub=not local
    )
    processor = fetched(
        f"hf:{title}",
        lambda: transformers.AutoImageProcessor.from_pretrained(title, trust_remote_code=trust_remote_code),
        instructions,
        random_weights=False,
        local=local,
        hub=not local,
    )

    if not trust_remote_code:
        _warn_of_other_code(title, auto_class, module.config, "model")
        _warn_of_other_code(title, "AutoImageProcessor", processor, "preprocessing")

    def preprocess(image: Image.Image) -> Tensor:
        return processor(images=to_rgb(image), return_tensors="pt")["pixel_values"][0]

    return module, preprocess


def _warn_of_other_code(title: str, key: str, holder: Any, what: str) -> None:
    """Warn if transformers uses its own code for a model that comes with code."""
    named = getattr(holder, "auto_map", None)
    if isinstance(named, dict) and key in named:
        warnings.warn(
            f"hf:{title} comes with its own Python code for its {what}, which is not run; the code of transformers for "
            f"this type of model is used instead; if you trust the model's code, set trust_remote_code=True",
            stacklevel=2,
        )


def _hub_instructions(repository: str) -> str:
    from huggingface_hub import constants

    return f"`hf download {repository}`, and put the files in {constants.HF_HUB_CACHE}"


LIBRARIES: dict[str, Library] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": partial(_transformers, "AutoModel"),
    "hf-classifier": partial(_transformers, "AutoModelForImageClassification"),  # with the classification head
}
