"""Formats of files that hold RDMs, one module each. Nothing in a file is run, and no link out of it is followed.

Begin with `stored.py`, which finds subjects, images and pairs in arrays of any format.
"""
