"""Similarity of images: the RSM, kernels and centring.

Begin with `rsm.py`; `kernels.py` turns matched inner products into similarities.
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.similarity.centering import Centering
    from rsm_probe.similarity.kernels import RBF, Cosine, Kernel, Linear, get_kernel, kernel_names
    from rsm_probe.similarity.rsm import RSM
    from rsm_probe.similarity.rsms import RSMs
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "RBF",
    "RSM",
    "Centering",
    "Cosine",
    "Kernel",
    "Linear",
    "RSMs",
    "get_kernel",
    "kernel_names",
]
