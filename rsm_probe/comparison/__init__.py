"""Comparison of RSMs: CKA, RSA and other measures, with intervals. Pure functions of arrays.

Begin with `alignment.py` (CKA) and `measures.py` (all measures by name); `mini_batches.py` compares RSMs over many
mini-batches.
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.comparison.alignment import ESTIMATORS, Estimator, cka, get_estimator, hsic
    from rsm_probe.comparison.correlations import CosineRSA, KendallRSA, PearsonRSA, SpearmanRSA
    from rsm_probe.comparison.features import (
        FEATURE_MEASURES,
        canonical_correlations,
        linear_cka,
        pooled,
        procrustes,
        pwcca,
        sampled,
        svcca,
    )
    from rsm_probe.comparison.grid import compare
    from rsm_probe.comparison.measures import (
        CKA,
        MEASURES,
        BiasedCKA,
        Bures,
        NeighbourJaccard,
        NeighbourRank,
        NormalisedBures,
        NormDifference,
        bures,
        get_measure,
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
    from rsm_probe.comparison.protocol import Invariance, Measure, Properties
    from rsm_probe.comparison.statistics import bootstrap, permutation_test
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "CKA",
    "ESTIMATORS",
    "FEATURE_MEASURES",
    "MEASURES",
    "BiasedCKA",
    "Bures",
    "CosineRSA",
    "Estimator",
    "Invariance",
    "KendallRSA",
    "Measure",
    "NeighbourJaccard",
    "NeighbourRank",
    "NormDifference",
    "NormalisedBures",
    "PearsonRSA",
    "Properties",
    "RsmBatches",
    "SpearmanRSA",
    "bootstrap",
    "bootstrap_batches",
    "bures",
    "canonical_correlations",
    "cka",
    "compare",
    "compare_batches",
    "get_estimator",
    "get_measure",
    "hsic",
    "linear_cka",
    "negative_share",
    "neighbour_overlap",
    "norm_difference",
    "permutation_test",
    "permutation_test_batches",
    "pooled",
    "procrustes",
    "pwcca",
    "rsa",
    "sampled",
    "svcca",
]
