"""What a study reads that is not on this machine, where to get it, and what the study would cost on paper.

Begin with `listing.py` (`missing_of`). `weights.py` looks into the caches of model libraries, `data.py` for data sets,
and `on_paper.py` estimates times without weights and images. Nothing here opens a connection.
"""
