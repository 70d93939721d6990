"""What every run has: its configuration, run folder, provenance, tables and report.

Begin with `study.py` (the protocol of studies, and what runs them); `run_folder.py` says whose a folder is, and
`model_config.py` and `images_config.py` what a configuration may hold.
"""
