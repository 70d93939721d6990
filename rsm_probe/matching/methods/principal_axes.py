"""Principal axes of the locations of every image, by subspace iteration."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_AXES = 4
_ITERATIONS = 3


def principal_axes(tokens: Tensor) -> np.ndarray:
    """Principal axes of each image's locations, times their standard deviations.

    The start is fixed and the iterations are few: axes are good to some percent, which is all that ordering needs.

    Args:
        tokens: (N, S, C), on any device.

    Returns:
        Shape (N, A, C) with A <= 4, float64.
    """
    centred = tokens - tokens.mean(dim=1, keepdim=True)
    channels = centred.shape[2]
    start = torch.randn(channels, min(2 * _AXES, channels), generator=torch.Generator().manual_seed(0))
    basis = start.to(centred).expand(len(centred), -1, -1)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(centred.mT @ (centred @ basis))[0]
    within = (centred @ basis).cpu().double()
    variances, turns = torch.linalg.eigh(within.mT @ within / centred.shape[1])
    axes = basis.cpu().double() @ (turns * variances.clamp(min=0).sqrt()[:, None, :])
    return axes.flip(2)[:, :, :_AXES].mT.numpy()
