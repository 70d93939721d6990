"""The nearest images of a query, found without solving every pair.

Begin with `nearest_images.py` (`nearest()`), then `bounded_search.py`.
"""
