"""One pair of images: which location answers to which."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rsm_probe.errors import MatchingError
from rsm_probe.matching.inputs import real_tensor
from rsm_probe.matching.protocol import Match, Matching, matched_sum
from rsm_probe.matching.registry import get_matching


def match(x: Tensor | np.ndarray, y: Tensor | np.ndarray, matching: str | Matching = "optimal") -> Match:
    """Matches the locations of two images by their concept vectors.

    Args:
        x: tokens (S, C).
        y: tokens (T, C).
        matching: a name or a method object.

    Raises:
        MatchingError: wrong shapes, NaN or infinity (the message gives the position), unknown method.
    """
    left, right = _tokens(x, "x"), _tokens(y, "y")
    if left.shape[1] != right.shape[1]:
        raise MatchingError(
            f"x has {left.shape[1]} channels and y has {right.shape[1]}; only vectors of one layer can be matched"
        )
    return match_affinity(left @ right.T, matching)


def match_affinity(affinity: Tensor | np.ndarray, matching: str | Matching = "optimal") -> Match:
    """Matches the rows to the columns of one affinity matrix.

    Args:
        affinity: shape (S, T), any real dtype; inner products of all pairs of locations.
        matching: a name or a method object.

    Raises:
        MatchingError: no matrix, NaN or infinity (the message gives the position), unknown method.
    """
    label, method = get_matching(matching)
    matrix = real_tensor(affinity).cpu().numpy()
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise MatchingError(f"an affinity has shape (S, T) with S, T >= 1, found {matrix.shape}")
    _require_finite(matrix, "affinity")
    partners = method.permutation(matrix)
    status = "optimal" if method.exact else "feasible"
    return Match(partners, matched_sum(matrix, partners), bound=None, solver=label, status=status)


def _tokens(values: Tensor | np.ndarray, name: str) -> Tensor:
    """Tokens in float64: the product of two finite float32 vectors need not be finite in float32."""
    matrix = real_tensor(values).to("cpu", torch.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise MatchingError(f"{name} must hold tokens (S, C) of one image, found shape {tuple(matrix.shape)}")
    _require_finite(matrix.numpy(), name)
    return matrix


def _require_finite(values: np.ndarray, name: str) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        position = ", ".join(map(str, bad[0]))
        raise MatchingError(f"{name}[{position}] is {values[tuple(bad[0])]}; only finite values can be matched")
