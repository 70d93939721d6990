"""RSM against RSM: CKA, RSA and others, with intervals. Arrays in, arrays out.

Begin with `alignment.py` (CKA) and `measures.py` (all measures by name).
"""
