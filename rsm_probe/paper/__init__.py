"""The experiments of the paper, one folder each: study, report and figures.

Begin with `experiment.py` (what they share) and `translation`, the smallest of them.
"""
