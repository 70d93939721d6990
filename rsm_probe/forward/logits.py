"""The logits of a classifier, whichever way its library returns them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsm_probe.errors import ModelError
from rsm_probe.probe.wrappers import evaluating
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.preprocessing import prepared


def logits(model: LoadedModel, images: ImageSet, numbers: np.ndarray) -> np.ndarray:
    """Runs a classifier on some images.

    Args:
        model: a classifier whose module returns a tensor, or an object or a mapping with `logits` as transformers' do.
        images: the set.
        numbers: indices of n images in it.

    Returns:
        Shape (n, K), or (n, Q, K) for a model that answers Q questions.

    Raises:
        ModelError: the output is none of these, or has another shape.
        ImageError: an image cannot be read.
    """
    if getattr(model.module, "num_classes", None) == 0:
        raise ModelError(f"{model.name} has no classification head (num_classes is 0); its answers are features")
    batch = prepared([images[int(number)] for number in numbers], model.preprocess, images, numbers)
    with torch.no_grad(), evaluating(model.module):
        output = _tensor(model.module(batch.to(model.device)), model.name)
    if output.ndim != 2 or len(output) != len(numbers) or output.shape[1] % model.questions:
        raise ModelError(
            f"{model.name} is no classifier: to {len(numbers)} images it answers with shape {tuple(output.shape)}, "
            "and logits have shape (images, classes)"
        )
    values = output.double().cpu().numpy()
    return values.reshape(len(values), model.questions, -1) if model.questions > 1 else values


def _tensor(output: Any, name: str) -> Tensor:
    part = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", output)
    if not isinstance(part, Tensor):
        raise ModelError(
            f"{name} is no classifier: it answers with {type(output).__name__}, which holds no logits; take a model "
            "with a classification head, and not a part of it"
        )
    return part
