"""Adapters (LoRA and its kin) that were saved without the network that they belong to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rsm_probe.errors import ModelError
from rsm_probe.sources.models.checkpoints import Entry, read_checkpoint

_CONFIGURATION = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_WRAPPED = "base_model.model."
# Names of adapters' weights in PEFT, diffusers and kohya's scripts.
_OF_ADAPTERS = re.compile(r"(^|[._])(lora|loha|lokr|hada|ia3|vera|oft|boft)_\w+")
_UNMERGED = ".base_layer."
_OF_PIPELINES = ("unet.", "transformer.", "text_encoder.", "lora_unet_", "lora_te", "lora_transformer_")
_SHOWN = 3


def adapter_folder(weights: Path) -> Path | None:
    """The folder of an adapter of PEFT: the one given, or that of a file given; None for other weights."""
    folder = weights if isdir(weights) else weights.parent if weights.name in _FILES else None
    return folder if folder is not None and isfile(folder / _CONFIGURATION) else None


def with_adapter(module: nn.Module, folder: Path) -> nn.Module:
    """Merge an adapter into the weights of a module, which keeps the names of its layers.

    Args:
        module: the network that the adapter was trained on, with its weights. It changes.
        folder: what `save_pretrained` of PEFT wrote.

    Raises:
        ModelError: PEFT is not installed, the adapter belongs to another network, or it cannot be merged.
    """
    try:
        import peft
    except ImportError:
        raise ModelError(f"{folder} holds an adapter, which needs the package peft: pip install peft") from None
    file = next((folder / name for name in _FILES if isfile(folder / name)), None)
    if file is None:
        raise ModelError(f"{folder} has {_CONFIGURATION}, but none of {', '.join(_FILES)}")
    stored = {entry.name: entry.value for entry in read_checkpoint(file)}
    kind, layers = type(module).__name__, dict(module.named_modules())
    if foreign := [name for name in stored if not _belongs(name, layers)]:
        raise ModelError(f"the adapter in {folder} does not belong to {kind}, which has no layers for {_some(foreign)}")
    own_call = f"load_model(peft.PeftModel.from_pretrained(model, {str(folder)!r}))"
    flags = {name: part.training for name, part in layers.items()}
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    try:
        wrapped: Any = peft.PeftModel.from_pretrained(module, str(folder))
        taken = peft.get_peft_model_state_dict(wrapped)
    # Adapters fail in many ways on networks that they do not belong to.
    except (AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"the adapter in {folder} does not fit {kind}: {error}") from error
    if different := sorted(taken.keys() ^ stored.keys()):
        raise ModelError(f"the adapter in {folder} does not fit {kind}: {_some(different)} are not in both")
    try:
        merged: nn.Module = wrapped.merge_and_unload()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"the adapter in {folder} cannot be merged into the weights of {kind} ({error}); keep it beside them: "
            f"{own_call}"
        ) from error
    # PEFT freezes all weights, and sets evaluation mode.
    for name, part in merged.named_modules():
        part.training = flags.get(name, False)
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_(name in trained)
    return merged


def refuse_adapter(entries: Sequence[Entry], where: str) -> None:
    """Refuse weights of an adapter that come without its configuration, with what to do about it.

    Raises:
        ModelError: there are such weights.
    """
    names = [entry.name for entry in entries if isinstance(entry.value, Tensor)]
    adapted = [name for name in names if _OF_ADAPTERS.search(name)]
    if not adapted:
        return
    problem = f"{where} holds the weights of an adapter ({_some(adapted)}), but not the scale at which it acts"
    if adapted[0].startswith(_OF_PIPELINES):
        todo = (
            f"load it into its pipeline: pipeline.load_lora_weights({where!r}), then pipeline.fuse_lora() and "
            f"load_model(pipeline.unet), or another part of the pipeline"
        )
    elif any(_UNMERGED in name for name in names):
        todo = (
            f"give it to the adapted network: load_model(peft.get_peft_model(model, config), weights={where!r}), where "
            f"config is that of the training, such as peft.LoraConfig(...)"
        )
    else:
        todo = (
            f"give the folder that its save_pretrained wrote as weights= (with {_CONFIGURATION}), or attach it with "
            f"the configuration of the training: adapted = peft.get_peft_model(model, peft.LoraConfig(...)); "
            f"peft.set_peft_model_state_dict(adapted, {_reading(where)}); load_model(adapted)"
        )
    raise ModelError(f"{problem}; {todo}")


def _reading(where: str) -> str:
    return f"safetensors.torch.load_file({where!r})" if where.endswith(".safetensors") else f"torch.load({where!r})"


def _belongs(name: str, layers: dict[str, nn.Module]) -> bool:
    """Whether a weight of an adapter has a layer of the network in front of its own name."""
    parts = name.removeprefix(_WRAPPED).removeprefix("base_model.").split(".")
    own = next((number for number, part in enumerate(parts) if _OF_ADAPTERS.match(part)), None)
    # Some kinds share weights between all layers.
    return own == 0 or any(".".join(parts[:end]) in layers for end in (range(1, len(parts)) if own is None else [own]))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
