"""Images whose objects are known: their classes, and the boxes around them.

The annotation of an image holds `counts` (class -> number of objects) and, where they are known, `boxes` ([class, left,
top, right, bottom] in pixels of the loaded image), `scene` and `video`. Begin with `annotated.py`, the published sets
of the paper.
"""
