"""The calls of a model and of its modules: which of them are passes, and what to warn about.

Begin with `boundary.py`, which decides where a pass begins and ends. `module_calls.py` records which modules ran, to
suggest alternatives; `notices.py` holds the warnings.
"""
