"""Inside the network: hooks on named layers, and every output read as tokens `(N, S, C)`.

Begin with `probe.py`, then `forward_pass.py` (what happens during one pass of the model) and `readers.py` (how an
output becomes tokens). `tracing` finds out which image location each value comes from. This room needs nothing of the
project but errors, checks and arrays.
"""
