"""Studies that consist of several studies, run one after another in subfolders of one run folder."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Collection, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from pydantic import ValidationInfo

from rsm_probe.config import read_nested
from rsm_probe.runs.fields import folder_names
from rsm_probe.runs.plan import TO_CONTINUE
from rsm_probe.runs.run_folder import run_folder
from rsm_probe.runs.study import Study
from rsm_probe.storage.files import save_text


class Results(dict[str, Any]):
    """The results of several studies by name."""

    def __str__(self) -> str:
        return "\n".join(f"{name}: {result}" for name, result in self.items())


class Plans(dict[str, Any]):
    """The plans of several studies by name; `str` gives them one after another."""

    @property
    def state(self) -> str:
        """Whether the run is to begin, to continue, or finished."""
        states = {plan.state for plan in self.values()}
        return states.pop() if len(states) == 1 else TO_CONTINUE

    @property
    def refusal(self) -> str | None:
        """The first error with which `run` would refuse an estimate; None if it would not."""
        return next((plan.refusal for plan in self.values() if plan.refusal is not None), None)

    def __str__(self) -> str:
        return "\n".join(f"{name}: \n{plan}" for name, plan in self.items())


class SeveralStudies(Study):
    """Studies by name, each in a folder of that name."""

    @abstractmethod
    def parts(self, out: Path) -> Mapping[str, Study]:
        """The studies by name; `out` is the run folder, which may hold files they share."""

    @abstractmethod
    def summary(self, results: Results) -> tuple[str, str]:
        """The name and the text of a file that summarises all studies."""

    def check_together(self, progress: bool) -> None:
        """Reject studies that do not fit together, before hours are spent on one of them."""

    def plan(self, out: Path) -> Plans:
        """See `Study.plan`."""
        out = run_folder(out)
        self.require_free(out)
        self.check_together(progress=False)
        return Plans({name: part.plan(out / name) for name, part in self.parts(out).items()})

    def run(self, out: Path, *, executor: Executor | None = None, progress: bool = False) -> Results:
        """Run or continue the studies, and write the summary; see `Study.run`."""
        out = run_folder(out)
        self.require_free(out)
        parts = self.parts(out)
        for name, part in parts.items():
            part.require_free(out / name)
        self.check_together(progress)
        results = Results()
        with self.claimed(out) as require_there:
            for name, part in parts.items():
                if executor is not None and not part.on_cluster:
                    warnings.warn(f"{name}: study: {part.study} runs in this process only", stacklevel=2)
                shared = executor if part.on_cluster else None
                results[name] = part.run(out / name, executor=shared, progress=progress)
                require_there()
            file, text = self.summary(results)
            save_text(out / file, text)
        return results

    def why_no_figures(self, out: Path) -> str:
        """See `Study.why_no_figures`."""
        return "; ".join(f"{name}: {part.why_no_figures(out / name)}" for name, part in self.parts(out).items())

    def figures(self, out: Path) -> dict[str, Figure]:
        """The figures of all studies, named `<study>-<figure>`."""
        return {
            f"{name}-{title}": figure
            for name, part in self.parts(out).items()
            for title, figure in part.figures(out / name).items()
        }

    def gpus_of_workers(self, out: Path) -> torch.device | None:
        """See `Study.gpus_of_workers`."""
        return next((gpus for part in self.parts(out).values() if (gpus := part.gpus_of_workers(out))), None)

    def open(self, out: Path) -> Results:
        """The results of finished studies; see `Study.open`."""
        return Results({name: part.open(out / name) for name, part in self.parts(out).items()})


def read_parts(
    studies: Any, kinds: Mapping[str, type[Study]], taken: Collection[str], info: ValidationInfo, shared: Any = None
) -> Any:
    """Parse the studies of a configuration: name -> a study, or a file that holds one.

    Args:
        studies: the mapping; pydantic rejects anything else.
        kinds: name -> class of the studies that may be parts.
        taken: names that no study may have, because its folder is named after it.
        info: of the validator that calls this.
        shared: a function of the settings of a study that adds what all studies share; None for nothing.

    Raises:
        ValueError: a name cannot be that of a folder, the kind of a study is unknown, or `shared` raises one.
        ConfigError: the settings of a study are wrong.
    """
    if not isinstance(studies, dict):
        return studies
    parsed = {}
    for name, entry in folder_names(studies, taken).items():
        data, home = read_nested(entry, info) if isinstance(entry, str) else (entry, info.context)
        kind = data.get("study") if isinstance(data, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise ValueError(f"{name}: study: must be one of {', '.join(kinds)}, found {kind!r}")
        try:
            settings = data if shared is None else shared(data)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        parsed[name] = kinds[kind].parse(settings, f"studies.{name}", home)
    return parsed
