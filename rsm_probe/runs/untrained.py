"""Untrained twins of models: the same architecture and preprocessing with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from rsm_probe.errors import ModelError
from rsm_probe.sources.models.loaded_model import LoadedModel

# A twin shares a few weights with its trained model, such as fixed position embeddings, but not most of them.
_MOST_SHARED = 0.5


def twin_titles(name: str, seeds: Sequence[int]) -> list[str]:
    """The titles of the untrained twins of a model, one for each seed."""
    title = f"{name}-untrained"
    return [f"{title}-{seed}" for seed in seeds] if len(seeds) > 1 else [title] * len(seeds)


def as_twin(twin: LoadedModel, trained: LoadedModel, source: str) -> LoadedModel:
    """The twin with the preprocessing of the trained model, which in some libraries depends on the weights.

    Args:
        twin: the model that its source made when asked for random weights.
        trained: the trained model.
        source: source of both, for messages.

    Raises:
        ModelError: most of its weights are those of the trained model: the source sets them in any case.
    """
    shared = total = 0
    for one, other in zip(twin.module.parameters(), trained.module.parameters(), strict=False):
        # Biases and scales begin at 0 and 1, and may stay there.
        if one.ndim > 1 and one.shape == other.shape:
            total += one.numel()
            shared += one.numel() if torch.equal(one, other) else 0
    if shared > _MOST_SHARED * total:
        raise ModelError(
            f"{twin.name} cannot have an untrained twin: {source} sets its weights itself, also where random ones are "
            f"asked for; leave out control:, and add a model whose source builds the same network with random weights"
        )
    if twin.prepares_like(trained):
        return twin
    return replace(
        twin,
        preprocess=trained.preprocess,
        default_preprocess=trained.default_preprocess,
        origin="it has random weights and the preprocessing of its trained model; run the study in one process",
    )
