"""Studies that are not experiments of the paper, and the registry of all.

Begin with `registry.py`; `sweep.py` and `pairs.py` run what their names say.
"""
