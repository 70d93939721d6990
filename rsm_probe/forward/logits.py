"""Runs a classifier and extracts its logits from the output types of different libraries."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsm_probe.errors import ModelError
from rsm_probe.probe.wrappers import evaluating
from rsm_probe.sources.images.batches import batch_of
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.models.input_dtype import in_dtype_of
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.preprocessing import prepared, takes_frames_first
from rsm_probe.sources.models.reading import Reading


def logits(model: LoadedModel, images: ImageSet, numbers: np.ndarray) -> np.ndarray:
    """Runs a classifier on some images.

    Args:
        model: a classifier whose module returns a tensor, or an object or mapping with `logits` as in transformers.
        images: the image set.
        numbers: indices of n images in the set.

    Returns:
        Logits of shape (n, K) for K classes, or (n, Q, K) for a model that answers Q questions.

    Raises:
        ModelError: the output has a different type or shape.
        ImageError: an image cannot be read.
    """
    if getattr(model.module, "num_classes", None) == 0:
        raise ModelError(f"{model.name} has no classification head (num_classes is 0); its outputs are features")
    batch = prepared(batch_of(images, numbers), model.preprocess, takes_frames_first(model.module))
    with torch.no_grad(), evaluating(model.module):
        output = _tensor(model.module(in_dtype_of(model.module, Reading(), batch.to(model.device))), model.name)
    if output.ndim != 2 or len(output) != len(numbers) or output.shape[1] % model.questions:
        raise ModelError(
            f"{model.name} is not a classifier: for {len(numbers)} images its output has shape {tuple(output.shape)}, "
            "but logits have shape (images, classes)"
        )
    values = output.double().cpu().numpy()
    return values.reshape(len(values), model.questions, -1) if model.questions > 1 else values


def _tensor(output: Any, name: str) -> Tensor:
    part = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", output)
    if not isinstance(part, Tensor):
        raise ModelError(
            f"{name} is not a classifier: its output is a {type(output).__name__} without logits; use a whole model "
            "with a classification head"
        )
    return part
