"""Measures that compare features, one vector per image, instead of RSMs.

Begin with `registry.py`, which lists them. `encoding.py` predicts responses; `subspaces.py` compares two
representations.
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.comparison.features.encoding import EncodingScores, encoding_scores, ridge_encoding
    from rsm_probe.comparison.features.inputs import pooled, sampled
    from rsm_probe.comparison.features.registry import FEATURE_MEASURES
    from rsm_probe.comparison.features.subspaces import canonical_correlations, linear_cka, procrustes, pwcca, svcca
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "FEATURE_MEASURES",
    "EncodingScores",
    "canonical_correlations",
    "encoding_scores",
    "linear_cka",
    "pooled",
    "procrustes",
    "pwcca",
    "ridge_encoding",
    "sampled",
    "svcca",
]
