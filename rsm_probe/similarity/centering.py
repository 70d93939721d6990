"""Centring of tokens over images. It is explicit, because the mean per location is not permutation-invariant."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from rsm_probe.checks import brief
from rsm_probe.errors import RepresentationError, did_you_mean

Centering = Literal["location-mean", "channel-mean"]


def check_centering(centering: str | None) -> Centering | None:
    """Return the centring if it is valid.

    Raises:
        RepresentationError: unknown centring; the message lists the known ones.
    """
    known = get_args(Centering)
    if centering is not None and centering not in known:
        raise RepresentationError(
            f"unknown centering {brief(centering)}{did_you_mean(str(centering), known)} (known: None, {known})"
        )
    return centering  # type: ignore[return-value]


def token_mean(tokens: Tensor, centering: Centering) -> Tensor:
    """Compute the mean that a centring subtracts, in float64.

    Args:
        tokens: (N, S, C).
        centering: "location-mean", the mean over images for each location, as in the paper; or "channel-mean", the mean
            over images and locations, which is invariant to permutations of locations.

    Returns:
        Shape (1, S, C) or (1, 1, C), to be subtracted by `subtract_mean`.
    """
    axes = (0,) if centering == "location-mean" else (0, 1)
    return tokens.mean(dim=axes, keepdim=True, dtype=torch.float64)


def subtract_mean(tokens: Tensor, mean: Tensor) -> Tensor:
    """Subtract a mean from `token_mean` from tokens (N, S, C), in the precision of the tokens.

    Raises:
        RepresentationError: the mean has a different number of channels, or one mean per location and a different
            number of locations.
    """
    if mean.shape[-1] != tokens.shape[-1] or mean.shape[1] not in (1, tokens.shape[1]):
        raise RepresentationError(
            f"a mean of shape {tuple(mean.shape)} cannot be subtracted from tokens of shape {tuple(tokens.shape)}; "
            f"use centering='channel-mean' if images differ in their number of locations"
        )
    return tokens - mean.to(tokens.device, tokens.dtype)
