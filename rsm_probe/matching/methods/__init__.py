"""The matching methods, one per file. Each is a small frozen object that carries its options.

Begin with `identity.py` and `optimal.py`. A new method is one file here and one line in `rsm_probe.matching.registry`.
"""
