"""Representations of a whole set of images on disk, layer by layer.

Begin with `recording.py` (`capture()`), then `captured_layers.py` (`Capture`, and a layer as other rooms read it).
"""
