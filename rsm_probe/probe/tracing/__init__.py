"""Traces which location of which image every value of a forward pass comes from.

Begin with `trace.py`. `location_codes.py` encodes locations as numbers, `origins.py` and its neighbours apply each
operation to them, and `traced_layout.py` reads a layer's axes from the result.
"""
