"""p-values of many tests, corrected for their number."""

from __future__ import annotations

from typing import Literal

import numpy as np

from rsm_probe.errors import ComparisonError, look_up

Correction = Literal["fdr", "holm"]
_CORRECTIONS = ("fdr", "holm")


def corrected(p: np.ndarray, correction: Correction | None) -> np.ndarray:
    """Correct p-values; NaN stay NaN and do not count.

    Args:
        p: p-values, any shape.
        correction: "fdr" bounds the expected share of wrong ones among those called significant (Benjamini & Hochberg
            1995), "holm" the probability of any wrong one (Holm 1979). None leaves p-values as they are.

    Raises:
        ComparisonError: an unknown correction.
    """
    from scipy.stats import false_discovery_control

    if correction is None:
        return p
    name = look_up(correction, {name: name for name in _CORRECTIONS}, "correction", ComparisonError)
    result, known = np.full(p.shape, np.nan), ~np.isnan(p)
    values = p[known]
    if not values.size:
        return result
    if name == "fdr":
        result[known] = false_discovery_control(np.clip(values, 0.0, 1.0))
        return result
    order = np.argsort(values)
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1.0)
    result[known] = adjusted
    return result
