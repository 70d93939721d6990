"""Weights in forms that need more than their own names: those of other libraries, adapters, and Python packages.

Begin with `saved_names.py`, which reads what transformers saved, `adapters.py`, which attaches adapters of PEFT, or
`packaged.py`, the published weights that come as Python packages.
"""
