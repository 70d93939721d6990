"""Where matching must win, and where it cannot: one thing changes at a time around a base setting of retrieval."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from matplotlib.figure import Figure
from pydantic import Field, field_validator, model_validator

from rsm_probe.errors import ConfigError
from rsm_probe.evidence.differences import DIFFERENCE, gains
from rsm_probe.evidence.figures import factor_figures
from rsm_probe.evidence.levels import LEVELS, FactorLevel, LevelRun, changed_settings, level_runs, named
from rsm_probe.evidence.page import factors_page
from rsm_probe.evidence.report import factors_report
from rsm_probe.execution.amounts import format_bytes, format_seconds
from rsm_probe.paper.page_parts import models_text
from rsm_probe.paper.retrieval.study import RetrievalConfig
from rsm_probe.report.facts import command_of, facts_of
from rsm_probe.report.page import Page
from rsm_probe.runs.model_config import base_title
from rsm_probe.runs.plan import TO_CONTINUE, StudyPlan
from rsm_probe.runs.provenance import provenance
from rsm_probe.runs.run_folder import run_folder
from rsm_probe.runs.study import Study
from rsm_probe.runs.tables import Row, TableResult
from rsm_probe.storage.files import load_json, save_json

# Keys of a row of retrieval that a row of factors keeps.
_KEYS = ("layer", "locations", "kernel", "matching", "score", "low", "high", *DIFFERENCE, "queries", "database")


@dataclass(frozen=True)
class FactorsPlan:
    """What a study of factors would do: `str` gives it as lines of text.

    Attributes:
        levels: factor -> names of its levels.
        cells: measurements of the semantic RSM, over all levels, models, layers and kernels.
        plans: the plan of each run by name; runs over images of one size share it.
        begun: whether the run folder holds results.
    """

    levels: Mapping[str, list[str]]
    cells: int
    plans: Mapping[str, StudyPlan]
    begun: bool

    @property
    def seconds(self) -> float:
        """Estimated seconds of all runs, without training."""
        return sum(plan.seconds for plan in self.plans.values())

    @property
    def state(self) -> str:
        """Whether the run is to begin or to continue."""
        return TO_CONTINUE if self.begun else next(iter(self.plans.values())).state

    @property
    def refusal(self) -> str | None:
        """The first error with which `run` would refuse an estimate; None if it would not."""
        return next((plan.refusal for plan in self.plans.values() if plan.refusal is not None), None)

    def distinct(self) -> dict[str, StudyPlan]:
        """Plans that differ, by the name of the first run that has it and the number of further ones."""
        names: dict[int, list[str]] = {}
        for name, plan in self.plans.items():
            names.setdefault(id(plan), []).append(name)
        more = {of[0]: f" and {len(of) - 1} more" if len(of) > 1 else "" for of in names.values()}
        return {f"run {name}{rest}": self.plans[name] for name, rest in more.items()}

    def __str__(self) -> str:
        first, runs = next(iter(self.plans.values())), list(self.plans.values())
        pairs = sum(model.pairs * len(model.matched) for plan in runs for model in plan.models)
        lines = [f"study: factors, {sum(map(len, self.levels.values()))} levels in {len(runs)} runs of retrieval"]
        lines += [f"  {factor}: {', '.join(names)}" for factor, names in self.levels.items()]
        lines += [f"  {name}: {model}" for name, plan in self.distinct().items() for model in plan.models]
        lines.append(
            f"estimate: {self.cells:,} cells, {pairs:,} pairs per matching, about {format_seconds(self.seconds)} with "
            f"{first.workers} workers, {format_bytes(max(plan.memory_bytes for plan in runs))} of memory besides the "
            f"models, {format_bytes(sum(plan.disk_bytes for plan in runs))} of disk"
        )
        return "\n".join(lines)


class FactorsConfig(Study):
    """Changes one thing at a time around a base setting, and measures retrieval at each level."""

    study: Literal["factors"] = "factors"
    base: RetrievalConfig = Field(description="the retrieval around which factors vary")
    factors: dict[str, dict[str, dict[str, Any]]] = Field(
        min_length=1,
        description="factor -> level -> keys of base: that differ, such as {images: {seed: 1}}; models: applies to "
        "every entry, and {} is base: itself. Levels that differ in kernels: or layers: alone share one run, and those "
        "that are compared differently (centering:, matchings:) share captures",
    )

    on_cluster: ClassVar[bool] = True

    @field_validator("base", mode="before")
    @classmethod
    def _a_retrieval(cls, base: Any) -> Any:
        if isinstance(base, dict) and base.get("study", "retrieval") != "retrieval":
            raise ValueError("study: the base of factors is a retrieval")
        return base

    @model_validator(mode="after")
    def _valid_levels(self) -> FactorsConfig:
        for factor, levels in self.factors.items():
            if len(levels) < 2:
                raise ValueError(f"{factor}: a factor needs at least two levels, such as {{}} for base: itself")
        try:
            runs = self.runs
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if any(run.settings.semantic is None or len(run.settings.matchings) < 2 for run in runs):
            raise ValueError("matchings: semantic RSMs are compared with baselines; give optimal and another one")
        if any(len(run.settings.database_sizes) > 1 for run in runs):
            raise ValueError("database_sizes: give one size; several can be levels of a factor")
        return self

    @cached_property
    def levels(self) -> list[FactorLevel]:
        """All levels, in order.

        Raises:
            ConfigError: the settings of a level are not valid.
        """
        base = self.base.model_dump(mode="json")
        return [
            FactorLevel(
                factor,
                name,
                self.base
                if not changes
                else RetrievalConfig.parse(changed_settings(base, changes), f"factors.{factor}.{name}", self._home),
            )
            for factor, levels in self.factors.items()
            for name, changes in levels.items()
        ]

    @cached_property
    def runs(self) -> list[LevelRun]:
        """The retrievals that measure all levels."""
        return level_runs(self.levels)

    def in_folder(self, networks: str) -> FactorsConfig:
        """The same study, which shares trained networks with others unless it says where they are.

        Args:
            networks: folder of trained networks.
        """
        base = self.base.model_copy(update={"networks": self.base.networks or networks})
        study = self.model_copy(update={"base": base})
        # A copy keeps what was derived from the previous base.
        for name in ("levels", "runs"):
            study.__dict__.pop(name, None)
        return study

    def run(self, out: Path, *, executor: Executor | None = None, progress: bool = False) -> TableResult:
        """Run or continue the retrieval of every level; see `Study.run`."""
        out = run_folder(out)
        study = self.in_folder(str(out / "models"))
        execution = study.base.execution(executor, progress)
        self.require_free(out)
        for run in study.runs:
            run.settings.require_free(out / LEVELS / run.name)
        rows: dict[tuple[str, str], list[Row]] = {}
        accuracies: dict[str, float] = {}
        with self.claimed(out) as require_there:
            for run in study.runs:
                runner = run.runner(out, execution)
                result = runner.run()
                require_there()
                accuracies |= load_json(runner.folder / "provenance.json").get("accuracy", {})
                rows |= {(level.factor, level.name): _rows(level, result) for level in run.levels}
            table = [row for level in study.levels for row in rows[level.factor, level.name]]
            result = TableResult(table, out, self.model_dump(mode="json"))
            result.save(factors_report(result, accuracies))
            seeds = {"images": self.base.images.seed, "draws": self.base.seed}
            save_json(out / "provenance.json", {**provenance(), "seeds": seeds, "accuracy": accuracies})
        return result

    def open(self, out: Path) -> TableResult:
        """See `Study.open`."""
        return TableResult.open(run_folder(out), self.model_dump(mode="json"))

    def figures(self, out: Path) -> dict[str, Figure]:
        """See `Study.figures`."""
        return factor_figures(self.open(out))

    def page(self, out: Path) -> Page:
        """See `Study.page`."""
        out = run_folder(out)
        page = factors_page(self.open(out))
        made = {"Models": models_text(self.base.models), **facts_of(out)}
        return replace(page, command=command_of(out), provenance=made)

    def plan(self, out: Path) -> FactorsPlan:
        """See `Study.plan`."""
        out, study = run_folder(out), self.in_folder(str(run_folder(out) / "models"))
        self.require_free(out)
        plans: dict[str, StudyPlan] = {}
        measured: dict[str, StudyPlan] = {}
        for run in study.runs:
            # Images of one size cost the same, whatever they show.
            settings = run.settings.model_dump_json(exclude={"images", "query_images", "centering"})
            key = f"{settings} {run.settings.images.size} {run.home == run.name}"
            if key not in measured:
                measured[key] = run.runner(out).plan()
            plans[run.name] = measured[key]
        cells = sum(
            len(level.settings.kernels) * sum(named(name.rpartition("/")[2], level.layers) for name in model.matched)
            for run in study.runs
            for level in run.levels
            for model in plans[run.name].models
        )
        levels = {factor: list(names) for factor, names in self.factors.items()}
        begun = any(run.settings.has_begun(out / LEVELS / run.name) for run in study.runs)
        return FactorsPlan(levels, cells, plans, begun)

    def gpus_of_workers(self, out: Path) -> torch.device | None:
        """See `Study.gpus_of_workers`."""
        return self.base.gpus_of_workers(out)


def _rows(level: FactorLevel, result: TableResult) -> list[Row]:
    """The rows of a level among those of its run.

    Raises:
        ConfigError: there are none.
    """
    rows = [row for row in result.table if level.takes(row)]
    if not rows:
        raise ConfigError(f"factors.{level.factor}.{level.name}: no layer is one of {', '.join(level.layers)}")
    return [
        {
            "factor": level.factor,
            "level": level.name,
            "model": base_title(row["model"]),
            "untrained": row["untrained"],
            **{key: row[key] for key in _KEYS},
        }
        for row in gains(rows)
    ]
