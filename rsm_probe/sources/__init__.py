"""What goes in: models, images, and the training recipes that give a sweep its seeds.

Begin with `loading.py`, which turns names into models. `images` and `models` know nothing of each other's libraries;
`training` uses both.
"""
