"""Images with ids and labels, loaded one at a time.

Begin with `image_set.py` (what an image set is) and `any_images.py` (everything that can become one). `folders.py`,
`published.py` and `annotated.py` read from disk; `embedded` holds the sets that need no network.
"""
