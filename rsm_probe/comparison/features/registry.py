"""Measures of representations, by name."""

from __future__ import annotations

from collections.abc import Callable

from rsm_probe.comparison.features.encoding import ridge_encoding
from rsm_probe.comparison.features.subspaces import linear_cka, procrustes, pwcca, svcca
from rsm_probe.comparison.protocol import Properties

FEATURE_MEASURES: dict[str, tuple[Callable[..., float], Properties]] = {
    "linear_cka": (
        linear_cka,
        Properties("similarity", "as cka", ("rotation", "scale", "shift", "images"), "Kornblith et al. 2019"),
    ),
    "svcca": (svcca, Properties("similarity", "[0, 1]", ("rotation", "scale", "shift", "images"), "Raghu et al. 2017")),
    "pwcca": (
        pwcca,
        Properties("similarity", "[0, 1]", ("scale", "shift", "images"), "Morcos et al. 2018"),
    ),
    "procrustes": (
        procrustes,
        Properties("distance", "[0, sqrt(2)]", ("rotation", "scale", "shift", "images"), "Williams et al. 2021"),
    ),
    "ridge_encoding": (
        ridge_encoding,
        Properties(
            "similarity", "[-1, 1], 0 on average for unrelated responses", ("scale", "shift"), "Naselaris et al. 2011"
        ),
    ),
}
