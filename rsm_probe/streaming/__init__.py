"""The layer sweep: images pass through the models once, and only sums are kept.

Begin with `layer_sweep.py` (`sweep()`), then `layer_stream.py` (batches through models) and `accumulator.py`.
"""
