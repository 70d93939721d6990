"""Which location of one image is matched with which location of another.

Begin with `matching.py` (the interface of a method and its guarantees), `registry.py` (the methods by name) and
`matches.py` (`match()`). `methods` holds one method per file, `compiled` the auction for CPU and GPU.
"""
