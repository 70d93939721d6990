"""Load models by name, or take modules as they are: a module in evaluation mode with its preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from rsm_probe.checks import brief, require_seed, require_text
from rsm_probe.errors import ModelError, did_you_mean
from rsm_probe.probe.layers import Layers
from rsm_probe.probe.representation import Layout
from rsm_probe.sources.models.libraries import LIBRARIES
from rsm_probe.sources.models.loaded_model import LoadedModel, to_tensor
from rsm_probe.sources.models.reading import Forward, Reading
from rsm_probe.sources.models.user_functions import built, function_in
from rsm_probe.sources.models.weights import load_weights


def load_model(
    source: str | Path | nn.Module | LoadedModel | Callable[[], nn.Module],
    weights: str | Path | None = "default",
    name: str = "",
    seed: int | None = None,
    *,
    part: str = "",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    layers: Layers | None = None,
    layouts: Mapping[str, Layout] | None = None,
    forward: Forward | None = None,
    method: str | None = None,
    inputs: str | Sequence[str] | None = None,
    tokens: str | Sequence[str] | None = None,
) -> LoadedModel:
    """Load a model with its preprocessing, in evaluation mode.

    Args:
        source: "torchvision:resnet18", "timm:vit_tiny_patch16_224", "hf:organisation/name" or "hf:" and a local
            folder ("hf-classifier:" for the model with its classification head), a `.safetensors` file that
            `rsm-probe train` wrote, "file.py:function" for your own function that builds a module, that function
            itself, or a module.
        weights: "default" for the library's pretrained weights (files and modules keep their own), None for random
            weights (modules keep their own), or the path of a state dict: a `.safetensors` file, or a PyTorch
            checkpoint that holds only tensors.
        name: the model's name in results; "" derives it from the source.
        seed: seed of random weights; None draws them from PyTorch's global generator.
        part: dotted name of a submodule to use instead of the whole model, such as the image tower of a model that
            also takes text.
        allow_pickle: also read checkpoints that hold more than tensors, which can run any code.
        trust_remote_code: let transformers run the code that comes with a model.
        layers: layers of this model to probe, as in `Probe`; this and what follows is what `sweep` and `capture`
            take for all models, and holds for this one first.
        layouts: how to read outputs of layers, as in `Probe`.
        forward: makes the call from the module and a batch, as in `lambda model, batch: model(batch, timesteps)`.
        method: the method whose calls are forward passes, as in `Probe`.
        inputs: the inputs that hold images, as in `Probe`.
        tokens: "locations", "class", "mean", "max" or "gem", or several of these.

    Returns:
        The model.

    Raises:
        ModelError: the library or model is unknown (the message lists the nearest names), the weights are unavailable
            or do not fit, or the function does not build a module.
    """
    reading = Reading(layers, layouts, method, forward, inputs, tokens)
    if isinstance(source, LoadedModel):
        return replace(source, reading=reading.over(source.reading)) if reading != Reading() else source
    for text, argument in ((name, "name"), (part, "part")):
        require_text(text, argument, ModelError)
    if seed is not None:
        require_seed(seed, "seed", ModelError)
    own_weights = None if weights is None or str(weights) == "default" else Path(str(weights))
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        loaded = _loaded(source, str(weights) == "default", weights is not None, trust_remote_code)
    if own_weights is not None:
        load_weights(loaded.module, own_weights, allow_pickle)
    return replace(loaded, name=name or loaded.name, module=_part(loaded.module, part), reading=reading)


def _loaded(
    source: str | Path | nn.Module | Callable[[], nn.Module], pretrained: bool, trained: bool, trust_remote_code: bool
) -> LoadedModel:
    if isinstance(source, nn.Module):
        return LoadedModel(type(source).__name__, source, to_tensor, default_preprocess=True)
    if callable(source):
        module = built(source, getattr(source, "__name__", type(source).__name__))
        return LoadedModel(type(module).__name__, module, to_tensor, default_preprocess=True)
    if not isinstance(source, str | Path):
        raise ModelError(f"a model must be a name, a path, a module or a function, found {brief(source)}")
    library, _, title = str(source).partition(":")
    if Path(library).suffix == ".py":
        module = built(function_in(Path(library), title), f"{title} in {library}")
        return LoadedModel(title, module, to_tensor, default_preprocess=True)
    if Path(source).suffix == ".safetensors":
        # Lazy: only trained networks need Pydantic.
        from rsm_probe.sources.training.trained_network import load_trained

        return load_trained(source, pretrained=trained)
    if library not in LIBRARIES or not title:
        known = ", ".join(f"'{key}:...'" for key in LIBRARIES)
        raise ModelError(
            f"unrecognised model source {brief(str(source))}; use {known}, 'file.py:function', or the path of a "
            f".safetensors file"
        )
    module, preprocess = LIBRARIES[library](title, pretrained, trust_remote_code)
    return LoadedModel(title.rstrip("/").rsplit("/", 1)[-1], module.eval(), preprocess)


def _part(module: nn.Module, name: str) -> nn.Module:
    if not name:  # scripted modules lack get_submodule
        return module
    try:
        return module.get_submodule(name)
    except AttributeError:
        names = [key for key, _ in module.named_modules() if key]
        raise ModelError(f"{type(module).__name__} has no part {name!r}{did_you_mean(name, names)}") from None
