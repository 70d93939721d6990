"""Data on disk: chunked arrays, labelled datasets, atomic files, checksums and locks.

Begin with `chunks.py` (arrays written chunk by chunk) and `files.py` (datasets and small files). `paths.py` decides
which paths and URLs are accepted.
"""
