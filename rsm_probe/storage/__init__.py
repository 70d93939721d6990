"""Data on disk: chunked arrays, labelled datasets, atomic files, checksums and locks.

Begin with `chunks.py` (arrays written chunk by chunk) and `files.py` (datasets and small files). `places.py` decides
where something may be written.
"""
