"""What all runs share: configuration, run folder, provenance, tables and report.

Begin with `study.py` (the protocol of studies and their runner). `run_folder.py` guards the folder of a run, and
`model_config.py` and `images_config.py` define the keys of models and images in configurations.
"""
