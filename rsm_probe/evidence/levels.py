"""The levels of factors as retrieval studies: which settings each has, and which runs measure several of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rsm_probe.errors import ConfigError
from rsm_probe.execution.execution import Execution
from rsm_probe.paper.retrieval.study import RetrievalConfig, RetrievalRunner
from rsm_probe.runs.run_folder import run_folder
from rsm_probe.runs.tables import Row
from rsm_probe.storage.paths import file_name

# The folder of the runs within that of the study.
LEVELS = "levels"
# Keys that choose among the rows of a run.
_NARROWING = frozenset({"layers", "kernels"})
# Keys that decide how captured layers are compared; all others decide what is captured.
_COMPARING = _NARROWING.union(
    ("centering", "matchings", "score", "top", "tile", "exact_top", "pictured", "repeats", "level")
)


@dataclass(frozen=True)
class FactorLevel:
    """One level of a factor.

    Attributes:
        factor: name of the factor.
        name: name of the level.
        settings: the retrieval that measures it.
    """

    factor: str
    name: str
    settings: RetrievalConfig

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that it names."""
        layers = self.settings.layers
        return (layers,) if isinstance(layers, str) else layers

    def takes(self, row: Row) -> bool:
        """Whether a row of the run is one of this level."""
        return row["kernel"] in self.settings.kernels and named(row["layer"], self.layers)


@dataclass(frozen=True)
class LevelRun:
    """A retrieval that measures several levels, which differ in nothing but kernels and layers.

    Attributes:
        levels: the levels.
        captured: the layers that are captured; those of all runs over the same representations.
        home: name of the folder, within `LEVELS`, that holds the captures.
    """

    levels: tuple[FactorLevel, ...]
    captured: tuple[str, ...]
    home: str

    @property
    def name(self) -> str:
        """The name of its folder."""
        return _folder(self.levels[0])

    @property
    def settings(self) -> RetrievalConfig:
        """The retrieval with the kernels and layers of all levels."""
        first = self.levels[0].settings
        kernels = dict.fromkeys(kernel for level in self.levels for kernel in level.settings.kernels)
        layers = dict.fromkeys(layer for level in self.levels for layer in level.layers)
        return first.model_copy(update={"kernels": tuple(kernels), "layers": tuple(layers)})

    def runner(self, out: Path, execution: Execution | None = None) -> LevelRunner:
        """Make its runner.

        Args:
            out: the run folder of the study.
            execution: how the work runs; by default from the configuration.
        """
        return LevelRunner(self.settings, out / LEVELS / self.name, out / LEVELS / self.home, self.captured, execution)


class LevelRunner(RetrievalRunner):
    """A retrieval over captures that it may share with other runs.

    Args:
        study: the retrieval.
        out: its folder.
        captured_in: the folder of the run that holds the captures.
        captured: the layers that are captured, among which are those of the retrieval.
        execution: how the work runs; by default from the configuration.
    """

    def __init__(
        self,
        study: RetrievalConfig,
        out: Path,
        captured_in: Path,
        captured: Sequence[str],
        execution: Execution | None = None,
    ) -> None:
        super().__init__(study, out, execution)
        self.captured_in, self.captured = run_folder(captured_in), list(captured)

    def layers(self, title: str) -> str | list[str]:
        """See `Runner.layers`."""
        return self.entry(title).layers_or(self.captured)

    def choose_layers(self, layers: Mapping[str, Any]) -> dict[str, Any]:
        """See `Runner.choose_layers`."""
        # Of a plan, names begin with the title of the model.
        wanted = {name: layer for name, layer in layers.items() if named(name.rpartition("/")[2], self.study.layers)}
        if not wanted:
            raise ConfigError(
                f"none of the layers {', '.join(layers)} is one of {', '.join(self.study.layers)}; models with layers: "
                f"of their own need no layers: in factors:"
            )
        return wanted


def named(layer: str, patterns: Sequence[str]) -> bool:
    """Whether a layer is one of some names or globs; "blocks", "all" and regular expressions stand for all layers."""
    return any(layer == pattern or _is_rule(pattern) or fnmatchcase(layer, pattern) for pattern in patterns)


def level_runs(levels: Sequence[FactorLevel]) -> list[LevelRun]:
    """Divide levels among as few retrievals as can measure them.

    Raises:
        ConfigError: levels differ in layers, some of which are not named.
    """
    runs: dict[str, list[FactorLevel]] = {}
    for level in levels:
        runs.setdefault(level.settings.model_dump_json(exclude=set(_NARROWING)), []).append(level)
    captures: dict[str, list[FactorLevel]] = {}
    for level in levels:
        captures.setdefault(_captured(level), []).append(level)
    for same in captures.values():
        names = list(dict.fromkeys(name for level in same for name in level.layers))
        if len({level.layers for level in same}) > 1 and any(map(_is_rule, names)):
            raise ConfigError(
                f"layers: levels of {same[-1].factor!r} have other layers than base:, so that all layers must be names "
                f"or globs; found {', '.join(names)}"
            )
    return [
        LevelRun(tuple(alike), tuple(dict.fromkeys(name for level in same for name in level.layers)), _folder(same[0]))
        for alike in runs.values()
        for same in [captures[_captured(alike[0])]]
    ]


def changed_settings(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Change nested settings: mappings are changed key by key, `models` in every entry, and all else is replaced."""
    changed = dict(settings)
    for key, value in changes.items():
        before = changed.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            changed[key] = changed_settings(before, value)
        elif key == "models" and isinstance(value, Mapping) and isinstance(before, list | tuple):
            changed[key] = [changed_settings(entry, value) for entry in before]
        else:
            changed[key] = value
    return changed


def _captured(level: FactorLevel) -> str:
    return level.settings.model_dump_json(exclude=set(_COMPARING))


def _folder(level: FactorLevel) -> str:
    return file_name(f"{level.factor}={level.name}")


def _is_rule(pattern: str) -> bool:
    return pattern in ("blocks", "all") or pattern.startswith("regex:")
