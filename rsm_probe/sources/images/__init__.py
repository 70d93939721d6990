"""Images with ids and labels, loaded one at a time.

Begin with `image_set.py` (`ImageSet`) and `any_images.py` (what can be turned into one). `folders.py`, `published.py`
and `annotated.py` read from disk; the sets in `embedded` need neither files nor a network.
"""
