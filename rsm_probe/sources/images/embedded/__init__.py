"""Image sets that need no network: handwritten digits, scenes made of them, crops of photographs.

`registry.py` lists them by name; a new set is one function and one line there.
"""
