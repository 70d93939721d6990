"""Images with ids and labels, loaded one at a time.

Begin with `image_set.py` (`ImageSet`) and `any_images.py` (what can be turned into one). `folders.py` and
`published.py` read from disk, `objects` holds sets whose objects are known, and the sets in `embedded` need neither
files nor a network.
"""
