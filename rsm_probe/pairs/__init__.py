"""All pairs of images: `rsm()` for what fits into memory, `all_pairs()` for tiles on disk.

Begin with `compute.py` (`rsm()`), then `products.py` (pairs of images to matched inner products) and `affinities.py`.
"""
