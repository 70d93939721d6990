"""The study of brains: which layer, and which notion of similarity, explains the RDMs of subjects best.

Begin with `study.py`, the configuration and its runner. `subjects.py` reads or simulates the subjects and joins their
images to those of the study, `result.py` holds what came out, and `figures.py`, `page.py` and `words.py` show it.
"""
