"""Models from the libraries or as they are, each with its preprocessing.

Begin with `loaded_model.py` (what a loaded model is), then `libraries.py` (one function for each library) and
`weights.py` (pretrained weights and checkpoints).
"""
