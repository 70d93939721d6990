"""Images whose objects are known: their classes, and the boxes around them.

The annotation of an image holds `counts` (class -> number of objects) and, where they are known, `boxes` ([class, left,
top, right, bottom] in pixels of the loaded image), `scene` and `video`. Begin with `coco.py`, which reads COCO JSON
(`coco_writer.py` writes any of these sets as such), or `composed.py`, scenes of cut-outs on backgrounds: `layouts.py`
decides where objects stand, `cut_outs.py` and `pictures.py` read files. `detections.py` takes data sets for object
detection, and `annotated.py` holds the published sets of the paper.
"""
