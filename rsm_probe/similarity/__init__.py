"""Image against image: the RSM, kernels and centering.

Begin with `rsm.py`; `kernels.py` turns matched inner products into similarities.
"""
