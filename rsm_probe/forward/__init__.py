"""Forward passes: runs batches of images through models and passes on every layer as soon as it has run.

Begin with `layer_stream.py` (images and models in, layers out), then `layer_consumer.py` (the interface of captures,
means and the sums of a sweep, which receive the layers). `logits.py` runs a classifier for its own output. `captures`
and `streaming` only consume the layers and call no model themselves.
"""
