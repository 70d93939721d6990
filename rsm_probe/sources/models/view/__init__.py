"""The part of an image that a model sees, after its own resize and crop.

Begin with `probing.py`, which finds it for any preprocessing by the images that it makes of black and white ones.
`objects_seen.py` counts the objects within it, `crops_seen.py` the pixels that two crops share.
"""
