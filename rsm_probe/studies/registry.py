"""The registry of studies by name, one line each."""

from __future__ import annotations

from collections import ChainMap
from pathlib import Path
from typing import Any

from rsm_probe.checks import brief
from rsm_probe.config import read_yaml
from rsm_probe.errors import ConfigError, did_you_mean
from rsm_probe.paper.registry import EXPERIMENTS, PaperConfig
from rsm_probe.runs.study import Study
from rsm_probe.studies.pairs import PairsConfig
from rsm_probe.studies.sweep import SweepConfig
from rsm_probe.studies.sweeps import SweepsConfig

# Experiments have a registry of their own, because study: paper runs several; additions to it appear here.
STUDIES: ChainMap[str, type[Any]] = ChainMap(
    {"sweep": SweepConfig, "sweeps": SweepsConfig, "pairs": PairsConfig, "paper": PaperConfig}, EXPERIMENTS
)


def read_study(path: str | Path) -> Study:
    """Read a study from its YAML configuration; the key `study` selects its type.

    Raises:
        ConfigError: the file is not readable, the study is unknown, or a key, type or value is wrong.
    """
    data = read_yaml(path)
    name = data.get("study")
    if not isinstance(name, str) or name not in STUDIES:
        problem = f"found {brief(name)}{did_you_mean(brief(name), STUDIES)}" if "study" in data else "but it is missing"
        raise ConfigError(f"{path}: study: must be one of {', '.join(STUDIES)}, {problem}")
    study: Study = STUDIES[name].parse(data, str(path))
    return study
