"""The models of a study: what can be refused is refused before a network is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from rsm_probe.errors import LayerError
from rsm_probe.probe.probe import Probe
from rsm_probe.probe.layers import Layers
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.training.train import build_network
from rsm_probe.runs.entries import ModelConfig


def check_models(entries: Sequence[ModelConfig], layers: str | Sequence[str], networks: Path) -> dict[str, LoadedModel]:
    """Loads the models that need no training, and looks up the layers of all.

    Args:
        entries: what the configuration says of them.
        layers: of models that name none of their own.
        networks: the folder of trained networks, which is only looked at.

    Returns:
        Those that were loaded, by title.

    Raises:
        LayerError: a layer that a model does not have.
        RsmProbeError: whatever loading raises.
    """
    found: dict[str, LoadedModel] = {}
    for entry in entries:
        if entry.recipe is None:
            models = {title: loaded for title, loaded, _ in entry.load(networks)}
            found |= models
            modules = {title: loaded.module for title, loaded in models.items()}
        else:
            with torch.random.fork_rng(devices=[]):
                modules = {entry.titles()[0]: build_network(entry.recipe.network, 2)}
        for title, module in modules.items():
            try:
                Probe(module, _own(entry, layers))
            except LayerError as error:
                raise LayerError(f"{title}: {error}") from None
    return found


def load_models(
    entries: Sequence[ModelConfig],
    layers: str | Sequence[str],
    networks: Path,
    device: str | None,
    progress: bool,
    known: Mapping[str, LoadedModel],
) -> tuple[dict[str, LoadedModel], dict[str, Layers], dict[str, float]]:
    """The models of a configuration by title, the layers of each, and the accuracies of those trained here.

    Args:
        entries: what the configuration says of them.
        layers: of models that name none of their own.
        networks: the folder of trained networks.
        device: where to train.
        progress: show bars.
        known: those that `check_models` loaded.

    Raises:
        RsmProbeError: whatever training raises.
    """
    models: dict[str, LoadedModel] = {}
    chosen: dict[str, Layers] = {}
    accuracies: dict[str, float] = {}
    for entry in entries:
        if entry.recipe is None:
            models |= {title: known[title] for title in entry.titles()}
        else:
            for title, loaded, accuracy in entry.load(networks, device, progress):
                models[title] = loaded
                if accuracy is not None:
                    accuracies[title] = accuracy
        chosen |= dict.fromkeys(entry.titles(), _own(entry, layers))
    return models, chosen, accuracies


def _own(entry: ModelConfig, layers: str | Sequence[str]) -> Layers:
    own = layers if entry.layers is None else entry.layers
    return own if isinstance(own, str) else list(own)
