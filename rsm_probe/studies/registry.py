"""The registry of studies by name, one line each."""

from __future__ import annotations

import warnings
from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rsm_probe.checks import brief
from rsm_probe.config import ConfigFolder, read_yaml, with_changes
from rsm_probe.errors import ConfigError, did_you_mean
from rsm_probe.evidence.factors import FactorsConfig
from rsm_probe.evidence.study import EvidenceConfig
from rsm_probe.paper.registry import EXPERIMENTS, PaperConfig
from rsm_probe.runs.study import Study
from rsm_probe.shipped import configuration_file
from rsm_probe.studies.brain.study import BrainConfig
from rsm_probe.studies.pairs import PairsConfig
from rsm_probe.studies.sweep import SweepConfig
from rsm_probe.studies.sweeps import SweepsConfig

# Experiments have a registry of their own, because study: paper runs several; additions to it appear here.
STUDIES: ChainMap[str, type[Any]] = ChainMap(
    {
        "sweep": SweepConfig,
        "sweeps": SweepsConfig,
        "pairs": PairsConfig,
        "brain": BrainConfig,
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
        path: the YAML file, or the name of a configuration that comes with the package, such as "quickstart".
        stored: read the `config.yaml` of a run folder, whose paths were resolved when the run began. It is for
            figures, which load no models.
        allow_code: accept models whose source is Python code: `file.py:function` or `torch.hub:REPO:ENTRY`.
        changes: keys with values in place of those of the file, such as `images.count=100`; see `with_changes`.

    Raises:
        ConfigError: the file is not readable, the study is unknown, or a key, type or value is wrong.
    """
    file = configuration_file(path)
    home = ConfigFolder(allow_code=True) if stored else ConfigFolder.of(file, allow_code)
    return study_of(with_changes(read_yaml(file), changes), str(path), home)


def study_of(data: Mapping[str, Any], where: str, home: ConfigFolder) -> Study:
    """The study that a configuration describes.

    Args:
        data: keys and values, as read from YAML.
        where: source of the data, for messages.
        home: the folder to which paths are relative, and whether models may run code.

    Raises:
        ConfigError: the study is unknown, or a key, type or value is wrong.
    """
    name = data.get("study")
    if not isinstance(name, str) or name not in STUDIES:
        problem = f"found {brief(name)}{did_you_mean(brief(name), STUDIES)}" if "study" in data else "but it is missing"
        raise ConfigError(f"{where}: study: must be one of {', '.join(STUDIES)}, {problem}")
    study: Study = STUDIES[name].parse(data, where, home)
    for note in home.notes:
        warnings.warn(f"{where}: {note}", stacklevel=3)
    return study
