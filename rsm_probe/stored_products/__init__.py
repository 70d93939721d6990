"""Matched inner products on disk: what a sweep keeps of every mini-batch, so that no pair is matched twice.

Begin with `product_store.py` (the arrays of a store). `series.py` says by which keys a store recognises the RSMs of a
layer, and `image_parts.py` which mini-batches it holds, and how they grow.
"""
