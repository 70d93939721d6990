"""The registry of studies by name, one line each."""

from __future__ import annotations

import warnings
from collections import ChainMap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rsm_probe.checks import brief
from rsm_probe.config import ConfigFolder, read_yaml, with_changes
from rsm_probe.errors import ConfigError, did_you_mean
from rsm_probe.evidence.factors import FactorsConfig
from rsm_probe.evidence.study import EvidenceConfig
from rsm_probe.paper.registry import EXPERIMENTS, PaperConfig
from rsm_probe.runs.study import Study
from rsm_probe.studies.pairs import PairsConfig
from rsm_probe.studies.sweep import SweepConfig
from rsm_probe.studies.sweeps import SweepsConfig

# Experiments have a registry of their own, because study: paper runs several; additions to it appear here.
STUDIES: ChainMap[str, type[Any]] = ChainMap(
    {
        "sweep": SweepConfig,
        "sweeps": SweepsConfig,
        "pairs": PairsConfig,
        "paper": PaperConfig,
        "factors": FactorsConfig,
        "evidence": EvidenceConfig,
    },
    EXPERIMENTS,
)


def read_study(
    path: str | Path, *, stored: bool = False, allow_code: bool = False, changes: Sequence[str] = ()
) -> Study:
    """Read a study from its YAML configuration; the key `study` selects its type.

    Paths in it are relative to its folder, or else to the working directory, which is mentioned in a warning. Folders
    that a study writes (`networks`, `store`) are relative to the working directory, as on the command line.

    Args:
        path: the YAML file.
        stored: read the `config.yaml` of a run folder, whose paths were resolved when the run began. It is for
            figures, which load no models.
        allow_code: accept models whose source is Python code: `file.py:function` or `torch.hub:REPO:ENTRY`.
        changes: keys with values in place of those of the file, such as `images.count=100`; see `with_changes`.

    Raises:
        ConfigError: the file is not readable, the study is unknown, or a key, type or value is wrong.
    """
    data = with_changes(read_yaml(path), changes)
    name = data.get("study")
    if not isinstance(name, str) or name not in STUDIES:
        problem = f"found {brief(name)}{did_you_mean(brief(name), STUDIES)}" if "study" in data else "but it is missing"
        raise ConfigError(f"{path}: study: must be one of {', '.join(STUDIES)}, {problem}")
    home = ConfigFolder(allow_code=True) if stored else ConfigFolder.of(path, allow_code)
    study: Study = STUDIES[name].parse(data, str(path), home)
    for note in home.notes:
        warnings.warn(f"{path}: {note}", stacklevel=2)
    return study
