"""Small networks trained by a recipe, repeatably: the seeds of a sweep.

Begin with `recipe.py` (what a recipe says) and `train.py` (the training loop).
"""
