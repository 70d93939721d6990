"""What a classifier answers to images: its logits, whichever way its library hands them over."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsm_probe.errors import ModelError
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.preprocessing import prepared


@torch.no_grad()
def logits(model: LoadedModel, images: ImageSet, numbers: np.ndarray) -> np.ndarray:
    """The logits of some images, (n, K), or (n, Q, K) of a model that answers Q questions.

    Args:
        model: a classifier whose module gives a tensor, or an object or a mapping with `logits` as transformers' do.
        images: the set.
        numbers: places in it, (n,).

    Raises:
        ModelError: the output is none of these, or has another shape.
        ImageError: an image cannot be read.
    """
    if getattr(model.module, "num_classes", None) == 0:
        raise ModelError(f"{model.name} has no classification head (num_classes is 0); its answers are features")
    raw: list[Any] = [images[int(number)] for number in numbers]
    batch = prepared(raw, model.preprocess, images, numbers).to(model.device)
    training = model.module.training
    try:
        found = _tensor(model.module.eval()(batch), model.name)
    finally:
        model.module.train(training)
    if found.ndim != 2 or len(found) != len(numbers) or found.shape[1] % model.questions:
        raise ModelError(
            f"{model.name} is no classifier: to {len(numbers)} images it answers with shape {tuple(found.shape)}, and "
            "logits have shape (images, classes)"
        )
    values = found.double().cpu().numpy()
    return values.reshape(len(values), model.questions, -1) if model.questions > 1 else values


def _tensor(output: Any, name: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    raise ModelError(
        f"{name} is no classifier: it answers with {type(output).__name__}, which holds no logits; take a model with a "
        "classification head, and not a part of it"
    )
