"""Writes the `forward=` of a model that takes more than a batch of images, by the names of its arguments."""

from __future__ import annotations

import inspect
import re

from torch import nn

# What libraries call the argument that holds images or latents.
_IMAGES = ("pixel_values", "pixel_values_videos", "images", "image", "sample", "hidden_states", "latents", "x")
# Optional arguments that models nevertheless need.
_NEEDED = re.compile(r"(timesteps?|t|sigmas?|class_labels?|y|input_ids|encoder_hidden_states|decoder_input_ids)$")
_NUMBERS = re.compile(r"(timesteps?|t|sigmas?|class_labels?|labels|y)$")
_OF_ANY_SIZE = "interpolate_pos_encoding"
_IMAGE_METHODS = ("get_image_features", "encode_image", "get_vision_features", "get_video_features")


def example_call(module: nn.Module, method: str | None, problem: str) -> str | None:
    """A call of a model with all that it needs, for the message of its error.

    Args:
        module: the model.
        method: the method that is called; None for the model itself.
        problem: the message of the error.

    Returns:
        Python code and what to fill in, or None if the model takes nothing but images.
    """
    name = method or "forward"
    try:
        signature = inspect.signature(getattr(module, name))
    except (TypeError, ValueError):
        return None
    named = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not named:
        return None
    images = next((p for known in _IMAGES for p in named if p.name == known), named[0])
    others = [p for p in named if p is not images]
    needed = [p for p in others if p.default is p.empty] or [p for p in others if _NEEDED.match(p.name)]
    texts = {p.name: "torch.zeros(len(batch), dtype=torch.long)" if _NUMBERS.match(p.name) else p.name for p in needed}
    if re.search(r"image size|input.*size", problem, re.IGNORECASE) and any(p.name == _OF_ANY_SIZE for p in others):
        texts = {_OF_ANY_SIZE: "True"}
    if not texts and images is named[0]:
        return None
    first = "batch" if images is named[0] else f"{images.name}=batch"
    arguments = ", ".join([first, *(f"{key}={text}" for key, text in texts.items())])
    call = f"forward=lambda model, batch: model{'' if method is None else f'.{method}'}({arguments})"
    own = [key for key, text in texts.items() if key == text]
    if own:
        call += f", with {' and '.join(own)} of your own"
    if images is not named[0] and method is None and (able := [m for m in _IMAGE_METHODS if hasattr(module, m)]):
        call += f"; or name the method that takes images alone: method={able[0]!r}"
    return call
