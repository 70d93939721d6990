"""What every run has: its configuration, run folder, provenance, tables and report.

Begin with `run_folder.py`; `entries.py` says what a configuration may hold about models and images.
"""
