"""Which location of which image every value of a forward pass belongs to.

Begin with `trace.py`. Locations are numbers (`location_codes.py`); `origins.py` and its neighbours say what each
operation does to them, and `traced_layout.py` reads a layer's axes from the result.
"""
