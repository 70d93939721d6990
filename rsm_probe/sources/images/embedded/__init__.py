"""Image sets that need no network: handwritten digits, scenes made of them, crops of photographs.

Begin with `scenes.py`; `images/registry.py` lists the sets by name, and a new one is one function and one line there.
"""
