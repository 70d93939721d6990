"""Comparison of RSMs: CKA, RSA and other measures, with intervals. Pure functions of arrays.

Begin with `alignment.py` (CKA) and `measures.py` (all measures by name); `mini_batches.py` compares RSMs over many
mini-batches; `features` compares features instead of RSMs.
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.comparison.alignment import ESTIMATORS, Estimator, cka, get_estimator, hsic
    from rsm_probe.comparison.correlations import CosineRSA, KendallRSA, PearsonRSA, SpearmanRSA
    from rsm_probe.comparison.features.encoding import EncodingScores, encoding_scores, ridge_encoding
    from rsm_probe.comparison.features.inputs import pooled, sampled
    from rsm_probe.comparison.features.registry import FEATURE_MEASURES
    from rsm_probe.comparison.features.subspaces import canonical_correlations, linear_cka, procrustes, pwcca, svcca
    from rsm_probe.comparison.grid import RsmKey, compare
    from rsm_probe.comparison.measures import (
        CKA,
        MEASURES,
        BiasedCKA,
        Bures,
        DistanceCorrelation,
        NormalisedBures,
        NormDifference,
        bures,
        cknna,
        distance_correlation,
        get_measure,
        mutual_neighbours,
        negative_share,
        neighbour_overlap,
        norm_difference,
        rsa,
    )
    from rsm_probe.comparison.mini_batches import (
        RsmBatches,
        bootstrap_batches,
        compare_batches,
        permutation_test_batches,
    )
    from rsm_probe.comparison.neighbour_measures import CKNNA, MutualNeighbours, NeighbourJaccard, NeighbourRank
    from rsm_probe.comparison.protocol import Invariance, Measure, Properties
    from rsm_probe.comparison.statistics import bootstrap, permutation_test
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "CKA",
    "CKNNA",
    "ESTIMATORS",
    "FEATURE_MEASURES",
    "MEASURES",
    "BiasedCKA",
    "Bures",
    "CosineRSA",
    "DistanceCorrelation",
    "EncodingScores",
    "Estimator",
    "Invariance",
    "KendallRSA",
    "Measure",
    "MutualNeighbours",
    "NeighbourJaccard",
    "NeighbourRank",
    "NormDifference",
    "NormalisedBures",
    "PearsonRSA",
    "Properties",
    "RsmBatches",
    "RsmKey",
    "SpearmanRSA",
    "bootstrap",
    "bootstrap_batches",
    "bures",
    "canonical_correlations",
    "cka",
    "cknna",
    "compare",
    "compare_batches",
    "distance_correlation",
    "encoding_scores",
    "get_estimator",
    "get_measure",
    "hsic",
    "linear_cka",
    "mutual_neighbours",
    "negative_share",
    "neighbour_overlap",
    "norm_difference",
    "permutation_test",
    "permutation_test_batches",
    "pooled",
    "procrustes",
    "pwcca",
    "ridge_encoding",
    "rsa",
    "sampled",
    "svcca",
]
