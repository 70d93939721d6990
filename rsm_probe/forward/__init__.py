"""Forward passes: batches of images go through models, and every layer is handed on as soon as it has run.

Begin with `layer_stream.py` (images and models in, layers out), then `layer_consumer.py` (what takes the layers:
captures, means, the sums of a sweep). `logits.py` runs a classifier for its own output. The room stands below
`captures` and `streaming`, which both consume layers, so that nothing else has to call a model.
"""
