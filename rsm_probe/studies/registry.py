"""The studies by name: one line each."""

from __future__ import annotations

from collections import ChainMap
from pathlib import Path
from typing import Any

from rsm_probe.checks import brief
from rsm_probe.config import read_yaml
from rsm_probe.errors import ConfigError, nearest
from rsm_probe.paper.registry import EXPERIMENTS, PaperConfig
from rsm_probe.runs.study import Study
from rsm_probe.studies.pairs import PairsConfig
from rsm_probe.studies.sweep import SweepConfig
from rsm_probe.studies.sweeps import SweepsConfig

# Experiments can also be named in a study of several; additions to their registry appear here.
STUDIES: ChainMap[str, type[Any]] = ChainMap(
    {"sweep": SweepConfig, "sweeps": SweepsConfig, "pairs": PairsConfig, "paper": PaperConfig}, EXPERIMENTS
)


def read_study(path: str | Path) -> Study:
    """A study from its YAML configuration; its key `study` says which one it is.

    Raises:
        ConfigError: no readable configuration, an unknown study, or a wrong key, type or value.
    """
    data = read_yaml(path)
    name = data.get("study")
    if not isinstance(name, str) or name not in STUDIES:
        problem = f"found {brief(name)}{nearest(brief(name), STUDIES)}" if "study" in data else "but it is missing"
        raise ConfigError(f"{path}: study: must be one of {', '.join(STUDIES)}, {problem}")
    study: Study = STUDIES[name].parse(data, str(path))
    return study
