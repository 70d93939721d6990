"""Small networks trained reproducibly by a recipe, for sweeps over seeds.

Begin with `recipe.py` (the settings of a recipe) and `train.py` (the training loop).
"""
