"""Models from libraries, files or functions, each with its preprocessing.

Begin with `loaded_model.py` (`LoadedModel`), then `libraries.py` (one function per library) and `weights.py`
(pretrained weights and checkpoints).
"""
