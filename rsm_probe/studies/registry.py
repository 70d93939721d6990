"""The studies by name: one line each."""

from __future__ import annotations

from pathlib import Path

from rsm_probe.checks import brief
from rsm_probe.config import read_yaml
from rsm_probe.errors import ConfigError, nearest
from rsm_probe.paper.paper import EXPERIMENTS, Experiment, PaperConfig
from rsm_probe.studies.pairs import PairsConfig
from rsm_probe.studies.sweep import SweepConfig
from rsm_probe.studies.sweeps import SweepsConfig

Study = SweepConfig | SweepsConfig | PairsConfig | PaperConfig | Experiment
STUDIES: dict[str, type[Study]] = {
    "sweep": SweepConfig,
    "sweeps": SweepsConfig,
    "pairs": PairsConfig,
    "paper": PaperConfig,
    **EXPERIMENTS,
}


def read_study(path: str | Path) -> Study:
    """A study from its YAML configuration; its key `study` says which one it is.

    Raises:
        ConfigError: no readable configuration, an unknown study, or a wrong key, type or value.
    """
    data = read_yaml(path)
    name = data.get("study")
    if not isinstance(name, str) or name not in STUDIES:
        found = f"found {brief(name)}{nearest(brief(name), STUDIES)}" if "study" in data else "but it is missing"
        raise ConfigError(f"{path}: study: must be one of {', '.join(STUDIES)}, {found}")
    return STUDIES[name].parse(data, str(path))
