"""Image sets that need no network: handwritten digits, scenes composed of them, and crops of photographs.

Begin with `scenes.py`. To add a set, write a function and add a line to `images/registry.py`.
"""
