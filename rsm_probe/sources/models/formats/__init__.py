"""Weights in forms that only the library that wrote them can read.

Begin with `saved_names.py`, which reads what transformers saved, or `adapters.py`, which attaches adapters of PEFT.
"""
